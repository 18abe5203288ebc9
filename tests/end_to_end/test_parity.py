"""The same training as stock LeRobot: equal losses, and checkpoints that go back and forth.

Stock LeRobot runs in processes of its own, as its users run it.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies import make_pre_post_processors
from lerobot.policies.act.modeling_act import ACTPolicy
from safetensors.torch import load_file

from ray_jobs.storage.records import read_json, read_metrics
from support.commands import REAL, job, stock, tiny_act, tiny_diffusion, train_in_process
from support.data_sets import make as make_numbers
from support.parity import LEROBOT_TRAIN, OUR_LOOP, assert_same_training, run_script
from support.scores import HELD_OUT, SCORES, built, score

DATASETS = REAL.parent
STEPS, SAVED = 20, 10  # of an epoch that ends between the two


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the runs go; a checkpoint has 130 MB, so it does not outlive the tests."""
    path = tmp_path_factory.mktemp("parity")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def common(parts) -> list[str]:
    """Flags of all runs: one episode in batches of 2, the last of which holds a single frame."""
    lengths = LeRobotDatasetMetadata("local/parts", root=parts).episodes["length"]
    fitting = (e for e, n in enumerate(lengths) if 2 * SAVED < n < 2 * STEPS and n % 2 and e not in HELD_OUT)
    return [
        f"--dataset.episodes=[{next(fitting)}]",
        "--batch_size=2",
        f"--steps={STEPS}",
        f"--save_freq={SAVED}",
        "--dataloader_multiprocessing_context=fork",
    ]


# ---------------------------------------------------------------------- one worker

UNSAVED = ["--num_workers=0", "--save_checkpoint=false"]
CASES = {
    # With VAE and dropout: the random numbers must be the same, too, across the end of an epoch.
    "act": ("parts", tiny_act, ["--num_workers=0"]),
    "act, one loader process": ("parts", tiny_act, ["--num_workers=1", "--save_checkpoint=false"]),
    "act, a new loader process per epoch": (
        "parts",
        tiny_act,
        ["--num_workers=1", "--persistent_workers=false", "--save_checkpoint=false"],
    ),
    "diffusion": ("parts", tiny_diffusion, [*UNSAVED, "--policy.pretrained_backbone_weights=null"]),
    # Data sets as people have them.
    "statistics with booleans": ("booleans", tiny_act, UNSAVED),
    "no statistics of the state": ("no state", tiny_act, UNSAVED),
    "no statistics": ("no statistics", tiny_act, UNSAVED),
    "PushT, act": ("pusht_lowdim", tiny_act, UNSAVED),
    "PushT, diffusion": ("pusht_lowdim", tiny_diffusion, UNSAVED),
}


@pytest.fixture(scope="module")
def sets(parts, tmp_path_factory) -> dict[str, Path]:
    """The cases' data sets, as far as they are here: changed in their metadata, and real recordings."""

    def changed(name: str, change: Callable[[dict], object]) -> Path:
        root = shutil.copytree(numbers, numbers.with_name(name))
        stats = json.loads((root / "meta/stats.json").read_text())
        change(stats)
        (root / "meta/stats.json").write_text(json.dumps(stats))
        return root

    numbers = make_numbers(tmp_path_factory.mktemp("sets") / "numbers", [25, 31])
    booleans = {"min": [False], "max": [True], "mean": [0.02], "std": [0.1], "count": [56]}
    found = {
        "parts": parts,
        "booleans": changed("booleans", lambda stats: stats.update({"next.done": booleans})),
        "no state": changed("no state", lambda stats: stats.pop("observation.state")),
        "no statistics": changed("no statistics", dict.clear),
    }
    (found["no statistics"] / "meta/stats.json").unlink()
    return found | {path.name: path for path in DATASETS.glob("*/")}


@pytest.fixture(scope="module")
def cases(sets, common) -> dict[str, Callable[[Path], list[str]]]:
    """By name, a function from an output folder to flags."""
    return {
        name: lambda out, root=sets[of_set], make=make, more=more, of_set=of_set: make(
            root, out, *common, *([] if of_set == "parts" else ["--dataset.episodes=[1]"]), *more
        )
        for name, (of_set, make, more) in CASES.items()
        if of_set in sets
    }


