"""The frame cache filled ahead on this node."""

import time
from collections.abc import Callable

from ray_jobs.cli import dataset_options
from ray_jobs.cli.terminal import doing
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.config.units import duration, gigabytes
from ray_jobs.data.frame_cache import FrameCache
from ray_jobs.data.frames import FrameSource
from ray_jobs.data.reader import FrameReader
from ray_jobs.storage.cache_folder import folder_of


def build_here(words: list[str], say: Callable[[str], None]) -> None:
    """Decode all frames of the data set that the words of a command name.

    Raises:
        InputError: There is nothing to decode, or the data set is not as it should be.
        RunError: The cache's folder cannot be used.
    """
    begin = time.monotonic()
    asked = dataset_options.read(words)
    dataset = asked.open()
    if not dataset.meta.camera_keys or not FrameReader.can_read(dataset):
        raise InputError(
            f"{asked.name}: nothing to cache, it has no cameras, or depth or language, which LeRobot reads."
        )
    folder = folder_of(asked.data)
    try:
        cache = FrameCache(FrameSource(dataset, asked.data.resize), folder)
        doing("")
        say(f"decoding {gigabytes(cache.missing_bytes())} of {gigabytes(cache.bytes())} into {folder}")
        cache.fill(say)
    except OSError as error:
        raise RunError(f"{folder} cannot be used: {error.strerror or error}") from error
    say(f"all frames are there ({duration(time.monotonic() - begin)})")
