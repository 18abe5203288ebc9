"""Going on from a checkpoint with other flags: what has an effect is used and written down, what has none is refused; no
sample is read twice; what becomes of the learning rate is said."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError
from ray_jobs.storage.records import read_json, read_metrics
from ray_jobs.training import loop, step
from ray_jobs.training.tracking import save_options
from support.commands import tiny_act, tiny_diffusion, train_in_process
from support.data_sets import make

LENGTHS = [23, 17, 9, 20]
CONFIG = "pretrained_model/train_config.json"


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Path:
    """Four episodes without cameras: a step takes milliseconds."""
    return make(tmp_path_factory.mktemp("resume") / "numbers", LENGTHS, seed=2)


@pytest.fixture(scope="module")
def begun(numbers, tmp_path_factory):
    """A run of two steps, ACT's or Diffusion's, and the flags that it was begun with; the caller's to go on with."""
    folder = tmp_path_factory.mktemp("begun")
    kinds = {
        "act": tiny_act(numbers, folder / "act", "--policy.optimizer_lr=1e-4", "--steps=2"),
        "idle": tiny_act(numbers, folder / "idle", "--steps=2", "--optimizer.type=sgd", "--optimizer.lr=0.5",
                         "--optimizer.grad_clip_norm=0.001"),
        "diffusion": tiny_diffusion(numbers, folder / "diffusion", "--policy.scheduler_warmup_steps=1", "--steps=4"),
    }  # fmt: skip
    made = {}

    def copy_of(kind: str, to: Path) -> list[str]:
        if kind not in made:
            recipe = resolve(kinds[kind])
            recipe = preflight.check(recipe)
            save_options(recipe)
            loop.train(recipe, device="cpu")
            made[kind] = folder / kind
        shutil.copytree(made[kind], to, symlinks=True)
        return [f for f in kinds[kind] if not f.startswith(("--output_dir", "--steps"))] + [
            f"--output_dir={to}"
        ]

    return copy_of


OVERRULED = {
    "the optimizer of the policy": ("act", "--policy.optimizer_lr=1e-3 --policy.optimizer_weight_decay=0.5", ("0.0001",)),
    "the backbone's rate": ("act", "--policy.optimizer_lr_backbone=1e-3", ("1e-05",)),
    "LeRobot's optimizer": ("act", "--optimizer.lr=0.5 --optimizer.betas=[0.5,0.6]", ("0.0001", "0.9")),
    "its kind": ("act", "--optimizer.type=sgd", ("adamw",)),
    "who decides of it": ("act", "--use_policy_training_preset=false", ("True",)),
    "adapters": ("act", "--peft.r=4", ("None",)),
    "random numbers": ("act", "--seed=7", ("1000",)),
    "statistics": ("act", "--dataset.use_imagenet_stats=false", ("True",)),
    "torchvision's weights": ("act", "--policy.pretrained_backbone_weights=ResNet18_Weights.IMAGENET1K_V1", ("None",)),
    "the policy it came from": ("act", "--policy.path=lerobot/act_aloha_sim", ("None",)),
    "the schedule of the policy": ("diffusion", "--policy.scheduler_warmup_steps=3 --policy.scheduler_name=linear", ("1", "cosine")),
    "betas": ("diffusion", "--policy.optimizer_betas=[0.5,0.6]", ("0.95",)),
    "the kind of schedule": ("act", "--scheduler.type=diffuser", ("None",)),
}  # fmt: skip


@pytest.mark.parametrize("case", OVERRULED)
def test_what_a_checkpoint_overrules_is_refused(begun, tmp_path, case):
    """All of it at once, with the checkpoint's values; the line is two at most."""
    kind, flags, values = OVERRULED[case]
    same = begun(kind, tmp_path / "run")
    with pytest.raises(InputError) as refused:
        resolve([*same, "--steps=6", "--resume=true", *flags.split()])
    message = str(refused.value)
    assert all(flag in message for flag in flags.split()), message
    assert all(value in message for value in values) and len(message.splitlines()) == 2, message
    assert "without effect" in message


def test_the_same_command_goes_on(begun, tmp_path):
    """Also where it names an optimizer that has had no effect from the beginning: it does not begin to have one."""
    for kind in ("act", "idle"):
        same = begun(kind, tmp_path / kind)
        train_in_process([*same, "--steps=3", "--resume=true"])
        first, second = (read_json(tmp_path / kind / f"checkpoints/{n:06d}" / CONFIG) for n in (2, 3))
        assert first["optimizer"] == second["optimizer"] and second["optimizer"]["type"] == "adamw"
        assert second["optimizer"]["grad_clip_norm"] == 10.0


def test_what_has_an_effect_is_used(begun, tmp_path):
    """Clipping is read in every step. It is written down, and used."""
    same = begun("act", tmp_path / "run")
    used = []
    recipe = resolve([*same, "--steps=3", "--resume=true", "--optimizer.grad_clip_norm=0.125"])
    recipe = preflight.check(recipe)
    clip = step.clip_gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "clip_gradients", lambda p, norm, a: used.append(norm) or clip(p, norm, a))
        loop.train(recipe, device="cpu")
    saved = read_json(tmp_path / "run/checkpoints/000003" / CONFIG)
    assert saved["optimizer"]["grad_clip_norm"] == 0.125 and used == [0.125]


