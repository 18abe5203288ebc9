"""All five policies on the real recording, in tiny: each cell of docs/policies.md's table; and the three large ones beside
stock `lerobot-train`, step by step."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from safetensors.torch import load_file, load_model

from ray_jobs.policies import assets
from ray_jobs.storage.records import read_json, read_metrics
from support.commands import DEVICE, job, train_in_process
from support.parity import LEROBOT_TRAIN, OUR_LOOP, assert_same_training, run_script
from support.run_alone.acting import act
from support.vla import ALL, LARGE, acting, lerobots_environment, record_frames, tiny

WEIGHTS = "pretrained_model/model.safetensors"


@pytest.fixture(scope="module")
def flags(real, models, tmp_path_factory):
    """A command of four steps on the real recording, with a checkpoint of the second."""
    folder = tmp_path_factory.mktemp("policies")

    def make(policy: str, name: str, *more: str) -> list[str]:
        short = [
            "--steps=4",
            "--save_freq=2",
            "--batch_size=2",
            "--num_workers=0",
            "--dataset.episodes=[0,1,2]",
        ]
        return tiny(policy, real, folder / name / policy, models, *short, *more)

    make.folder = folder
    yield make
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def scratch(flags) -> dict[str, Path]:
    """Every policy trained from scratch, and validated at the end."""
    held_out = ["--data.eval_episodes=[2]", "--eval_steps=4", "--max_eval_samples=4"]
    for policy in ALL:
        train_in_process(flags(policy, "scratch", *held_out))
    return {policy: flags.folder / "scratch" / policy for policy in ALL}


@pytest.mark.parametrize("policy", ALL)
def test_from_scratch_with_action_error(scratch, policy):
    records = read_metrics(scratch[policy])
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3, 4]
    assert 0 < records[-1]["val/action_error"] < 10 and len(records[-1]["val/action_error_raw"]) == 26


@pytest.mark.parametrize("policy", ALL)
def test_resume(scratch, flags, policy):
    """From the checkpoint of step 2 to the same weights, bit for bit."""
    if DEVICE != "cpu" and policy in ("act", "diffusion"):
        pytest.skip("a ResNet's gradients differ from run to run on a GPU")
    run = flags.folder / "resumed" / policy
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(scratch[policy] / "checkpoints/000002", run / "checkpoints/000002")
    shutil.copy(scratch[policy] / "options.json", run) if (
        scratch[policy] / "options.json"
    ).exists() else None
    held_out = ["--data.eval_episodes=[2]", "--eval_steps=4", "--max_eval_samples=4"]
    train_in_process(flags(policy, "resumed", *held_out, "--resume=true"))
    a, b = (folder / "checkpoints/000004" / WEIGHTS for folder in (run, scratch[policy]))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("policy", ALL)
def test_from_pretrained_under_its_hub_name(scratch, flags, models, policy, no_network):
    """`--policy.path=some_org/tiny_pi0` with its weights in the assets folder: they are what training starts from,
    and no connection is tried."""
    start = models / "some_org" / f"tiny_{policy}"
    shutil.copytree(scratch[policy] / "checkpoints/000004/pretrained_model", start)
    command = flags(policy, "pretrained", "--steps=2", "--policy.push_to_hub=false")
    command = [f for f in command if not f.startswith("--policy.") or "push_to_hub" in f]
    train_in_process([*command, f"--policy.path=some_org/tiny_{policy}"])
    before, after = (
        load_file(start / "model.safetensors"),
        load_file(flags.folder / "pretrained" / policy / "checkpoints/000002" / WEIGHTS),
    )
    assert before.keys() == after.keys()
    weights = [
        key for key in before if "running_" not in key and "num_batches" not in key
    ]  # but batch norm's
    changed = [(before[key].float() - after[key].float()).abs().max().item() for key in weights]
    assert 0 < max(changed) < 1e-3  # a step of Adam moves a weight by its learning rate
    assert no_network == []


@pytest.fixture(scope="module")
def actions(scratch, real, models, flags) -> dict[str, np.ndarray]:
    """What stock LeRobot does with every policy's checkpoint, in a process of its own."""
    checkpoints = {policy: run / "checkpoints/last/pretrained_model" for policy, run in scratch.items()}
    frames = record_frames(real, flags.folder / "frames.npz", 2)
    return acting(sys.executable, frames, checkpoints, models, flags.folder / "stock")


