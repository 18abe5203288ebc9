"""A data set as the jobs name it that do not train: `--dataset.*`, `--data.*`, `--ray.address`."""

import draccus

from ray_jobs.checks.dataset import DatasetOptions
from ray_jobs.cli.command_line import read_flags
from ray_jobs.cli.flags import NO_DATA_SET, as_arguments
from ray_jobs.cli.parse_errors import parse
from ray_jobs.config.errors import InputError
from ray_jobs.storage import bucket


def read(words: list[str]) -> DatasetOptions:
    """Parse the flags.

    Raises:
        InputError: A flag or a value is wrong, or no data set is named, or one in a bucket.
    """
    flags, _ = read_flags(words)
    if "dataset.repo_id" not in flags:
        raise InputError(NO_DATA_SET)
    asked = parse(lambda: draccus.parse(DatasetOptions, args=as_arguments(flags)), flags)
    if bucket.is_uri(asked.dataset.root):
        raise InputError(
            f"--dataset.root={asked.dataset.root}: this looks at local folders; a training reads from a bucket."
        )
    return asked