@pytest.fixture(scope="module")
def lerobots(cases, folder) -> dict[str, list[dict]]:
    """What `lerobot-train` logs for every case, step by step."""
    runs = [flags(folder / f"lerobots {name}") for name, flags in cases.items()]
    return dict(zip(cases, run_script(LEROBOT_TRAIN, folder, runs), strict=True))


@pytest.fixture(scope="module")
def ours(cases, folder) -> Callable[[str], list[dict]]:
    """What our loop writes to metrics.jsonl for a case."""

    @functools.cache
    def trained(name: str) -> list[dict]:
        train_in_process(cases[name](folder / f"ours {name}"))
        return read_metrics(folder / f"ours {name}")

    return trained


@pytest.mark.parametrize("case", CASES)
def test_every_step_equals_lerobots(request, cases, case):
    """20 steps, float32, the same seed."""
    if case not in cases:
        pytest.skip(f"the recording is not there ({DATASETS / CASES[case][0]})")
    lerobots, ours = map(request.getfixturevalue, ("lerobots", "ours"))
    assert len(lerobots[case]) == STEPS
    assert_same_training(ours(case), lerobots[case], rel=1e-4)


@pytest.mark.slow
def test_a_recording_with_jitter_equals_lerobots(sets, folder):
    """Three of its frames are further from their timestamps than is allowed: LeRobot trains as long as it meets none of them,
    and the frame cache, which would meet all, must not keep this from training."""
    if "cr5_jitter" not in sets:
        pytest.skip(f"the recording is not there ({DATASETS / 'cr5_jitter'})")
    more = ["--tolerance_s=0.06", "--dataset.episodes=[1]", "--batch_size=1", "--steps=20", *UNSAVED]
    theirs, ours = (
        tiny_act(sets["cr5_jitter"], folder / f"{who} jitter", *more) for who in ("lerobots", "our")
    )
    (lerobots,) = run_script(LEROBOT_TRAIN, folder, [theirs])
    assert len(lerobots) == 20
    train_in_process([*ours, f"--data.cache={folder / 'cache'}"])
    assert_same_training(read_metrics(folder / "our jitter"), lerobots, rel=1e-4)