@pytest.mark.parametrize("policy", ALL)
def test_opens_in_stock_lerobot(actions, scratch, models, flags, policy):
    """`from_pretrained` and the saved processors give the actions of the trained weights, read tensor by tensor: a
    loader that goes on with random ones (pi0's does) would give others."""

    def exactly(policy_class, config, checkpoint):
        bare = policy_class(config)
        load_model(bare, f"{checkpoint}/model.safetensors", strict=True)
        return bare

    checkpoint = scratch[policy] / "checkpoints/last/pretrained_model"
    recorded = dict(np.load(flags.folder / "frames.npz"))
    task = str(recorded.pop("task"))
    with assets.mounted(models, PreTrainedConfig.from_pretrained(checkpoint), weights=True):
        ours = act(str(checkpoint), recorded, task, load=exactly)
    assert ours.shape[0] == 2 and ours.shape[2] == 26 and ours.std() > 0
    np.testing.assert_allclose(actions[policy], ours, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- two workers


# On a node where there is never room for two policies at a time.
IN_TURNS = """
from types import SimpleNamespace
from ray_jobs.training import parallel
parallel.psutil = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=1))
"""


LORA = ["--peft.method_type=LORA", "--peft.r=4"]
LESS = {  # of a pretrained policy is trained, or in less precision
    "frozen_bf16": ("pi0", ["--policy.dtype=bfloat16", "--policy.freeze_vision_encoder=true"]),
    "lora": ("pi0", LORA),
    "lora_bf16": ("pi0", ["--policy.dtype=bfloat16", *LORA]),
    "amp": ("act", ["--policy.use_amp=true"]),
    "amp_diffusion": ("diffusion", ["--policy.use_amp=true"]),
}


def train_two(flags, models, runs: list[list[str]]) -> Path:
    """Each run on two workers; returns the folder that they are in."""
    env = lerobots_environment(models)
    run_script(IN_TURNS + OUR_LOOP, flags.folder, runs, processes=2, PYTHONPATH=env["PYTHONPATH"])
    return flags.folder


@pytest.fixture(scope="module")
def two(flags, models) -> Path:
    """Every policy on two workers, with a copy on each and with a share on each."""
    runs = [flags(policy, how, f"--ray.parallelism={how}") for policy in ALL for how in ("ddp", "fsdp")]
    return train_two(flags, models, runs)


@pytest.fixture(scope="module")
def two_with_less(flags, models, scratch) -> Path:
    """Policies of which less is trained, or in less precision, likewise."""
    runs = []
    for name, (policy, more) in LESS.items():
        start = f"--policy.pretrained_path={scratch[policy] / 'checkpoints/last/pretrained_model'}"
        short = [start, "--steps=2", *more]
        runs += [
            flags(policy, f"{how}_{name}", f"--ray.parallelism={how}", *short) for how in ("ddp", "fsdp")
        ]
    return train_two(flags, models, runs)


@pytest.fixture(scope="module")
def mixed(flags, models) -> Path:
    """Two workers with sharding in their second half alone."""
    runs = [
        flags(policy, name, *precision, *more)
        for policy, name, precision in (
            ("act", "mixed", []),
            ("pi0", "mixed", []),
            ("pi0", "mixed_bf16", ["--policy.dtype=bfloat16"]),
        )
        for more in (["--steps=2"], ["--ray.parallelism=fsdp", "--resume=true"])
    ]
    return train_two(flags, models, runs)


@pytest.mark.parametrize("policy", ALL)
def test_two_workers(two, policy):
    records = read_metrics(two / "ddp" / policy)
    assert read_json(two / "ddp" / policy / "summary.json")["num_workers"] == 2
    assert [record["step"] for record in records] == [1, 2, 3, 4]


@pytest.mark.slow
def test_sharded_workers_go_on_with_what_copies_have_trained_in_bfloat16(two, mixed):
    """Adam's moments are bfloat16 in the checkpoint, and float32 from then on."""
    losses = [record["train/loss"] for record in read_metrics(mixed / "mixed_bf16/pi0")]
    sharded = [record["train/loss"] for record in read_metrics(two / "fsdp/pi0")]
    assert losses == pytest.approx(sharded, rel=3e-2)


def assert_same_weights(a: Path, b: Path, rel: float) -> None:
    mine, theirs = (
        load_file(a / "checkpoints/000004" / WEIGHTS),
        load_file(b / "checkpoints/000004" / WEIGHTS),
    )
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert mine[key].dtype == theirs[key].dtype
        np.testing.assert_allclose(mine[key].float(), theirs[key].float(), rtol=rel, atol=rel, err_msg=key)


@pytest.mark.parametrize("policy", ALL)
def test_two_sharded_workers_equal_two_with_copies(two, policy):
    """Losses and weights; and the files of a checkpoint are the same."""
    ddp, fsdp = two / "ddp" / policy, two / "fsdp" / policy
    for mine, theirs in zip(read_metrics(fsdp), read_metrics(ddp), strict=True):
        for key in ("train/loss", "train/grad_norm", "train/lr"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3)
    assert_same_weights(fsdp, ddp, 1e-3)
    files = [
        {str(path.relative_to(run)) for path in run.rglob("*") if "tfevents" not in path.name}  # by the hour
        for run in (ddp, fsdp)
    ]
    assert files[0] == files[1]
    for file in ("training_state/optimizer_state.safetensors", "training_state/rng_state.safetensors"):
        shapes = [
            {key: value.shape for key, value in load_file(run / "checkpoints/000004" / file).items()}
            for run in (ddp, fsdp)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", LESS)
def test_sharded_workers_train_less_or_in_less_precision(two_with_less, scratch, name):
    """The losses, and the shapes of what is saved, are those of two workers with copies."""
    policy, more = LESS[name]
    ddp, fsdp = (two_with_less / f"{how}_{name}" / policy for how in ("ddp", "fsdp"))
    rel = 1e-3 if more == LORA else 1e-2
    for mine, theirs in zip(read_metrics(fsdp), read_metrics(ddp), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=rel)
    file = WEIGHTS if "lora" not in name else "pretrained_model/adapter_model.safetensors"
    mine, theirs = (load_file(run / "checkpoints/000002" / file) for run in (fsdp, ddp))
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    if "frozen" in name:
        before = load_file(scratch[policy] / "checkpoints/last" / WEIGHTS)
        changed = {key for key in mine if not torch.equal(mine[key], before[key].to(mine[key].dtype))}
        assert changed and not [key for key in changed if "vision_tower" in key]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["act", "pi0"])
def test_sharding_may_begin_in_the_middle(two, mixed, policy):
    assert_same_weights(mixed / "mixed" / policy, two / "ddp" / policy, 1e-3)


@pytest.mark.parametrize("policy", ["act", "smolvla"])
def test_sharded_run_goes_on_with_one_worker(two, flags, policy):
    """With twice the batch, the one worker sees what the two together would have seen."""
    run = two / "alone" / policy
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(two / "fsdp" / policy / "checkpoints/000002", run / "checkpoints/000002")
    train_in_process(flags(policy, "alone", "--resume=true", "--ray.grad_accumulation=2"))
    assert read_json(run / "summary.json")["start_step"] == 2
    (last,) = (record for record in read_metrics(run) if record["step"] == 4)
    assert last["train/lr"] == read_metrics(two / "fsdp" / policy)[-1]["train/lr"]


@pytest.mark.slow
def test_sharded_on_ray(two, flags):
    """`python -m ray_jobs.train --ray.num_workers=2 --ray.parallelism=fsdp` trains as the bare loop does."""
    command = flags("pi0", "ray", "--ray.num_workers=2", "--ray.parallelism=fsdp", "--ray.address=local")
    result = job("ray_jobs.train", *command)
    assert result.returncode == 0 and result.stderr == "", result.stderr[-3000:]
    assert "memory: about" in result.stdout
    for mine, theirs in zip(read_metrics(two / "ray/pi0"), read_metrics(two / "fsdp/pi0"), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)


# ---------------------------------------------------------------------- stock lerobot-train


@pytest.fixture(scope="module")
def lerobots(flags, models) -> dict[str, list[dict]]:
    """What `lerobot-train` logs for the large policies, 10 steps of each."""
    more = ["--steps=10", "--save_checkpoint=false"]
    runs = [[f for f in flags(p, "lerobot", *more) if not f.startswith("--assets")] for p in LARGE]
    logged = run_script(LEROBOT_TRAIN, flags.folder, runs, **lerobots_environment(models))
    return dict(zip(LARGE, logged, strict=True))


@pytest.mark.parametrize("policy", LARGE)
def test_every_step_equals_lerobots(lerobots, flags, policy):
    train_in_process(flags(policy, "parity", "--steps=10", "--save_checkpoint=false"))
    assert len(lerobots[policy]) == 10
    assert_same_training(read_metrics(flags.folder / "parity" / policy), lerobots[policy], rel=1e-4)
