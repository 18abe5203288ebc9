"""The training loop keeps its promises: exact resumes, honest failures, the right checkpoints and records."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lerobot.datasets import EpisodeAwareSampler, LeRobotDataset
from PIL import Image
from safetensors import safe_open

from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import RunError
from ray_jobs.config.events import Event, Log, Saved, Step, Validated
from ray_jobs.storage.records import read_json, read_metrics
from ray_jobs.training import loop
from ray_jobs.training.checkpoint import checkpoint_steps, fault, last_checkpoint
from support.commands import tiny_act, tiny_diffusion, train_in_process
from support.data_sets import make
from support.runs import assert_same_checkpoint, wandb_runs

LENGTHS = [23, 17, 9, 20]
TIMES = ("train/step_s", "train/data_s", "train/samples_per_s")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Path:
    """Four episodes without cameras: a step takes milliseconds."""
    return make(tmp_path_factory.mktemp("loop") / "numbers", LENGTHS, seed=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two short episodes with a camera."""
    return make(tmp_path_factory.mktemp("loop") / "pictures", [9, 5], cameras=1, seed=3)


def train(flags: list[str], report=lambda event: None, should_stop=lambda: "") -> dict:
    recipe = resolve(flags)
    recipe = preflight.check(recipe)
    return loop.train(recipe, device="cpu", report=report, should_stop=should_stop)


def timeless(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in TIMES}


# ---------------------------------------------------------------------- resume


def killed_after(step: int, run: Path, copy: Path) -> Path:
    """A copy of a run as a kill some time after the checkpoint of `step` would have left it: no later
    checkpoint, a dangling link, later lines in metrics.jsonl and half a line at its end."""
    shutil.copytree(run, copy, symlinks=True)
    for later, path in checkpoint_steps(copy).items():
        if later > step:
            shutil.rmtree(path)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')
    return copy


RESUMES = {
    # ACT with VAE and dropout; 26 frames are 7 batches, the last one smaller.
    "in the middle of an epoch": ("act", 12, 6, ()),
    "at the boundary of an epoch": ("act", 10, 7, ("--num_workers=0",)),
    "loader without persistent workers": ("act", 10, 4, ("--persistent_workers=false",)),
    "two accumulated batches": ("act", 12, 6, ("--ray.grad_accumulation=2",)),
    "averaged weights and validation": (
        "act",
        12,
        6,
        ("--ray.ema=true", "--data.eval_episodes=[0]", "--eval_steps=3", "--policy.optimizer_lr=0.01"),
    ),
    "diffusion and its schedule": (
        "diffusion",
        6,
        3,
        ("--policy.scheduler_warmup_steps=2", "--policy.pretrained_backbone_weights=null"),
    ),
    "bf16 and channels_last": ("act", 6, 3, ("--policy.use_amp=true", "--dataset.episodes=[0,1]")),
}


SLOW = pytest.param("bf16 and channels_last", marks=pytest.mark.slow)  # 22 s on a CPU without bfloat16


@pytest.mark.parametrize("case", [*(case for case in RESUMES if case not in SLOW.values), SLOW])
def test_resume_is_bitwise(numbers, pictures, tmp_path, case):
    """A run that was killed and goes on ends in the same checkpoint, to the last byte, as one that was not."""
    policy, steps, at, more = RESUMES[case]
    root = pictures if "bf16" in case else numbers
    make_flags = tiny_act if policy == "act" else tiny_diffusion

    def flags(name: str) -> list[str]:
        run = ("--dataset.episodes=[1,2]", f"--steps={steps}", f"--save_freq={at}", *more)
        return make_flags(root, tmp_path / name, *run)

    whole = train(flags("whole"))
    killed = killed_after(at, tmp_path / "whole", tmp_path / "killed")
    resumed = train([*flags("killed"), "--resume=true"])
    assert resumed["start_step"] == at and resumed["step"] == steps
    assert whole["precision"] == ("bf16" if "bf16" in case else "no")
    assert_same_checkpoint(Path(whole["checkpoint"]), Path(resumed["checkpoint"]))

    records = read_metrics(killed)
    assert list(map(timeless, records)) == list(map(timeless, read_metrics(tmp_path / "whole")))
    logged = [record["step"] for record in records if "train/loss" in record]
    assert logged == list(range(1, steps + 1)), "every step once"
    assert resumed["best"] == whole["best"]
    assert timeless(resumed["last"]) == timeless(whole["last"])


