"""The first thing that a process of a search does, a slot or one that is timed: import LeRobot, of it what the trials need.
Light itself."""

import os
from typing import TYPE_CHECKING, Any

from ray_jobs.cli import environment
from ray_jobs.cli.terminal import no_garbage_collection, quiet
from ray_jobs.policies.lean_imports import without

if TYPE_CHECKING:
    from ray_jobs.search.timing import Costs


def start_trial(
    config: dict, *, group: str, paths: dict[str, str], unneeded: tuple[str, ...], **how: Any
) -> None:
    """Ray Tune's trainable (see `trial.run_trial`, which takes the rest).

    Args:
        group: The study's name, for W&B.
        paths: Of the driver's environment (see `environment`).
        unneeded: Packages that the trials do without (see `lean_imports`).
    """
    environment.take_over(paths)
    quiet()
    os.environ["WANDB_RUN_GROUP"] = group
    with no_garbage_collection(), without(unneeded):
        from ray_jobs.search.trial import run_trial  # while the packages that are not needed are hidden
    run_trial(config, unneeded=unneeded, **how)


def start_timing(words: list[str], trials: int, unneeded: tuple[str, ...]) -> "Costs":
    """See `timing.time_a_slot`."""
    quiet()
    with no_garbage_collection(), without(unneeded):
        from ray_jobs.search.timing import time_a_slot
    return time_a_slot(words, trials)
