"""`python -m ray_jobs.evaluate`: the training's own number, LeRobot's own success rate, and mistakes told in time."""

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import colour_follower
from ray_jobs import evaluate
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.evaluation import rollouts
from ray_jobs.evaluation.results import RESULTS
from ray_jobs.evaluation.run import _new_folder
from ray_jobs.evaluation.trained import open_trained
from ray_jobs.training.simulator import wilson
from support.commands import stock, tiny_act, tiny_diffusion
from support.evaluations import IN_PARTS, PLUGIN, evaluated, trained

FLAGS = {"act": tiny_act, "diffusion": tiny_diffusion}
RUNS = {
    "act": (
        "--data.eval_episodes=[10,11]",
        "--max_eval_samples=20",
        "--ray.ema=true",
        "--ray.cpus_per_worker=8",
    ),
    "act resized": (
        "--dataset.eval_split=0.2",
        "--eval_steps=2",
        "--data.resize=[32,32]",
        "--data.eval_horizon=5",
    ),
    "act bf16": ("--data.eval_episodes=[3,11]", "--max_eval_samples=20", "--policy.use_amp=true"),
    "diffusion": ("--data.eval_episodes=[10]", "--max_eval_samples=20"),
}


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory) -> dict[str, Path]:
    """A run of three steps for each of RUNS, validated and saved at its end."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in RUNS.items():
        recipe = FLAGS[name.split()[0]](parts, folder / name.replace(" ", "_"), "--steps=3", *flags)
        trained([*recipe, "--policy.optimizer_lr=0.01"])
    return {name: folder / name.replace(" ", "_") for name in RUNS}


@pytest.mark.parametrize("run", RUNS)
def test_the_value_is_the_one_that_the_training_reported(runs, tmp_path, run):
    """To the last digit, from the checkpoint alone: no flag says again what was held out."""
    (ours,) = evaluated(tmp_path / "out", f"--checkpoint={runs[run]}").values()
    lines = [json.loads(line) for line in (runs[run] / "metrics.jsonl").read_text().splitlines()]
    (reported,) = (line for line in lines if line["step"] == ours["step"] and "val/loss" in line)
    for key in ("val/action_error", "val/loss"):
        assert ours[key] == reported[key]
    assert [joint["error"] for joint in ours["joints"]] == reported["val/action_error_raw"]
    assert ours["reported"] == reported["val/action_error"]


def test_what_it_leaves_behind(runs, tmp_path, capsys):
    """Joints by name, the error of every predicted action, times, tables and pictures; nothing is overwritten."""
    both = f"{runs['act']},{runs['diffusion']}/checkpoints/000003"
    results = evaluated(tmp_path / "out", f"--checkpoint={both}")
    ours = results[str(runs["act"])]
    assert [joint["joint"] for joint in ours["joints"]] == ["target_x", "target_y", "target_closed"]
    assert len(ours["over_horizon"]) == ours["horizon"] == 8
    in_std = [joint["error"] / joint["std"] for joint in ours["joints"]]
    assert np.mean(in_std) == pytest.approx(ours["val/action_error"], rel=1e-6)
    times = ours["inference_ms"]
    assert 0 < times["p50"] <= times["p95"] and times["batch_size"] == 1
    assert ours["real_time_factor"] == pytest.approx(8 / 10 / (times["p50"] / 1000))
    with (tmp_path / "out" / "checkpoints.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {name: float(row["val/action_error"]) for name, row in rows.items()} == {
        name: result["val/action_error"] for name, result in results.items()
    }
    pictures = sorted((tmp_path / "out").rglob("*.png"))
    assert len(pictures) == 3 and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert "--data.eval_horizon=7 compares them" in capsys.readouterr().out
    with pytest.raises(InputError, match="already exists, and nothing in it is overwritten"):
        evaluate.main([f"--checkpoint={runs['act']}", f"--output_dir={tmp_path / 'out'}"])


# ---------------------------------------------------------------------- in a simulator


@pytest.fixture(scope="module")
def follower(tmp_path_factory) -> Path:
    return colour_follower.save(tmp_path_factory.mktemp("follower") / "pretrained_model")


@pytest.mark.slow
def test_success_rate_is_that_of_lerobot_eval(follower, tmp_path):
    """The same episodes succeed as in stock `lerobot-eval`, one at a time in this process or on two Ray workers."""
    episodes = (*IN_PARTS, "--eval.n_episodes=20", "--eval.batch_size=1", "--seed=7", PLUGIN)
    here = "--env.discover_packages_path=ray_jobs.part_sorting"
    theirs = tmp_path / "stock"
    stock("lerobot_eval", f"--policy.path={follower}", f"--output_dir={theirs}", *episodes, here)
    info = json.loads((theirs / "eval_info.json").read_text())["per_task"][0]["metrics"]
    assert 0.2 < np.mean(info["successes"]) < 0.95, "too easy or too hard to tell anything"

    for workers in (0, 2):
        target = tmp_path / f"workers-{workers}"
        flags = (f"--checkpoint={follower}", *episodes, f"--ray.num_workers={workers}")
        results = evaluated(target, *flags)
        ours = results[str(follower)]["simulator"]
        assert [e["seed"] for e in ours["per_episode"]] == list(range(7, 27))
        assert [e["success"] for e in ours["per_episode"]] == info["successes"]
        assert [e["sum_reward"] for e in ours["per_episode"]] == info["sum_rewards"]
        assert ours["success_rate"] == pytest.approx(np.mean(info["successes"]))
        assert ours["low"] < ours["success_rate"] < ours["high"]
        videos = sorted(target.rglob("*.mp4"))
        assert [path.name for path in videos] == [f"part_sorting_0_seed_{seed}.mp4" for seed in (10, 7, 8, 9)]
        assert all(b"ftyp" in path.read_bytes()[:16] for path in videos)


def test_batches_of_episodes_are_the_same_episodes(follower, tmp_path):
    """Several environments at a time, with a last batch that is not full."""

    def successes(size: int) -> list[bool]:
        flags = (*IN_PARTS, "--eval.n_episodes=7", f"--eval.batch_size={size}", PLUGIN, "--ray.num_workers=0")
        results = evaluated(
            tmp_path / str(size), f"--checkpoint={follower}", *flags, "--eval.use_async_envs=false"
        )
        return [(e["seed"], e["success"]) for e in results[str(follower)]["simulator"]["per_episode"]]

    assert successes(3) == successes(1)


def test_a_simulator_that_fails_leaves_the_score(runs, tmp_path, monkeypatch):
    def fail(*args, **more):
        raise RunError("a worker of the simulator failed")

    monkeypatch.setattr(rollouts, "run", fail)
    with pytest.raises(RunError, match="a worker of the simulator failed"):
        evaluated(tmp_path / "out", f"--checkpoint={runs['act']}", *IN_PARTS, "--ray.num_workers=0")
    result = json.loads((tmp_path / "out" / RESULTS).read_text())["results"][str(runs["act"])]
    assert result["val/action_error"] == result["reported"] and "simulator" not in result


def test_only_the_simulator(parts, tmp_path, capsys):
    """A run without held-out episodes acts in a simulator all the same; images of another size are told of."""
    trained(tiny_act(parts, tmp_path / "run", "--steps=1"))
    flags = (*IN_PARTS, "--env.image_size=96", "--eval.n_episodes=1", "--ray.num_workers=0")
    (result,) = evaluated(tmp_path / "out", f"--checkpoint={tmp_path / 'run'}", *flags).values()
    assert result["simulator"]["episodes"] == 1 and "val/action_error" not in result
    printed = capsys.readouterr().out
    assert "trained without held-out episodes" in printed
    assert "as 96x96, the policy was trained on 64x64 and does not resize" in printed


def test_what_a_training_reserved_is_not_asked_for_again(runs):
    run = runs["act"]
    assert json.loads((run / "options.json").read_text())["ray"]["cpus_per_worker"] == 8
    policy = open_trained("act", (run / "checkpoints/last/pretrained_model").resolve(), {})
    assert policy.recipe.options.ray.cpus_per_worker is None


def test_wilson():
    """Against the values of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for wins, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(wins, trials) == pytest.approx((low, high), abs=5e-5)


