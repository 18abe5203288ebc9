"""All of LeRobot that is used here and is not public: what for, and which public way is missing.

Seen in LeRobot 0.6.1. At the next version `test_lerobot_internals.py` tells which name has gone, and what is no longer needed.
"""

from typing import TYPE_CHECKING

import torch
from lerobot.datasets import LeRobotDataset
from lerobot.processor import ProcessorStep

if TYPE_CHECKING:
    from lerobot.policies import PreTrainedPolicy


def video_backend(dataset: LeRobotDataset) -> str:
    """What a data set decodes its videos with.

    Missing: an attribute; it is an argument of the constructor, which may choose another.
    """
    return dataset._video_backend


def registered_name(step: type[ProcessorStep]) -> str:
    """What a processor's file calls a step.

    Missing: `ProcessorStepRegistry` looks steps up by name, and no names by step.
    """
    return step._registry_name


def renamed_as_today(network: "PreTrainedPolicy", saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors under the names that pi0's and pi0.5's `from_pretrained` gives those of older checkpoints.

    Missing: that alone; `from_pretrained` builds and loads the whole policy.
    """
    if not hasattr(network, "_fix_pytorch_state_dict_keys"):
        return saved
    saved = network._fix_pytorch_state_dict_keys(saved, network.config)
    return {key if key.startswith("model.") else f"model.{key}": value for key, value in saved.items()}
