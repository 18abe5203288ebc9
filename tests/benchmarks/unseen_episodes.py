"""Does what a search finds hold on episodes that it never saw? The best configuration against the published recipe.

    uv run python tests/benchmarks/unseen_episodes.py --root=DATASET [--trials=16] [--steps=300]

The episodes are split in three: the search trains on the first, validates on two more, and never opens the last two.
Then its best configuration and the published recipe are trained with three seeds each, for as many steps as a trial had,
and scored once, at the end, on those last two.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import optuna
from lerobot.datasets import LeRobotDatasetMetadata
from tune_vs_loop import SMALL, SPACE, run

from ray_jobs.search.spaces.space import flags

SEEDS = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="a LeRobot v3.0 data set with a camera")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    episodes = list(range(LeRobotDatasetMetadata("local/set", root=args.root).total_episodes))
    seen, validated, unseen = episodes[:-4], episodes[-4:-2], episodes[-2:]
    common = [
        "--dataset.repo_id=local/set", f"--dataset.root={args.root}", "--dataset.video_backend=pyav",
        "--policy.pretrained_backbone_weights=null", "--policy.device=cpu", "--policy.push_to_hub=false",
        "--batch_size=8", f"--steps={args.steps}", "--data.resize=[96,128]", f"--data.cache={folder / 'frames'}", *SMALL,
    ]  # fmt: skip
    output = folder / "search"
    run(
        "ray_jobs.tune", f"--space={SPACE}", f"--output_dir={output}", f"--tune.num_samples={args.trials}",
        f"--dataset.episodes={seen + validated}", f"--data.eval_episodes={validated}", *common,
    )  # fmt: skip
    summary = json.loads((output / "summary.json").read_text())
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{output / 'study.db'}")
    trials = {"published": summary["baseline"]["trial"], "found": summary["best"]["trial"]}
    print(
        f"{args.trials} trials of {args.steps} steps, trained on {len(seen)} episodes, validated on {validated}"
    )
    errors: dict[str, list[float]] = {}
    for name, number in trials.items():
        print(f"{name:10} validated {study.trials[number].value:.4f}", flush=True)
        for seed in SEEDS:
            out = folder / f"{name}-{seed}"
            run(
                "ray_jobs.train", *common, *flags(study.trials[number].user_attrs["config"]), f"--output_dir={out}",
                f"--dataset.episodes={seen + unseen}", f"--data.eval_episodes={unseen}", f"--seed={seed}",
                f"--eval_steps={args.steps}", f"--data.eval_horizon={summary['horizon']}", "--ray.num_workers=0",
                "--save_checkpoint=false",
            )  # fmt: skip
            error = json.loads((out / "summary.json").read_text())["best"]["val/action_error"]
            errors.setdefault(name, []).append(error)
            print(f"{name:10} seed {seed}, on the unseen {unseen}: {error:.4f}", flush=True)
    means = {name: statistics.mean(values) for name, values in errors.items()}
    for name, values in errors.items():
        print(f"{name:10} mean {means[name]:.4f}, standard deviation {statistics.stdev(values):.4f}")
    print(
        f"found is {1 - means['found'] / means['published']:.1%} lower on episodes that the search never saw"
    )


if __name__ == "__main__":
    main()
