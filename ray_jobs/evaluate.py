"""Score trained policies: on held-out episodes, and in a simulator.

    python -m ray_jobs.evaluate --checkpoint=outputs/act
    python -m ray_jobs.evaluate --checkpoint=outputs/act --env.type=part_sorting --eval.n_episodes=50

`--checkpoint` is a run's folder (its best checkpoint, else its last), a checkpoint, a `pretrained_model` folder, a
search (all trials that keep checkpoints), a run's or a search's address in a bucket, or several of these with commas. What
was held out, and how it is compared, is what the training said: the value is the one that it reported, to the last digit.

    --output_dir=FOLDER            for results and pictures; a new one under outputs/ if left out
    --dataset.* --data.*           other data, or other episodes: --data.eval_episodes='[18,19]'
    --max_eval_samples=N           score N frames, spread over the episodes; 0 scores all
    --env.* --eval.* --seed=1000   as in lerobot-eval, with --eval.n_episodes spread over Ray's workers
    --rename_map, --policy.device, --assets.dir, --tolerance_s, --num_workers as in ray_jobs.train
    --ray.num_workers=N            workers for the simulator; 0 runs it in this process; by default what the cluster holds
"""

from functools import partial
from pathlib import Path

from ray_jobs.checks.output_dir import check_output_dir
from ray_jobs.cli.command_line import listed, parse_options, read_flags
from ray_jobs.cli.flags import check_flags
from ray_jobs.cli.terminal import doing, no_garbage_collection, quiet
from ray_jobs.cluster import connect
from ray_jobs.cluster.job import run_job
from ray_jobs.config.errors import all_mistakes
from ray_jobs.interface import callable_as_job
from ray_jobs.search.files import SEARCH_FILE, read_search

GROUPS = ("dataset.", "data.", "env.", "eval.", "ray.", "assets.")
FLAGS = ("rename_map", "max_eval_samples", "seed", "policy.device", "tolerance_s", "num_workers")
MADE_OF = (
    "config.json",
    "pretrained_model",
    "checkpoints",
    "best",
)  # what is in a folder that means a checkpoint


def main(argv: list[str]) -> int:
    """Score each checkpoint, write the results, and say them. Returns the exit status."""
    quiet()
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    flags, notices = read_flags(argv)
    checkpoint, output_dir = flags.pop("checkpoint", None), flags.pop("output_dir", None)
    in_simulator = any(name.startswith("env.") for name in flags)
    _check(checkpoint, output_dir, flags, in_simulator)
    if (
        in_simulator
        and parse_options({k: v for k, v in flags.items() if k.startswith("ray.")}).ray.num_workers
    ):
        connect.start(flags.get("ray.address"))
    assert checkpoint is not None  # else `_check` has raised
    doing("importing LeRobot")
    with no_garbage_collection():
        from ray_jobs.evaluation.run import evaluate
    return evaluate(checkpoint, output_dir, flags, notices, argv)


def _check(checkpoint: str | None, output_dir: str | None, flags: dict[str, str], in_simulator: bool) -> None:
    """Find the command line's mistakes before anything is imported."""
    with all_mistakes() as mistakes:
        if not listed(checkpoint or ""):
            mistakes.append("--checkpoint is missing: what to evaluate, as in --checkpoint=outputs/act.")
        for word in listed(checkpoint or ""):
            if "://" in word:
                continue
            if not Path(word).exists():
                mistakes.append(f"--checkpoint={word}: there is no checkpoint, nor such a folder.")
            elif (Path(word) / SEARCH_FILE).is_file():
                mistakes.of(partial(read_search, word))
            elif not any((Path(word) / name).exists() for name in MADE_OF):
                mistakes.append(f"--checkpoint={word}: there is no checkpoint in it.")
        if not in_simulator and (idle := [n for n in flags if n == "seed" or n.startswith("eval.")]):
            mistakes.append(f"--{idle[0]} is of a simulator, which --env.type names.")
        if mistakes.of(lambda: check_flags(flags)):
            for name in flags:
                if not name.startswith(GROUPS) and name not in FLAGS and "discover_packages_path" not in name:
                    mistakes.append(f"--{name} has no effect on a trained policy; --help lists what has.")
        if output_dir and "://" not in output_dir:
            mistakes.of(lambda: check_output_dir(Path(output_dir)))


# ---------------------------------------------------------------------- what is left behind, and said


callable_as_job(__name__, "evaluation.json")

if __name__ == "__main__":
    run_job(main, at_end=connect.leave)