def test_stop_saves_where_it_is_and_goes_on_exactly(numbers, tmp_path):
    """Asked to stop during step 5 of 9, a run saves step 5, and going on ends as if nobody had asked."""

    def flags(name: str) -> list[str]:
        return tiny_act(numbers, tmp_path / name, "--dataset.episodes=[1,2]", "--steps=9")

    seen: list[Event] = []
    steps = lambda: sum(isinstance(event, Step) for event in seen)  # noqa: E731
    stopped = train(
        flags("stopped"), report=seen.append, should_stop=lambda: "interrupted" if steps() == 5 else ""
    )
    assert (stopped["status"], stopped["step"]) == ("interrupted", 5)
    assert list(checkpoint_steps(tmp_path / "stopped")) == [5]
    *done, seconds = (tmp_path / "stopped" / ".progress").read_text().split()
    assert done == ["5", "0", "0"] and 0 < float(seconds) <= stopped["wall_s"] + 0.1
    (tmp_path / "stopped" / ".progress").write_text(" ".join([*done, "1000.0"]))
    resumed = train([*flags("stopped"), "--resume=true"])
    assert resumed["wall_s"] > 1000, "the time of all sessions"
    whole = train(flags("whole"))
    assert_same_checkpoint(Path(whole["checkpoint"]), Path(resumed["checkpoint"]))


# ---------------------------------------------------------------------- gradient accumulation


def test_accumulated_gradients_equal_those_of_the_whole_batch(numbers, tmp_path):
    """Two batches of 4 train like one of 8. A chunk of 1 is never padded: all samples weigh the same."""
    same = ("--policy.chunk_size=1", "--policy.n_action_steps=1", "--policy.dropout=0")

    def losses(name: str, *flags: str) -> np.ndarray:
        more = ("--policy.use_vae=false", "--policy.optimizer_lr=1e-3", "--save_checkpoint=false")
        _, events = train_in_process(tiny_act(numbers, tmp_path / name, "--steps=6", *same, *more, *flags))
        return np.array(
            [(e.values["train/loss"], e.values["train/grad_norm"]) for e in events if isinstance(e, Log)]
        )

    whole = losses("whole", "--batch_size=8")
    accumulated = losses("parts", "--batch_size=4", "--ray.grad_accumulation=2")
    np.testing.assert_allclose(accumulated[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(accumulated, whole, rtol=1e-3)
    assert whole[-1, 0] < whole[0, 0], "nothing was learnt"
    assert abs(losses("half", "--batch_size=4")[0, 0] / whole[0, 0] - 1) > 1e-3


# ---------------------------------------------------------------------- NaN


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (("--save_freq=1",), 5),
        (("--save_freq=2", "--log_freq=4"), 4),
        (("--save_freq=4", "--log_freq=0"), 4),
        (("--save_freq=3", "--log_freq=0", "--data.eval_episodes=[0]", "--eval_steps=7"), 3),
    ],
    ids=str,
)
def test_nan_ends_the_run_and_spares_the_checkpoints(numbers, tmp_path, flags, kept):
    """One NaN in the data, met in step 6: the error names that step whenever it is noticed, nothing
    behind it is saved, and what was saved before is whole."""
    root = tmp_path / "data"
    shutil.copytree(numbers, root)
    run = ("--dataset.episodes=[1,2,3]", "--steps=20", *flags)
    starts = np.cumsum([0, *LENGTHS])
    order = list(EpisodeAwareSampler(starts[:-1], starts[1:], [1, 2, 3], shuffle=True, seed=1000))
    (file,) = root.glob("data/*/*.parquet")
    table = pd.read_parquet(file)
    table.loc[order[4 * 5], "observation.environment_state"][0] = np.nan  # first frame of the sixth batch
    table.to_parquet(file)

    with pytest.raises(RunError, match=r"^step 6: the loss is nan"):
        train(tiny_act(root, tmp_path / "run", *run))
    assert max(checkpoint_steps(tmp_path / "run")) == kept
    assert all(fault(path) is None for path in checkpoint_steps(tmp_path / "run").values())
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["status"] == "failed" and summary["error"].startswith("step 6")
    assert Path(summary["checkpoint"]).name == f"{kept:06d}"
    assert all(record["step"] < 6 for record in read_metrics(tmp_path / "run"))


