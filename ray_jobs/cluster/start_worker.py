"""The first thing that a worker of a run does: import LeRobot, of it what the run needs. Light itself."""

import ray

from ray_jobs.cli import environment
from ray_jobs.cli.terminal import no_garbage_collection, quiet
from ray_jobs.config.events import Doing
from ray_jobs.policies.lean_imports import without


def start(config: dict) -> None:
    """Ray Train's `train_loop_per_worker` (see `worker.work`)."""
    channel = config["channel"]
    if ray.get(channel.why_failed.remote()):
        return  # Ray has started this worker in place of one that knew better
    environment.take_over(config["paths"])
    quiet()
    channel.tell.remote(Doing("a worker imports LeRobot"))
    with no_garbage_collection(), without(config["unneeded"]):
        from ray_jobs.cluster.worker import work  # while the packages that are not needed are hidden
    work(config)
