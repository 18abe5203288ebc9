"""Batches of a LeRobot data set, read as batches: columns are gathered for all samples at once, camera images come
out of the frame cache, or are decoded in threads of this process (PyAV releases the GIL)."""

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from lerobot.datasets import LeRobotDataset

from ray_jobs.data.columns import columns_of
from ray_jobs.data.frame_cache import FrameCache, can_cache
from ray_jobs.data.frames import FrameSource


class FrameReader:
    """Reads batches of frames: what `default_collate([dataset[i] for i in indices])` gives, bit for bit.

    But for two things. Camera images are uint8 also where LeRobot gives float32 (those stored in parquet); after
    `to_device` both are equal. And resized cameras have no `<camera>_is_pad`, which LeRobot's resize step would take
    for an image; no policy reads it.

    Args:
        dataset: A LeRobot data set; camera images come as uint8 (B, C, H, W) or, with observation history,
            (B, T, C, H, W).
        threads: Threads that decode side by side; 0 decodes in the caller's thread.
        frames: Where frames come from (see `open_frames`); by default they are decoded one by one.
        pinned: Give images in page-locked memory, from which a GPU copies without waiting.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        threads: int,
        frames: FrameCache | FrameSource | None = None,
        pinned: bool = False,
    ):
        self.dataset, self.pinned = dataset, pinned
        self.frames = FrameSource(dataset) if frames is None else frames
        self.cached = isinstance(frames, FrameCache)
        self.meta = dataset.meta
        # One torch thread each: the training's own threads would wait for theirs (OpenMP's count is per thread).
        self.pool = ThreadPoolExecutor(threads, "decode", torch.set_num_threads, (1,)) if threads else None
        columns = frames.columns if isinstance(frames, FrameCache) else columns_of(dataset)
        self.columns = {key: column.numpy() for key, column in columns.items()}  # numpy gathers twice as fast
        self.tasks = self.meta.tasks.index.to_numpy()
        self.deltas = {
            key: np.array(indices) for key, indices in (dataset.reader.delta_indices or {}).items()
        }
        # Rows of an episode are neighbours in the table, so a row's absolute index minus its row number
        # is the same all through the episode.
        bounds = self.meta.episodes.with_format("numpy", columns=["dataset_from_index", "dataset_to_index"])
        self.episode_start = np.asarray(bounds["dataset_from_index"][:])
        self.episode_end = np.asarray(bounds["dataset_to_index"][:])
        self.buffers: dict[tuple, list[np.ndarray]] = defaultdict(list)

    def __reduce__(self) -> tuple:
        return FrameReader, (self.dataset, 0, self.frames)

    @staticmethod
    def can_read(dataset: LeRobotDataset) -> bool:
        """Whether a data set is plain pictures and numbers. Depth and language columns are left to LeRobot."""
        meta = dataset.meta
        numbers = [f for key, f in meta.features.items() if key not in meta.camera_keys]
        return not (
            meta.has_language_columns
            or not all(can_cache(meta, key) for key in meta.camera_keys)
            or any(feature["dtype"] == "string" or len(feature["shape"]) > 1 for feature in numbers)
        )

    def __call__(self, indices: list[int]) -> dict:
        """The batch of rows `indices` (row numbers of the possibly filtered data set)."""
        rows = np.asarray(indices)
        episodes, absolute = self.columns["episode_index"][rows], self.columns["index"][rows]
        first, last = self.episode_start[episodes][:, None], self.episode_end[episodes][:, None] - 1
        shift = (absolute - rows)[:, None]
        batch = {key: column[rows] for key, column in self.columns.items()}
        images = {key: rows[:, None] for key in self.meta.camera_keys}  # (B, T)
        for key, deltas in self.deltas.items():
            wanted = absolute[:, None] + deltas  # (B, T), may leave the episode
            inside = wanted.clip(first, last) - shift
            if key in images:
                images[key] = inside
            else:
                batch[key] = self.columns[key][inside]
            if key not in images or self.frames.size is None:
                batch[f"{key}_is_pad"] = (wanted < first) | (wanted > last)
        tasks = self.tasks[batch["task_index"]].tolist()
        batch = {key: torch.from_numpy(values) for key, values in batch.items()}
        if self.cached:
            batch |= {key: self._cached(key, inside + shift) for key, inside in images.items()}
        else:
            batch |= self._decoded(images, episodes)
        for key, inside in images.items():
            # LeRobot drops a single time step of a video, and of an image that has no deltas.
            if inside.shape[1] == 1 and not (key in self.deltas and key in self.meta.image_keys):
                batch[key] = batch[key].squeeze(1)
        batch["task"] = tasks
        return batch

    def several(self, batches: list[list[int]]) -> list[dict]:
        """The batches of several lists of rows, read as one and cut apart: they share memory."""
        sizes = [len(indices) for indices in batches]
        whole = self(list(itertools.chain(*batches)))
        tasks = iter(whole.pop("task"))
        parts = {key: values.split(sizes) for key, values in whole.items()}
        return [
            {key: part[n] for key, part in parts.items()} | {"task": list(itertools.islice(tasks, size))}
            for n, size in enumerate(sizes)
        ]

    def __getitems__(self, indices: list[int]) -> dict:
        """The same batch with the data set's random image transforms, for a worker process of torch's DataLoader.
        They draw random numbers sample by sample and camera by camera, as LeRobot's do."""
        batch = self(indices)
        for key in self.meta.image_keys:
            batch[key] = batch[key].to(torch.float32).div_(255)
        samples = [
            [self.dataset.image_transforms(batch[key][n]) for key in self.meta.camera_keys]
            for n in range(len(indices))
        ]
        for key, frames in zip(self.meta.camera_keys, zip(*samples, strict=True), strict=True):
            batch[key] = torch.stack(frames)
        return batch

    def bytes_read(self, batch_size: int) -> int:
        """Of the camera images of a batch, if they are but read; decoding takes so long that it counts as very many."""
        if not isinstance(self.frames, FrameCache):
            return sys.maxsize
        sizes = (e.frame_bytes * len(self.deltas.get(key, (0,))) for key, e in self.frames.entries.items())
        return max(1, batch_size * sum(sizes))

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def _cached(self, key: str, absolute: np.ndarray) -> torch.Tensor:
        """uint8 frames (B, T, C, H, W) of absolute rows (B, T)."""
        assert isinstance(self.frames, FrameCache)
        shape = (absolute.size, *self.frames.entries[key].shape)
        frames = (
            torch.empty(shape, dtype=torch.uint8, pin_memory=True) if self.pinned else self._buffer(shape)
        )
        self.frames.read(key, absolute.ravel().tolist(), frames.numpy())
        return frames.view(*absolute.shape, *shape[1:])

    def _buffer(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory that no batch uses any more (fresh memory costs a page fault every 4 KB). torch has such a store
        for pinned memory only. A tensor holds a reference to its array as long as anything shares its storage."""
        for array in self.buffers[shape]:
            if sys.getrefcount(array) == FREE:
                return torch.from_numpy(array)
        self.buffers[shape].append(np.empty(shape, np.uint8))
        return torch.from_numpy(self.buffers[shape][-1])

    def _decoded(self, images: dict[str, np.ndarray], episodes: np.ndarray) -> dict[str, torch.Tensor]:
        """uint8 frames (B, T, C, H, W) by camera, of rows (B, T)."""
        source = self.frames
        assert isinstance(source, FrameSource)

        def frames(job: tuple[str, int, np.ndarray]) -> torch.Tensor:
            key, episode, rows = job
            if key in self.meta.image_keys:
                return torch.stack([source.image(key, row) for row in rows.tolist()])
            found = source.video(key, episode, self.columns["timestamp"][rows].tolist())
            return found if found.ndim == 4 else found[None]

        jobs = [
            (key, int(episode), rows)
            for key, of_camera in images.items()
            for episode, rows in zip(episodes, of_camera, strict=True)
        ]
        found = list(self._map(frames, jobs))
        each = len(episodes)
        return {key: torch.stack(found[n * each : (n + 1) * each]) for n, key in enumerate(images)}

    def _map[Job, Done](self, function: Callable[[Job], Done], jobs: list[Job]) -> Iterator[Done]:
        return self.pool.map(function, jobs) if self.pool else map(function, jobs)


def _references_of_a_free_array() -> int:  # type: ignore[return]  # its loop has one turn
    for array in [np.empty(1)]:
        return sys.getrefcount(array)


FREE = _references_of_a_free_array()  # in a list, in a loop variable, in the call: nowhere else
