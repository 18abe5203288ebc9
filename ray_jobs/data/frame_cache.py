"""Decoded frames on a node's own disk: decoded once, read by every worker and every trial at memory speed.

Which frames there are, where they lie and how they are kept good is `frame_store`'s business; here is what a
training does with it: choose, decode what is missing, read.
"""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata

from ray_jobs.config.errors import RunError
from ray_jobs.config.options import DataOptions
from ray_jobs.config.units import duration, gigabytes
from ray_jobs.data.columns import cached_columns
from ray_jobs.data.frame_store import Entry, entry_folder, fingerprint, open_entry
from ray_jobs.data.frames import FrameSource, NoFrame, frame_shape
from ray_jobs.storage.cache_folder import folder_of, free_bytes

TELL_EVERY_S = 15


def can_cache(meta: LeRobotDatasetMetadata, key: str) -> bool:
    """Whether a camera's frames are plain 8-bit pictures: depth is 12 or 16 bit wide."""
    return key not in meta.depth_keys and frame_shape(meta, key)[0] in (1, 3)


class FrameCache:
    """The frames of a data set's cameras out of the cache, and its other columns. Decodes nothing before `fill`.

    Args:
        source: Decodes the frames. Of a data set with a selection of episodes only those are decoded.
        folder: Where entries lie.
    """

    def __init__(self, source: FrameSource, folder: Path):
        self.source, self.folder = source, folder
        self.dataset, self.size = dataset, size = source.dataset, source.size
        self.meta = meta = dataset.meta
        bounds = meta.episodes.with_format("numpy", columns=["dataset_from_index", "dataset_to_index"])
        self.starts = np.asarray(bounds["dataset_from_index"][:])
        self.ends = np.asarray(bounds["dataset_to_index"][:])
        self.entries: dict[str, Entry] = {}
        for key in (key for key in meta.camera_keys if can_cache(meta, key)):
            channels, *recorded = source.shape(key)
            about = {
                "dataset": dataset.repo_id,
                "root": str(dataset.root),
                "camera": key,
                "shape": [channels, *(size or recorded)],
                "resized": size is not None,
                "frames": int(self.ends[-1]),  # meta/info.json may count others
                "tolerance_s": dataset.tolerance_s,
                "fingerprint": fingerprint(
                    meta.root, key, key in meta.video_keys, size, dataset.tolerance_s, folder
                ),
            }
            self.entries[key] = open_entry(entry_folder(folder, about), about)
        self.episodes = range(len(self.ends)) if dataset.episodes is None else sorted(dataset.episodes)
        self.columns: dict[str, torch.Tensor] = {}

    def __reduce__(self) -> tuple:  # for the worker processes of a DataLoader
        return _opened_again, (self.source, self.folder)

    def missing(self) -> dict[str, list[int]]:
        """Episodes that have yet to be decoded, by camera."""
        found = {
            key: [e for e in self.episodes if not entry.has(slice(self.starts[e], self.ends[e]))]
            for key, entry in self.entries.items()
        }
        return {key: episodes for key, episodes in found.items() if episodes}

    def bytes(self) -> int:
        """What the frames of this data set take up."""
        frames = sum(int(self.ends[e] - self.starts[e]) for e in self.episodes)
        return sum(frames * entry.frame_bytes for entry in self.entries.values())

    def missing_bytes(self) -> int:
        return sum(
            int((self.ends[episodes] - self.starts[episodes]).sum()) * self.entries[key].frame_bytes
            for key, episodes in self.missing().items()
        )

    def fill(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Decode what is missing, or wait while another process does. Returns once every frame is there.

        Raises:
            OSError: The folder cannot be written, or the disk is full.
            RunError: A video or an image cannot be decoded.
        """
        self.columns = cached_columns(self.dataset, self.folder)
        progress = _Progress(self, say)
        for key, entry in self.entries.items():
            if entry.file is None:
                entry.begin()
            while key in self.missing():
                with entry.lock(wait=False) as mine:
                    if mine:
                        self._decode(key, self.missing().get(key, []), progress)
                    else:
                        progress.tell("another process decodes")
                        time.sleep(0.2)

    def read(self, key: str, rows: list[int], out: np.ndarray) -> None:
        """Read a camera's frames by row of the whole data set into `out`, uint8 (len(rows), C, H, W)."""
        entry = self.entries[key]
        bad = entry.read(rows, out)
        if not bad:
            return
        with entry.lock():
            damaged = np.searchsorted(self.starts, bad, side="right") - 1
            self._decode(key, sorted({int(e) for e in damaged}), None)
        if entry.read(rows, out):
            raise RunError(
                f"{entry.folder}: frames were damaged, and are so again after decoding. Is the disk failing?"
            )

    def _decode(self, key: str, episodes: list[int], progress: "_Progress | None") -> None:
        entry, stop = self.entries[key], threading.Event()
        timestamps = self.columns["timestamp"].numpy()
        found, first, count = np.unique(
            self.columns["episode_index"].numpy(), return_index=True, return_counts=True
        )
        first_row, lengths = dict(zip(found, first, strict=True)), dict(zip(found, count, strict=True))

        def decode(episode: int) -> None:
            start, end = int(self.starts[episode]), int(self.ends[episode])
            if (there := lengths.get(episode, 0)) != end - start:
                raise RunError(
                    f"{self.dataset.repo_id}: episode {episode} has {there} rows in the tables, meta/episodes says "
                    f"{end - start}."
                )
            rows = range(first_row[episode], first_row[episode] + end - start)
            frames = self.source.episode(key, episode, rows, timestamps[rows.start : rows.stop])
            entry.write(slice(start, end), itertools.takewhile(lambda frame: not stop.is_set(), frames))

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "build", torch.set_num_threads, (1,)) as pool:
            try:
                for _ in pool.map(decode, episodes):
                    if progress:
                        progress.tell("decoding frames")
            except BaseException:
                stop.set()  # others must not go on for minutes
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _opened_again(source: FrameSource, folder: Path) -> FrameCache:
    cache = FrameCache(source, folder)
    cache.fill()
    return cache


