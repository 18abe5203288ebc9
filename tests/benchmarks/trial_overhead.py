"""What a trial costs beside its training: our warm slots against a `TorchTrainer` started inside each Tune trial.

    uv run python tests/benchmarks/trial_overhead.py [--trials=8] [--documented=3]

Ours is timed from the end of one trial to the end of the next one's first step, in a search of real ACT trainings,
minus what building the model takes. The documented pattern (a Tune function that runs
`TorchTrainer(...).fit()`) is timed from the end of one trial to the first line of the next one's training function,
which does nothing at all and imports nothing. Both on one Ray, one trial at a time, interleaved; medians.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import optuna

from ray_jobs import tune as job
from ray_jobs.cluster import connect


def ours(folder: Path, dataset: Path, trials: int) -> list[dict]:
    """Seconds of each trial after the first."""
    from support.searches import space_file

    flags = [f"--dataset.root={dataset}", "--dataset.repo_id=local/numbers", "--policy.device=cpu"]
    flags += ["--policy.pretrained_backbone_weights=null", "--batch_size=4", "--num_workers=0", "--steps=18"]
    flags += ["--data.eval_episodes=[2,4]", "--tune.max_concurrent=1", f"--tune.num_samples={trials}"]
    assert job.main([f"--space={space_file(folder)}", f"--output_dir={folder / 'run'}", *flags]) == 0
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{folder / 'run' / 'study.db'}")
    times = sorted((t.user_attrs["times"] for t in study.trials), key=lambda t: t["begun"])
    pairs = [(a, b) for a, b in zip(times, times[1:], strict=False) if a["slot"] == b["slot"]]
    return [
        {
            "end to begun (driver)": b["begun"] - a["end"],
            "begun to built (recipe, checks, data, model)": b["start"] - b["begun"],
            "built to first step": b["step"] - b["start"],
            "all": b["step"] - a["end"],
        }
        for a, b in pairs
    ]


def building(dataset: Path) -> float:
    """Seconds that building the model alone takes in a warm process."""
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.policies import make_policy

    from ray_jobs.cli.resolve import resolve
    from support.commands import tiny_act

    recipe = resolve(tiny_act(dataset, Path(tempfile.mkdtemp()) / "run"))
    meta = LeRobotDatasetMetadata("local/numbers", root=dataset)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        make_policy(recipe.lerobot.policy, ds_meta=meta)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def documented(folder: Path, trials: int) -> list[float]:
    """Seconds from the end of a trial to the first line of the next one's training function."""
    from ray import train, tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    log = folder / "log.jsonl"

    def loop(config: dict) -> None:
        with log.open("a") as file:
            file.write(json.dumps(time.time()) + "\n")
        train.report({"loss": 0.0})

    def trial(config: dict) -> None:
        TorchTrainer(
            loop,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=str(folder), name=f"trial-{config['number']}"),
        ).fit()
        with log.open("a") as file:
            file.write(json.dumps(time.time()) + "\n")

    tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.01}),
        param_space={"number": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(folder), name="tune", verbose=0),
    ).fit()
    stamps = [json.loads(line) for line in log.read_text().splitlines()]
    begun, ended = stamps[::2], stamps[1::2]
    return [b - e for b, e in zip(begun[1:], ended, strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--documented", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    from support.data_sets import make

    folder = Path(tempfile.mkdtemp())
    dataset = make(folder / "numbers", [23, 17, 9, 20, 21], seed=2)
    all_ours, theirs = [], []
    for number in range(args.rounds):
        here = folder / f"round-{number}"
        here.mkdir()
        all_ours += ours(here, dataset, args.trials)
        theirs += documented(here, args.documented)
    build = building(dataset)
    print(f"\n{'seconds per trial after the first, medians':52}")
    for key in all_ours[0]:
        print(f"  {key:50} {statistics.median(row[key] for row in all_ours):7.2f}")
    print(f"  {'building the model':50} {build:7.2f}")
    mine = statistics.median(row["all"] for row in all_ours) - build
    other = statistics.median(theirs)
    print(f"  {'ours, without building the model':50} {mine:7.2f}")
    print(f"  {'a TorchTrainer inside each Tune trial':50} {other:7.2f}")
    print(f"  ratio {other / mine:.0f}")
    connect.leave()


if __name__ == "__main__":
    main()