def test_exploding_learning_rate_is_reported(numbers, tmp_path):
    """A learning rate of 1e30 makes the weights useless in one step; the second one says so."""
    flags = ("--steps=9", "--policy.optimizer_lr=1e30")
    with pytest.raises(RunError, match=r"^step 2: .*A lower learning rate"):
        train(tiny_act(numbers, tmp_path / "run", *flags))
    assert checkpoint_steps(tmp_path / "run") == {}


# ---------------------------------------------------------------------- early stopping, retention


def test_early_stopping(numbers, tmp_path):
    """With weights that never move, the first validation stays the best: two more, and the run ends."""
    frozen = ("--policy.optimizer_lr=0", "--policy.optimizer_lr_backbone=0")
    watched = ("--data.eval_episodes=[0]", "--eval_steps=2", "--ray.early_stopping=2")
    summary = train(tiny_act(numbers, tmp_path / "run", "--steps=20", *frozen, *watched))
    assert (summary["status"], summary["step"], summary["best"]["step"]) == ("stopped early", 6, 2)
    assert sorted(checkpoint_steps(tmp_path / "run")) == [2, 6]


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "validated"), [(1, 1, True), (2, 1, True), (1, 2, True), (1, 1, False)]
)
def test_retention(numbers, tmp_path, keep_last, keep_best, validated):
    """The newest and the best checkpoints stay, the links lead to them, and never is there none."""
    out = tmp_path / "run"
    metric = {}

    def check(event: Event) -> None:
        if isinstance(event, Validated):
            metric[event.step] = event.values["val/action_error"]
        if isinstance(event, Saved):
            step = event.step
            newest = set(range(max(1, step - keep_last + 1), step + 1))
            best = sorted(metric, key=metric.get)[:keep_best]
            assert set(checkpoint_steps(out)) == newest | set(best)
            assert (out / "checkpoints/last").resolve() == last_checkpoint(out).resolve()
            assert last_checkpoint(out).name == f"{step:06d}"
            assert all(fault(path) is None for path in checkpoint_steps(out).values())
            assert (out / "checkpoints/best").exists() == validated
            if validated:
                assert (out / "checkpoints/best").resolve().name == f"{best[0]:06d}"

    flags = ["--steps=7", "--save_freq=1", "--policy.optimizer_lr=0.05"]
    flags += ["--data.eval_episodes=[0]", "--eval_steps=1"] * validated
    flags += [f"--checkpoint.keep_last={keep_last}", f"--checkpoint.keep_best={keep_best}"]
    train(tiny_act(numbers, out, *flags), report=check)
    assert len(metric) == 7 * validated
    if validated:
        assert any(b > a for a, b in pairwise(metric.values())), "the last one was always the best"


def test_best_checkpoint_is_saved_between_save_steps(numbers, tmp_path):
    """A validation better than all before is kept although no checkpoint was due."""
    out = tmp_path / "run"
    watched = ("--data.eval_episodes=[0]", "--eval_steps=1", "--checkpoint.keep_last=1")
    summary = train(tiny_act(numbers, out, "--steps=5", "--policy.optimizer_lr=0.05", *watched))
    assert set(checkpoint_steps(out)) == {summary["best"]["step"], 5}
    assert summary["best"]["step"] < 5


# ---------------------------------------------------------------------- records