def open_frames(
    dataset: LeRobotDataset,
    options: DataOptions,
    *,
    reads: int,
    say: Callable[[str], None] = lambda text: None,
    name: str = "frame cache",
) -> FrameCache | FrameSource:
    """A data set's frames: out of the cache, where all of them are then decoded, or else decoded one by one.

    Args:
        options: `cache` is `off`, a folder, or `auto`, which looks whether it is worth it and there is room.
        reads: How many samples will be read in all.
        say: Takes the lines in which the user hears what was chosen and why.
        name: What is spoken of in these.
    """
    source = FrameSource(dataset, options.resize)
    if options.cache == "off":
        return source
    folder = folder_of(options)
    try:
        cache = FrameCache(source, folder)
        if not cache.entries:
            return source
        need = cache.missing_bytes()
        if options.cache == "auto" and need and (reason := why_not(cache, need, reads)):
            say(f"{name}: none, {reason}")
            return source
        decoding = ", decoding once for all workers and runs" if need else ""
        say(f"{name}: {gigabytes(cache.bytes())} of {len(cache.entries)} camera(s) in {folder}{decoding}")
        if cache.bytes() > _free_memory():
            say(f"{name}: larger than the free memory, so frames come from the disk; --data.resize helps")
        cache.fill(say)
    except NoFrame as error:  # LeRobot trains on until it comes to that frame
        say(f"{name}: none, frames are decoded one by one; {error}")
        return source
    except OSError as error:
        say(
            f"{name}: none, {folder} cannot be used ({error.strerror or error}); frames are decoded one by one"
        )
        return source
    return cache


def why_not(cache: FrameCache, need: int, reads: int) -> str | None:
    """Why frames had better not be kept; None if they had."""
    missing = need // max(entry.frame_bytes for entry in cache.entries.values())
    deltas = cache.source.dataset.reader.delta_indices or {}
    reads *= sum(len(deltas.get(key, (0,))) for key in cache.entries)
    # Measured: decoding a data set from front to back costs as much as a fifth of an epoch of single frames.
    if 5 * reads < missing:
        return f"the run reads {reads} frames and {missing} would have to be decoded (--data.cache=FOLDER does it)"
    free = free_bytes(cache.folder)
    if need > 0.9 * free:
        return f"the frames need {gigabytes(need)} and {gigabytes(free)} are free in {cache.folder} (--data.resize helps)"
    return None


def _free_memory() -> int:
    """Bytes that can be had without swapping, page cache included."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**63


class _Progress:
    """Tells now and then how far the decoding has come, whoever does it."""

    def __init__(self, cache: FrameCache, say: Callable[[str], None]):
        self.cache, self.say = cache, say
        self.total = cache.missing_bytes()
        self.begun = self.told = time.monotonic()

    def tell(self, what: str) -> None:
        now = time.monotonic()
        if now - self.told < TELL_EVERY_S:
            return
        self.told = now
        done = 1 - self.cache.missing_bytes() / self.total
        left = f", {duration((now - self.begun) * (1 / done - 1))} left" if done else ""
        self.say(f"{what}: {done:.0%}{left}")
