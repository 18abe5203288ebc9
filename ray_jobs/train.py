"""Train a LeRobot policy on Ray: `lerobot-train`'s flags, on one or many workers, safe against interruption.

    python -m ray_jobs.train --dataset.repo_id=me/set --dataset.root=datasets/set --policy.type=act

`--help` lists our flags, `--policy.type=act --help` LeRobot's as well.
"""

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ray_jobs.cli.command_line import asks_to_resume, parse_options, read_flags
from ray_jobs.cli.early_checks import check_command, help_of_training
from ray_jobs.cli.signals import interrupt, on_interruption
from ray_jobs.cli.terminal import Display, doing, no_garbage_collection, quiet
from ray_jobs.cluster import connect
from ray_jobs.cluster.job import run_job
from ray_jobs.cluster.run_folder import only_driver, refuse_busy
from ray_jobs.config.errors import INTERRUPTED
from ray_jobs.config.units import duration
from ray_jobs.interface import callable_as_job
from ray_jobs.policies.lean_imports import unneeded, without
from ray_jobs.storage.records import SUMMARY_FILE

if TYPE_CHECKING:
    from ray_jobs.config.recipe import Recipe


def main(argv: list[str]) -> int:
    """Resolve the recipe, start or join Ray, train, and say how it ended. Returns the exit status."""
    quiet()
    if {"--help", "-h"} & set(argv):
        return _help(argv)
    flags, _ = read_flags(argv)
    refuse_busy(flags)
    check_command(flags)
    on_ray = _start_ray(flags)
    doing(f"importing LeRobot{' while Ray starts' if on_ray else ''}")
    resumed = asks_to_resume(flags)
    not_needed = () if resumed else unneeded([flags.get("policy.type", "")], flags)
    with no_garbage_collection(), without(not_needed):
        from ray_jobs.checks import preflight
        from ray_jobs.cli.resolve import resolve

    doing("looking over the recipe and the data set")
    recipe = preflight.check(resolve(argv).knowing(unneeded=not_needed))
    display = Display()
    for notice in recipe.notices:
        display.say(notice)
    started = time.monotonic()
    try:
        summary = _train(recipe, display)
    finally:
        display.close()
    _last_screen(summary, display, time.monotonic() - started, recipe.remote)
    return 130 if summary["status"] == INTERRUPTED else 0


def _start_ray(flags: dict[str, str]) -> bool:
    """Let Ray start, or be joined, while this process imports LeRobot and checks the recipe; nothing is scheduled
    on it before that. A resumed run may have its options in its folder: its Ray starts later. Returns whether it does.

    Workers that import LeRobot meanwhile were 1 s faster, but a refused command then shuts Ray down under a
    thread that uses it, for which Ray 2.60 ends the process with a status of its own.
    """
    options = parse_options(flags).ray
    if not options.num_workers or asks_to_resume(flags):
        return False
    connect.start(options.address)
    return True


def _train(recipe: "Recipe", display: Display) -> dict:
    """Run the loop in this process or on Ray Train's workers, hand on Ctrl-C; returns the summary."""
    if not recipe.options.ray.num_workers:
        doing("opening the data set")
        from ray_jobs.cluster.worker import train_here

        logging.getLogger("ray.train").setLevel(logging.ERROR)  # it has a handler of its own
        with only_driver(recipe.output_dir), _interrupts(display) as asked:
            return train_here(recipe, display.show, asked)
    connect.start(recipe.options.ray.address).result()  # before there is a folder
    doing("starting the worker(s)")
    from ray_jobs.cluster.driver import (  # not while Ray starts: it imports parts of it
        resources_of,
        train_and_show,
    )

    each = resources_of(recipe)  # before there is a folder
    with only_driver(recipe.output_dir), _interrupts(display) as asked:
        return train_and_show(recipe, each, display, asked)


@contextlib.contextmanager
def _interrupts(display: Display) -> Iterator[Callable[[], str]]:
    """Within, Ctrl-C asks a training to stop, with a checkpoint; the second one, or one before it has begun, ends it at
    once. Yields the training's `should_stop`."""
    reason = ""

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal reason
        if reason or display.waits_since:  # nobody is there to save anything
            return interrupt(signum, frame)
        reason = INTERRUPTED
        # Told here and now: a step may take minutes.
        display.say("stopping: a checkpoint is saved first; Ctrl-C again stops at once.")

    restore = on_interruption(ask)
    try:
        yield lambda: reason
    finally:
        restore()


# ---------------------------------------------------------------------- what the user sees


def _last_screen(summary: dict, display: Display, seconds: float, remote: str | None) -> None:
    """Where the checkpoint is, the last and best values, and the command that continues the run."""
    done = {"finished": "done", "stopped early": "stopped early, validation no longer improves"}
    display.say(
        f"\n{done.get(summary['status'], summary['status'])}: step {summary['step']}/{summary['steps']}"
        f" in {duration(seconds)}"
    )
    last, best = summary["last"], summary["best"]
    if "train/loss" in last:
        display.say(f"loss        {last['train/loss']:.4g}, {last['train/samples_per_s']:.3g} samples/s")
    if best:
        display.say(f"best        val/action_error {best['val/action_error']:.4g} std at step {best['step']}")
    if summary["checkpoint"] and remote:
        place = summary["checkpoint"].replace(summary["output_dir"], remote.rstrip("/"))
        more = "" if summary["step"] < summary["steps"] else f" --steps={2 * summary['steps']}"
        display.say(f"checkpoint  {place}")
        display.say(
            f"continue    python -m ray_jobs.train --output_dir={shlex.quote(remote)} --resume=true{more}"
        )
    elif summary["checkpoint"]:
        config = Path(summary["checkpoint"]) / "pretrained_model" / "train_config.json"
        more = "" if summary["step"] < summary["steps"] else f" --steps={2 * summary['steps']}"
        display.say(f"checkpoint  {summary['checkpoint']}")
        display.say(
            f"continue    python -m ray_jobs.train --config_path={shlex.quote(str(config))} --resume=true{more}"
        )


def _help(argv: list[str]) -> int:
    flags, _ = read_flags([word for word in argv if word not in ("--help", "-h")])
    print(__doc__)
    print(help_of_training(flags.get("policy.type")))
    return 0


callable_as_job(__name__, SUMMARY_FILE)

if __name__ == "__main__":
    run_job(main, at_end=connect.leave)