def test_checkpoint_is_laid_out_like_lerobots(lerobots, ours, folder):
    """The same files, the same JSON but for the folder's name, tensors of the same names and shapes; the same
    random state and statistics. (What the weights are worth, the next steps show.)"""
    ours("act")
    mine, theirs = (folder / f"{who} act" / "checkpoints" / f"{SAVED:06d}" for who in ("ours", "lerobots"))
    files = {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    assert {path.relative_to(mine) for path in mine.rglob("*") if path.is_file()} == files
    for file in files:
        if file.suffix == ".json":
            content = (mine / file).read_text().replace(str(folder / "ours"), str(folder / "lerobots"))
            assert json.loads(content) == json.loads((theirs / file).read_text()), file
        if file.suffix == ".safetensors":
            a, b = load_file(mine / file), load_file(theirs / file)
            assert {k: (v.dtype, v.shape) for k, v in a.items()} == {
                k: (v.dtype, v.shape) for k, v in b.items()
            }
            if file.name not in ("model.safetensors", "optimizer_state.safetensors"):
                assert all(torch.equal(a[key], b[key]) for key in a), file
    assert os.readlink(mine.parent / "last") == os.readlink(theirs.parent / "last")


def test_lerobots_checkpoint_goes_on_here(lerobots, folder):
    """A stock checkpoint continues in our loop, in the middle of an epoch, as if it had never left stock."""
    config = folder / "lerobots act" / "checkpoints" / f"{SAVED:06d}" / "pretrained_model/train_config.json"
    out = folder / "branched off"
    train_in_process([f"--config_path={config}", "--resume=true", f"--output_dir={out}"])
    assert_same_training(read_metrics(out), lerobots["act"][SAVED:], rel=1e-4)


# ---------------------------------------------------------------------- our checkpoints in stock LeRobot


@pytest.fixture(scope="module")
def noiseless(parts, common, folder) -> Path:
    """A run of ours without random numbers: stock LeRobot draws one more when it resumes, which shifts them."""
    out = folder / "noiseless"
    train_in_process(tiny_act(parts, out, *common, "--policy.dropout=0", "--policy.use_vae=false"))
    return out


def test_our_checkpoint_opens_and_drives_the_robot_in_lerobot(noiseless, parts, folder):
    """`from_pretrained` gives a policy that acts on a raw frame; `lerobot-eval` lets it sort parts."""
    path = noiseless / "checkpoints" / "last" / "pretrained_model"
    policy = ACTPolicy.from_pretrained(path)
    before, after = make_pre_post_processors(policy.config, pretrained_path=path)
    dataset = LeRobotDataset("local/parts", root=parts, video_backend="pyav")
    frame = {k: v for k, v in dataset[0].items() if k.startswith("observation.")}
    action = after(policy.select_action(before(frame)))
    low, high = (torch.as_tensor(dataset.meta.stats["action"][k]) for k in ("min", "max"))
    assert action.shape == (1, 3)
    assert (action > low - (high - low)).all() and (action < high + (high - low)).all()

    stock(
        "lerobot_eval",
        f"--policy.path={path}",
        "--policy.device=cpu",
        "--env.type=part_sorting",
        "--env.discover_packages_path=ray_jobs.part_sorting",
        "--env.image_size=64",
        "--eval.n_episodes=2",
        "--eval.batch_size=1",
        "--eval.use_async_envs=false",
        f"--output_dir={folder / 'eval'}",
    )
    assert read_json(folder / "eval" / "eval_info.json")["overall"]["n_episodes"] == 2


def test_our_checkpoint_goes_on_in_lerobot(noiseless, folder):
    """Steps 11 to 20 of stock `lerobot-train --resume` equal those of our undisturbed run."""
    undisturbed = read_metrics(noiseless)
    config = noiseless / "checkpoints" / f"{SAVED:06d}" / "pretrained_model" / "train_config.json"
    (theirs,) = run_script(LEROBOT_TRAIN, folder, [[f"--config_path={config}", "--resume=true"]])
    assert [record["steps"] for record in theirs] == list(range(SAVED + 1, STEPS + 1))
    assert_same_training(undisturbed[SAVED:], theirs, rel=1e-4)


# ---------------------------------------------------------------------- two workers


@pytest.fixture(scope="module")
def two_workers(parts, common) -> list[str]:
    """Flags of the runs on two workers (7 steps an epoch, the last of them filled up), but for their folder."""
    flags = tiny_act(parts, Path("nowhere"), *common, "--num_workers=0", "--steps=12", "--save_freq=0")
    return [flag for flag in flags if not flag.startswith("--output_dir")]


@pytest.fixture(scope="module")
def lerobots_two(two_workers, folder) -> list[dict]:
    run = [*two_workers, f"--output_dir={folder / 'lerobots two'}", "--save_checkpoint=false"]
    return run_script(LEROBOT_TRAIN, folder, [run], processes=2)[0]


@pytest.mark.slow  # `test_two_ray_workers_equal_lerobots` compares, `test_resume_is_bitwise` resumes
def test_two_processes_equal_lerobots_and_resume_exactly(two_workers, lerobots_two, folder):
    """The bare loop in two processes; stopped at step 6 and gone on, it ends in the same weights, bit for bit."""
    whole, stopped = ([*two_workers, f"--output_dir={folder / name}"] for name in ("whole", "stopped"))
    run_script(OUR_LOOP, folder, [whole, [*stopped, "--steps=6"], [*stopped, "--resume=true"]], processes=2)
    assert_same_training(read_metrics(folder / "whole"), lerobots_two, rel=1e-3)
    for file in ("pretrained_model/model.safetensors", "training_state/optimizer_state.safetensors"):
        a, b = (folder / name / "checkpoints/000012" / file for name in ("whole", "stopped"))
        assert a.read_bytes() == b.read_bytes()
    assert read_json(folder / "stopped" / "summary.json")["start_step"] == 6


def test_two_ray_workers_equal_lerobots(two_workers, lerobots_two, parts, folder):
    """`python -m ray_jobs.train --ray.num_workers=2`, with a validation at the end that one process alone
    confirms: the score does not depend on the number of workers."""
    out = folder / "ray"
    held_out = [f"--data.eval_episodes={HELD_OUT}", "--eval_steps=12"]
    result = job(
        "ray_jobs.train",
        *two_workers,
        f"--output_dir={out}",
        *held_out,
        "--ray.num_workers=2",
        "--ray.address=local",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_json(out / "summary.json")["num_workers"] == 2
    records = read_metrics(out)
    assert_same_training(records, lerobots_two, rel=1e-3)
    alone = score(*built(parts, checkpoint=out / "checkpoints" / "last"))
    for key in SCORES:
        assert records[-1][key] == pytest.approx(alone[key], rel=1e-5)