def test_summary(numbers, tmp_path):
    """summary.json says what ran, where, how long, the last and the best values: what the files say."""
    out = tmp_path / "run"
    watched = ("--data.eval_episodes=[0,2]", "--eval_steps=2", "--policy.optimizer_lr=0.05")
    summary, events = train_in_process(tiny_act(numbers, out, "--steps=5", "--log_freq=2", *watched))
    assert read_json(out / "summary.json") == json.loads(json.dumps(summary))
    assert (
        summary
        | {
            "status": "finished",
            "policy": "act",
            "dataset": "local/parts",
            "episodes": 2,
            "frames": LENGTHS[1] + LENGTHS[3],
            "eval_episodes": 2,
            "device": "cpu",
            "num_workers": 1,
            "global_batch_size": 4,
            "start_step": 0,
            "step": 5,
            "steps": 5,
            "output_dir": str(out),
            "checkpoint": str(out / "checkpoints" / "000005"),
        }
        == summary
    )
    with safe_open(out / "checkpoints/last/pretrained_model/model.safetensors", "np") as weights:
        buffers = {"model.vae_encoder_pos_enc"}
        sizes = [weights.get_tensor(k).size for k in weights.keys() if k not in buffers]  # noqa: SIM118
    assert summary["parameters"] == sum(sizes)

    records = read_metrics(out)
    assert [r["step"] for r in records if "train/loss" in r] == [2, 4, 5]
    evals = {r["step"]: r["val/action_error"] for r in records if "val/action_error" in r}
    assert list(evals) == [2, 4, 5]
    assert summary["best"] == {"step": min(evals, key=evals.get), "val/action_error": min(evals.values())}
    last = {k: v for r in records if r["step"] == 5 for k, v in r.items() if k != "step"}
    assert summary["last"] == last
    assert 0 < summary["wall_s"] < 600


def test_wandb(pictures, tmp_path):
    """W&B gets every logged step, the config, the summary and what the cameras of the first batch saw;
    a resumed run keeps its id."""
    out = tmp_path / "run"
    flags = tiny_act(
        pictures,
        out,
        "--wandb.enable=true",
        "--wandb.mode=offline",
        "--data.eval_episodes=[1]",
        "--eval_steps=2",
    )
    asked = iter([False, True])
    interrupted = train([*flags, "--steps=4"], should_stop=lambda: "interrupted" if next(asked) else "")
    finished = train([*flags, "--steps=4", "--resume=true"])
    first, second = wandb_runs(out)

    assert first["id"] == second["id"] == interrupted["wandb_run_id"] == finished["wandb_run_id"]
    records = read_metrics(out)
    for run, steps, summary in ((first, (1, 2), interrupted), (second, (3, 4), finished)):
        for record in (r for r in records if r["step"] in steps):
            told = {k: v for h in run["history"] if h["_step"] == record["step"] for k, v in h.items()}
            for key, value in record.items():
                assert key in ("step", "val/action_error_raw") or told[key] == value
        assert {h["_step"] for h in run["history"]} - {0} == set(steps)
        assert run["config"]["policy"]["dim_model"] == 32 and run["config"]["steps"] == 4
        for key in ("status", "step", "best", "frames", "checkpoint"):
            assert run["summary"][key] == summary[key]
        assert run["exit"] == 0

    assert "cameras/observation.images.top" in "".join(first["history"][0])
    assert not any("cameras" in key for h in second["history"] for key in h), "not the first batch"
    dataset = LeRobotDataset("local/made", root=pictures, video_backend="pyav", return_uint8=True)
    order = list(EpisodeAwareSampler([0], [9], shuffle=True, seed=1000))
    shown = first["history"][0]["cameras/observation.images.top/filenames"]
    assert len(shown) == 4
    for file, row in zip(shown, order, strict=False):
        pixels = np.asarray(Image.open(first["files"] / file)).astype(int)
        frame = dataset[row]["observation.images.top"].permute(1, 2, 0).numpy().astype(int)
        assert abs(pixels - frame).max() <= 1