# ---------------------------------------------------------------------- mistakes


def of_another_robot(run: Path, target: Path, dims: int) -> Path:
    """A copy of a run's checkpoint whose config says that its robot has another number of joints."""
    folder = Path(shutil.copytree((run / "checkpoints/last").resolve(), target))
    file = folder / "pretrained_model" / "config.json"
    config = json.loads(file.read_text())
    config["input_features"]["observation.state"]["shape"] = [dims]
    file.write_text(json.dumps(config))
    return folder


def test_mistakes(runs, follower, numbers_only, tmp_path, no_network):
    act, out = f"--checkpoint={runs['act']}", f"--output_dir={tmp_path / 'out'}"
    other = f"--checkpoint={of_another_robot(runs['act'], tmp_path / 'other', 14)}"
    data = "--data.eval_episodes=[10]"
    for flags, message in (
        ([], "--checkpoint is missing"),
        (["--checkpoint=nowhere"], "--checkpoint=nowhere: there is no checkpoint"),
        ([act, "--steps=7"], "--steps has no effect on a trained policy"),
        ([act, "--data.eval_episode=[1]"], "did you mean --data.eval_episodes"),
        ([act, "--data.eval_episodes=[99]"], "there is no episode 99"),
        ([act, f"--data.eval_episodes={list(range(1, 13))}"], "there is no episode 12"),
        ([act, "--max_eval_samples=-5"], "max_eval_samples=-5"),
        (
            [act, "--dataset.repo_id=local/elsewhere"],
            "local/elsewhere",
        ),  # not the old data under another name
        ([act, *IN_PARTS, "--eval.batch_size=-1"], "--eval.batch_size must be at least 1"),
        ([act, "--data.eval_horizon=9"], "eval_horizon=9: the policy predicts 8 actions"),
        ([act, "--env.image_size=64"], "--env.type is missing"),
        ([act, "--eval.n_episodes=50"], "--eval.n_episodes is of a simulator"),
        ([act, "--env.type=pusht"], r"not installed here; `pip install 'lerobot\[pusht\]==0.6.1'` brings it"),
        ([other, data], r"observation.state: the policy has shape \(14,\), the data set \(3,\)"),
        (
            [other, *IN_PARTS],
            r"observation.state: the policy has shape \(14,\), --env.type=part_sorting \(3,\)",
        ),
        (
            [act, "--dataset.repo_id=local/numbers", f"--dataset.root={numbers_only}"],
            "It lacks observation.images.top",
        ),
        ([f"--checkpoint={follower}", PLUGIN], "does not say what it was trained on"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.main([*flags, out])
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def numbers_only(tmp_path_factory) -> Path:
    from support.data_sets import make

    return make(tmp_path_factory.mktemp("evaluate") / "numbers", [5, 6])


def test_evaluations_at_the_same_time_have_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: _new_folder(tmp_path / "outputs"), range(40)))
    assert len(set(folders)) == 40 and all(folder.is_dir() for folder in folders)