def test_the_advice_of_a_refusal(begun, tmp_path):
    """Another run from the checkpoint's weights, with the flag that was refused, is what the refusal names."""
    same = begun("act", tmp_path / "first run")
    wanted = "--policy.optimizer_lr=1e-3"
    with pytest.raises(InputError) as refused:
        resolve([*same, "--steps=6", "--resume=true", wanted])
    (path,) = (w for w in shlex.split(str(refused.value)) if w.startswith("--policy.path="))
    flags = [f for f in same if not f.startswith(("--output_dir", "--policy.type"))]
    train_in_process([*flags, "--steps=1", path, wanted, f"--output_dir={tmp_path / 'another'}"])
    groups = read_json(
        tmp_path / "another/checkpoints/000001/training_state/optimizer_param_groups.json", list
    )
    assert groups[0]["lr"] == 1e-3


# ---------------------------------------------------------------------- position in the data


def indices_read(flags: list[str]) -> list[int]:
    """Train, and tell which frames were trained on."""
    recipe = resolve(flags)
    recipe = preflight.check(recipe)
    save_options(recipe)
    read: list[int] = []
    to_device = step.to_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            step,
            "to_device",
            lambda batch, *how: read.extend(batch["index"].tolist()) or to_device(batch, *how),
        )
        loop.train(recipe, device="cpu")
    return read


CHANGES = {
    "batch size": (["--batch_size=4"], ["--batch_size=2"], ["--batch_size=2"]),
    "accumulation": (["--batch_size=4"], ["--batch_size=2", "--ray.grad_accumulation=3"], []),
    "workers": (
        ["--batch_size=2", "--ray.num_workers=1:3"],
        ["--ray.num_workers=1"],
        ["--ray.num_workers=1:4"],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_no_sample_is_read_twice(numbers, tmp_path, case):
    """Three times three steps, with other batches each time: no frame of the 69 comes twice, and none is left out of the
    order of an undisturbed run. A run that keeps its settings leaves LeRobot's own counter alone."""
    run, read = tmp_path / "run", []
    for number, changed in enumerate(CHANGES[case]):
        common = [f for f in tiny_act(numbers, run) if not f.startswith("--batch_size")]
        resumed = ["--resume=true"] if number else []
        read += indices_read([*common, *changed, f"--steps={3 * number + 3}", *resumed])
    assert len(read) == len(set(read)), "read twice"
    undisturbed = indices_read(
        tiny_act(
            numbers, tmp_path / "whole", "--batch_size=1", f"--steps={len(read)}", "--save_checkpoint=false"
        )
    )
    assert sorted(read) == sorted(undisturbed)
    counters = [read_json(run / f"checkpoints/{n:06d}/training_state/training_step.json") for n in (3, 9)]
    assert set(counters[0]) == {"step", "num_processes", "batch_size"}
    assert counters[1]["sampler"] == {"epoch": 0, "start_index": len(read)}
    assert read_json(run / "summary.json")["epochs"] == pytest.approx(len(read) / sum(LENGTHS), abs=1e-3)


def test_a_position_that_makes_no_sense(begun, tmp_path):
    same = begun("act", tmp_path / "run")
    file = tmp_path / "run/checkpoints/000002/training_state/training_step.json"
    for nonsense in ({"epoch": -1}, {"start_index": "a"}, {"page": 3}, [3]):
        file.write_text(json.dumps({**read_json(file), "sampler": nonsense}))
        with pytest.raises(InputError, match="the checkpoint is damaged"):
            preflight.check(resolve([*same, "--steps=6", "--resume=true"]))


# ---------------------------------------------------------------------- the learning rate


def test_what_becomes_of_the_learning_rate(begun, tmp_path):
    """A cosine that has come to 0 after four steps rises again when the run is made longer, in LeRobot, too: that is said
    before it is trained, in the numbers that are then logged."""
    same = begun("diffusion", tmp_path / "run")
    ended = read_metrics(tmp_path / "run")[-1]["train/lr"]
    recipe = resolve([*same, "--steps=8", "--resume=true"])
    recipe = preflight.check(recipe)
    (told,) = (line for line in recipe.notices if line.startswith("learning rate"))
    loop.train(recipe, device="cpu")
    first, last = (read_metrics(tmp_path / "run")[n]["train/lr"] for n in (4, -1))
    assert (ended, last) == (0, 0) and first > 1e-5
    assert (
        f" {ended:.3g} where" in told and f" {first:.3g} after" in told and f" {last:.3g} at the end" in told
    )
    assert "for 8 steps instead of 4" in told


def test_nothing_is_said_of_a_rate_that_stays(begun, tmp_path):
    same = begun("act", tmp_path / "run")
    recipe = resolve([*same, "--steps=8", "--resume=true"])
    recipe = preflight.check(recipe)
    assert not any(line.startswith("learning rate") for line in recipe.notices)


def test_a_schedule_that_is_over(numbers, tmp_path):
    """The large policies' schedule ends before the run does: it stays where it is, and that is said."""
    schedule = ["--scheduler.type=cosine_decay_with_warmup", "--scheduler.num_warmup_steps=1", "--scheduler.num_decay_steps=3",
                "--scheduler.peak_lr=1e-3", "--scheduler.decay_lr=1e-4", "--optimizer.type=adamw", "--optimizer.lr=1e-3"]  # fmt: skip
    flags = tiny_act(numbers, tmp_path / "run", *schedule, "--use_policy_training_preset=false")
    train_in_process([*flags, "--steps=4"])
    recipe = resolve([*flags, "--steps=6", "--resume=true"])
    recipe = preflight.check(recipe)
    assert any(
        "0.0001 where the checkpoint left off, and no more than that" in line for line in recipe.notices
    )
    loop.train(recipe, device="cpu")
    assert [r["train/lr"] for r in read_metrics(tmp_path / "run")][-3:] == pytest.approx([1e-4] * 3)
    (tmp_path / "run/checkpoints/000006/training_state/scheduler_state.json").unlink()
    with pytest.raises(InputError, match="scheduler_state.json is missing or damaged"):
        preflight.check(resolve([*flags, "--steps=8", "--resume=true"]))
