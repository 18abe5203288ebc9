"""The first five minutes: record a small simulated part-sorting task and search for a good ACT, on any machine.

    python -m ray_jobs.demo [--output_dir=outputs/demo] [--episodes=200] [--trials=8] [--steps=500] [--rollouts=50]

The search goes through `ray_jobs.tune`: trial 0 is the published recipe, the last episodes are held out. Ends in
numbers, pictures and the success rate in the simulator. A recorded data set is used again; every search gets a
folder of its own.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.cli.command_line import build, not_an_address, read_flags
from ray_jobs.cli.flags import check_flags
from ray_jobs.cli.terminal import OUTPUT_EVERY_S, doing, quiet
from ray_jobs.cluster import connect
from ray_jobs.cluster.job import run_job
from ray_jobs.config.errors import InputError, all_mistakes
from ray_jobs.config.flag_table import flags_of
from ray_jobs.config.options import at_least
from ray_jobs.config.units import duration

IMAGE_SIZE = 64  # pixels
LEAST = {"episodes": 2, "steps": 2, "trials": 1, "rollouts": 1}
SPACE = Path(__file__).parent.parent / "search_spaces" / "act_demo.yaml"


@dataclass
class DemoOptions:
    output_dir: str = "outputs/demo"
    episodes: int = 200
    trials: int = 8
    steps: int = 500
    rollouts: int = 50  # episodes in the simulator, of the published recipe and of the best policy


def main(argv: list[str]) -> int:
    quiet()
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    options = _parse(argv)
    started = time.monotonic()
    folder = Path(options.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir={folder} cannot be created: {error.strerror}.") from None
    dataset = _dataset(folder / "dataset", options.episodes)

    from ray_jobs import evaluate, report, tune

    held_out = list(range(options.episodes - max(1, options.episodes // 10), options.episodes))
    run = next(path for n in range(1, 10**6) if not (path := folder / f"search-{n}").exists())
    print(f"searching with {options.trials} trials of ACT, at most {options.steps} steps each")
    status = tune.main(_recipe(dataset, run, options, held_out))
    if status != 0 or not (run / "best").exists():  # the search has said why
        return status or 1
    print("\nthe published recipe and the best policy in the simulator, on seeds that neither has seen")
    evaluate.main(
        [
            f"--checkpoint={run / 'trials' / '0000'},{run / 'best' / 'checkpoint'}",
            f"--output_dir={run / 'evaluation'}",
            "--env.type=part_sorting",
            f"--env.image_size={IMAGE_SIZE}",
            f"--eval.n_episodes={options.rollouts}",
            "--eval.batch_size=1",
            "--ray.num_workers=0",  # warm already: other processes would take longer to start
        ]
    )
    report.main([f"--output_dir={run}"])
    print(f"demo done in {duration(time.monotonic() - started)}")
    return 0


def _parse(argv: list[str]) -> DemoOptions:
    flags, _ = read_flags(argv)
    check_flags(flags, flags_of(DemoOptions, ""), alone=True)
    options = build(DemoOptions, flags)
    with all_mistakes() as mistakes:
        mistakes += not_an_address("output_dir", options.output_dir)
        for name, least in LEAST.items():
            mistakes += at_least(name, getattr(options, name), least)
    return options


def _dataset(root: Path, episodes: int) -> Path:
    if root.exists():
        from lerobot.datasets import LeRobotDatasetMetadata

        recorded = LeRobotDatasetMetadata("local/part_sorting", root=root).total_episodes
        if recorded != episodes:
            raise InputError(
                f"{root} holds {recorded} episodes, not {episodes}: --episodes={recorded}, or another --output_dir."
            )
        print(f"using the {recorded} recorded episodes in {root}")
        return root
    doing("importing LeRobot")
    from ray_jobs.part_sorting.record import record

    doing("")
    said = time.monotonic()

    def progress(done: int, episodes: int) -> None:
        nonlocal said
        if time.monotonic() - said > OUTPUT_EVERY_S:
            said = time.monotonic()
            print(f"  {done}/{episodes} episodes", flush=True)

    print(f"recording {episodes} episodes of part sorting into {root}")
    return record(root, episodes, image_size=IMAGE_SIZE, progress=progress)


def _recipe(dataset: Path, run: Path, options: DemoOptions, held_out: list[int]) -> list[str]:
    return [
        f"--space={SPACE}",
        "--dataset.repo_id=local/part_sorting",
        f"--dataset.root={dataset}",
        "--dataset.video_backend=pyav",
        f"--output_dir={run}",
        "--num_workers=1",
        f"--steps={options.steps}",
        f"--tune.num_samples={options.trials}",
        "--tune.final_steps=2000",
        f"--tune.keep_trials={options.trials}",
        f"--data.eval_episodes={held_out}",
        "--max_eval_samples=100",
    ]


if __name__ == "__main__":
    run_job(main, at_end=connect.leave)
