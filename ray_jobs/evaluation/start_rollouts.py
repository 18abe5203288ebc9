"""The first thing that a worker of a simulator does: import LeRobot. Light itself."""

from collections.abc import Iterator

from ray_jobs.cli.terminal import no_garbage_collection, quiet


def start_rollouts(work: bytes, plugins: list[str], batches: list, videos: int) -> Iterator[list[dict]]:
    """A task of Ray's (see `rollouts.run_batches`).

    Args:
        plugins: Packages to import first, of `--*.discover_packages_path`: what is in `work` needs them.
    """
    quiet()
    with no_garbage_collection():
        from lerobot.configs.parser import load_plugin  # whose noise is kept away by now

        from ray_jobs.evaluation.rollouts import run_batches
    for package in plugins:
        load_plugin(package)
    yield from run_batches(work, batches, videos)
