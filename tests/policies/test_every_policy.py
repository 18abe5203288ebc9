"""Each of LeRobot's policies either trains as with `lerobot-train`, or is refused in a line before anything is scheduled."""

import importlib.metadata
import re
from pathlib import Path

import numpy as np
import pytest
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies import make_policy

from ray_jobs.checks import preflight
from ray_jobs.checks.policy import missing_packages
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError
from ray_jobs.storage.records import read_metrics
from support.commands import common, train_in_process
from support.parity import LEROBOT_TRAIN, assert_same_training, run_script
from support.vla import _tokenizer

CROP = "--policy.crop_shape=[48,48]"
# What is told on the machine of the tests, without a network, of a data set without rewards; None: it trains.
TOLD = {
    "act": None,
    "diffusion": None,
    "eo1": "Qwen/Qwen2.5-VL-3B-Instruct: not here",
    "evo1": "OpenGVLab/InternVL3-1B-hf: not here",
    "fastwam": "It lacks observation.images.image",
    "gaussian_actor": "does not learn from recordings",
    "groot": "pip install 'lerobot[groot]==",
    "lingbot_va": "robbyant/lingbot-va-base: not here",
    "molmoact2": "allenai/MolmoAct2: not here",
    "multi_task_dit": "openai/clip-vit-base-patch16: not here",
    "pi0": "google/paligemma-3b-pt-224: not here",
    "pi0_fast": "not here",
    "pi05": "google/paligemma-3b-pt-224: not here",
    "smolvla": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct: not here",
    "tdmpc": "has no next.reward",
    "vla_jepa": "Qwen/Qwen3-VL-2B-Instruct: not here",
    "vqbet": None,
    "wall_x": "pip install 'lerobot[wallx]==",
    "xvla": "--policy.florence_config must describe",
}
# What keeps stock LeRobot from building them is not the network. (tdmpc it can build, not train: see below.)
NEVER_BUILT = {"gaussian_actor": TypeError, "wall_x": ImportError, "xvla": ValueError}


def command(policy: str, root: Path, output_dir: Path, *more: str) -> list[str]:
    """Flags that every policy knows."""
    flags = [flag for flag in common(root, output_dir) if "backbone" not in flag]
    flags += ["--policy.pretrained_backbone_weights=null"] * (policy in ("act", "diffusion", "vqbet"))
    flags += [CROP] * (policy == "vqbet")
    return [*flags, f"--policy.type={policy}", *more]


def test_none_is_forgotten():
    known = PreTrainedConfig.get_known_choices().items()
    assert {name for name, config in known if config.__module__.startswith("lerobot.")} == set(TOLD)


@pytest.mark.parametrize("policy", TOLD)
def test_trains_or_is_refused_before_anything_is_scheduled(parts, tmp_path, no_network, policy):
    def check():
        preflight.check(resolve(command(policy, parts, tmp_path / "run")))

    if TOLD[policy] is None:
        return check()
    with pytest.raises(InputError) as refused:
        check()
    told = str(refused.value)
    assert TOLD[policy] in told and len(told.splitlines()) <= 2
    if extra := re.search(r"lerobot\[(.+)\]==(.+)'", told):
        assert extra[2] == importlib.metadata.version("lerobot")
        assert extra[1] in importlib.metadata.metadata("lerobot").get_all("Provides-Extra")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", NEVER_BUILT)
def test_stock_lerobot_cannot_build_what_is_refused(parts, policy):
    config = PreTrainedConfig.get_choice_class(policy)(device="cpu")
    with pytest.raises(NEVER_BUILT[policy]) as stocks:
        make_policy(config, ds_meta=LeRobotDatasetMetadata("local/parts", root=parts))
    if NEVER_BUILT[policy] is ImportError:  # LeRobot's names the first that is missing
        assert re.match("'(.+?)'", str(stocks.value))[1] in missing_packages(config)


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory) -> Path:
    """Two episodes without a camera, with rewards: of them a policy can learn what an action is worth."""
    root = tmp_path_factory.mktemp("data") / "rewarded"
    features = {
        name: {"dtype": "float32", "shape": (size,), "names": None}
        for name, size in (
            ("observation.state", 2),
            ("observation.environment_state", 3),
            ("action", 2),
            ("next.reward", 1),
        )
    }
    dataset = LeRobotDataset.create("local/rewarded", 10, features, root=root, use_videos=False)
    numbers = np.random.default_rng(0)
    for _ in range(2):
        for _ in range(15):
            frame = {name: numbers.normal(size=f["shape"]).astype(np.float32) for name, f in features.items()}
            dataset.add_frame({**frame, "task": "push"})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP, of which Multi-Task DiT takes both halves."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("models") / "clip-tiny"
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    pixels = {"image_size": 48, "patch_size": 16}
    CLIPModel(
        CLIPConfig(text_config={**small, **words}, vision_config={**small, **pixels}, projection_dim=16)
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_every_step_equals_lerobots(parts, rewarded, clip, tmp_path):
    """Policies beside the five that can be built here."""
    short = ["--steps=4", "--batch_size=4", "--num_workers=0", "--save_checkpoint=false"]
    dit = [
        f"--policy.vision_encoder_name={clip}",
        f"--policy.text_encoder_name={clip}",
        "--policy.image_crop_shape=[48,48]",
        "--policy.hidden_dim=64",
        "--policy.num_layers=1",
        "--policy.num_heads=2",
    ]
    cases = {"vqbet": (parts, []), "tdmpc": (rewarded, []), "multi_task_dit": (parts, dit)}

    def flags(policy: str, whose: str) -> list[str]:
        root, more = cases[policy]
        return command(policy, root, tmp_path / f"{whose} {policy}", *short, *more)

    theirs = run_script(LEROBOT_TRAIN, tmp_path, [flags(policy, "lerobots") for policy in cases])
    for policy, records in zip(cases, theirs, strict=True):
        train_in_process(flags(policy, "ours"))
        assert_same_training(read_metrics(tmp_path / f"ours {policy}"), records, rel=1e-4)


@pytest.mark.parametrize("policy", ["multi_task_dit", "tdmpc", "vqbet"])
def test_validation_that_cannot_be_is_refused(parts, rewarded, clip, tmp_path, policy):
    """These three predict from queues that a robot fills."""
    models = [f"--policy.vision_encoder_name={clip}", f"--policy.text_encoder_name={clip}"]
    more = models if policy == "multi_task_dit" else []
    flags = command(policy, rewarded if policy == "tdmpc" else parts, tmp_path / "run", *more)
    with pytest.raises(InputError, match="val/action_error cannot be measured"):
        preflight.check(resolve([*flags, "--data.eval_episodes=[1]", "--eval_steps=4"]))
    preflight.check(resolve(flags))  # as is advised
