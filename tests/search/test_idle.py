"""What a search leaves out because it has no effect: it has none in LeRobot, and searches from before go on as they were."""

import json
from pathlib import Path

import pytest

from ray_jobs.config.errors import InputError
from ray_jobs.config.events import Log
from ray_jobs.policies.facts import FACTS
from support.commands import tiny_act, tiny_diffusion, train_in_process
from support.data_sets import make
from support.searches import plan_of

ENDS = {  # of each flag
    "vision_backbone": ("resnet18", "resnet34"),
    "pretrained_backbone_weights": ("null", "ResNet18_Weights.IMAGENET1K_V1"),
    "replace_final_stride_with_dilation": ("0", "1"),
    "optimizer_lr_backbone": ("1e-6", "0.1"),
    "use_group_norm": ("true", "false"),
    "spatial_softmax_num_keypoints": ("8", "64"),
    "resize_shape": ("null", "[16,16]"),
    "crop_ratio": ("1.0", "0.5"),
    "crop_shape": ("null", "[8,8]"),
    "crop_is_random": ("true", "false"),
    "use_separate_rgb_encoder_per_camera": ("true", "false"),
    "kl_weight": ("1", "100"),
    "n_vae_encoder_layers": ("1", "3"),
}
OWN = [
    "--use_policy_training_preset=false",
    "--optimizer.type=adam",
    "--scheduler.type=cosine_decay_with_warmup",
]
OWN += [
    "--scheduler.num_warmup_steps=1",
    "--scheduler.num_decay_steps=4",
    "--scheduler.peak_lr=1e-3",
    "--scheduler.decay_lr=0",
]
CASES = [
    *(
        (policy, f"policy.{name}", ENDS[name], ())
        for policy, facts in FACTS.items()
        for name in facts.idle_without_cameras
    ),
    *(
        (policy, f"policy.{name}", ENDS[name], (f"--policy.{other}=false",))
        for policy, facts in FACTS.items()
        for other, names in facts.idle_without.items()
        for name in names
    ),
    ("act", "dataset.use_imagenet_stats", ("true", "false"), ()),
    ("act", "dataset.image_transforms.enable", ("true", "false"), ()),
    ("act", "policy.optimizer_lr", ("1e-5", "0.1"), OWN),
    ("act", "policy.optimizer_weight_decay", ("0", "0.5"), OWN),
    ("act", "policy.optimizer_lr_backbone", ("1e-6", "0.1"), OWN),
    ("diffusion", "policy.scheduler_warmup_steps", ("0", "500"), OWN),
]
SPACE = {
    "policy": "act",
    "baseline": {"policy.optimizer_lr": 1e-4, "policy.optimizer_lr_backbone": 1e-5},
    "search": {
        "policy.optimizer_lr": {"low": 1e-5, "high": 1e-3, "log": True},
        "policy.optimizer_lr_backbone": {"low": 1e-6, "high": 1e-4, "log": True},
    },
}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("idle") / "numbers", [12, 12])


def losses(policy: str, root: Path, folder: Path, *more: str) -> list[float]:
    flags = {"act": tiny_act, "diffusion": tiny_diffusion}[policy]
    more = ("--steps=3", "--seed=5", "--num_workers=0", "--save_checkpoint=false", *more)
    events = train_in_process(flags(root, folder, *more))[1]
    return [event.values["train/loss"] for event in events if isinstance(event, Log)]


QUICK = ("policy.optimizer_lr_backbone", "policy.kl_weight")


@pytest.mark.parametrize(
    ("policy", "flag", "ends", "more"),
    [
        pytest.param(
            *case, id=f"{case[0]}-{case[1]}-{number}", marks=[] if case[1] in QUICK else pytest.mark.slow
        )
        for number, case in enumerate(CASES)
    ],
)
def test_it_has_no_effect(numbers, tmp_path, policy, flag, ends, more):
    """Both ends of it: every loss to the last digit."""
    low, high = (
        losses(policy, numbers, tmp_path / str(ends.index(end)), *more, f"--{flag}={end}") for end in ends
    )
    assert low == high and len(low) == 3


def test_with_cameras_it_has_one(parts, tmp_path):
    low, high = (
        losses("act", parts, tmp_path / end, "--data.cache=off", f"--policy.optimizer_lr_backbone={end}")
        for end in ("1e-6", "1e-3")
    )
    assert low[0] == high[0] and low[2] != high[2]


def test_it_is_left_out_and_told(numbers, parts, tmp_path):
    """Where it has no effect alone; and not in a search that has begun with it."""
    searched = plan_of(tmp_path, parts, SPACE)
    assert set(searched.space.describe()) == set(SPACE["search"])
    plan = plan_of(tmp_path, numbers, SPACE)
    assert list(plan.space.describe()) == ["policy.optimizer_lr"]
    assert [n for n in plan.notices if "no cameras" in n and "policy.optimizer_lr_backbone" in n]
    plan.save()
    assert list(plan_of(tmp_path, numbers, SPACE, resume=True).space.describe()) == ["policy.optimizer_lr"]
    file = tmp_path / "run" / "search.json"
    older = json.loads(file.read_text())
    del older["left_out"]
    file.write_text(json.dumps(older))
    again = plan_of(tmp_path, numbers, SPACE, resume=True)
    assert set(again.space.describe()) == set(SPACE["search"])


def test_what_something_else_follows_is_searched(numbers, tmp_path):
    search = {**SPACE["search"], "policy.optimizer_lr": {"same_as": "policy.optimizer_lr_backbone"}}
    content = {"policy": "act", "search": dict(reversed(search.items()))}
    assert "policy.optimizer_lr_backbone" in plan_of(tmp_path, numbers, content).space.describe()
    content["search"].pop("policy.optimizer_lr")
    with pytest.raises(
        InputError, match="space.yaml:2: nothing of it has an effect: the data set has no cameras"
    ):
        plan_of(tmp_path, numbers, content)
