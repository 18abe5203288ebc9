"""Canaries: what is private of LeRobot and used here is still there, and there is still no public way."""

import inspect

from lerobot.datasets import LeRobotDataset
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.processor import ImageCropResizeProcessorStep, ProcessorStepRegistry

from ray_jobs.data.lerobot_internals import registered_name, video_backend


def test_a_data_set_tells_its_backend_nowhere_else(parts):
    dataset = LeRobotDataset("local/parts", root=parts, video_backend="pyav")
    assert video_backend(dataset) == "pyav"
    assert not [name for name in dir(dataset) if "backend" in name and not name.startswith("_")]


def test_steps_are_looked_up_by_name_only():
    name = registered_name(ImageCropResizeProcessorStep)
    assert ProcessorStepRegistry.get(name) is ImageCropResizeProcessorStep
    public = {name for name in dir(ProcessorStepRegistry) if not name.startswith("_")}
    assert public == {"clear", "get", "list", "register", "unregister"}


def test_older_checkpoints_are_renamed_by_a_method_of_the_policy():
    for policy in (PI0Policy, PI05Policy):
        rename = policy._fix_pytorch_state_dict_keys
        assert list(inspect.signature(rename).parameters) == ["self", "state_dict", "model_config"]
