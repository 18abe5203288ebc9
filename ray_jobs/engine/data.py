"""From a LeRobot data set to batches on the training device.

The frames, their order and their shards are LeRobot's: `make_dataset`, `EpisodeAwareSampler`, accelerate's
`BatchSamplerShard`. What differs is how a batch is read: states, actions and the other columns are held as
contiguous arrays and gathered for the whole batch at once, videos are decoded in threads of this process
(PyAV releases the GIL) one batch ahead. No worker processes: nothing to spawn, nothing to copy.
"""

import contextlib
import copy
import itertools
import math
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from datasets.exceptions import DatasetGenerationError
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import (
    EpisodeAwareSampler,
    LeRobotDataset,
    LeRobotDatasetMetadata,
    compute_sampler_state,
)
from lerobot.datasets.factory import make_dataset, make_train_eval_datasets
from lerobot.datasets.video_utils import decode_video_frames
from lerobot.utils.collate import lerobot_collate_fn
from torch.utils.data import BatchSampler, DataLoader

from ray_jobs.engine.errors import RunError

PREFETCHED_BATCHES = 2
DECODER = threading.Lock()  # LeRobot keeps one torchcodec decoder per file, and they are not thread-safe


def make_datasets(
    cfg: TrainPipelineConfig, eval_episodes: list[int] | None
) -> tuple[LeRobotDataset, LeRobotDataset | None]:
    """The training data set and the held-out one (None without held-out episodes).

    Args:
        eval_episodes: An explicit list of held-out episodes, or None to follow `cfg.dataset.eval_split`.
    """
    try:
        if eval_episodes is None:
            return make_train_eval_datasets(cfg)
        held_out = copy.deepcopy(cfg)
        held_out.dataset.episodes = eval_episodes
        held_out.dataset.image_transforms.enable = False
        return make_dataset(cfg), make_dataset(held_out)
    except DatasetGenerationError as error:
        raise RunError(_torn_table(cfg) or f"cannot read {cfg.dataset.repo_id}: {error}") from error


def _torn_table(cfg: TrainPipelineConfig) -> str | None:
    """Which parquet file cannot be read; `datasets` does not say."""
    meta = LeRobotDatasetMetadata(cfg.dataset.repo_id, root=cfg.dataset.root, revision=cfg.dataset.revision)
    episodes: dict[Path, list[int]] = {}
    for episode in range(meta.total_episodes):
        episodes.setdefault(meta.root / meta.get_data_file_path(episode), []).append(episode)
    for path, inside in episodes.items():
        try:
            pq.read_table(path)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            return f"cannot read episodes {inside[0]} to {inside[-1]} from {path}: {reason}"
    return None


class FrameReader:
    """Reads batches of frames: what `default_collate([dataset[i] for i in indices])` gives, bit for bit.

    Args:
        dataset: A LeRobot data set; camera images come as uint8 (B, C, H, W) or, with observation history,
            (B, T, C, H, W).
        threads: Threads that decode videos side by side; 0 decodes in the caller's thread.
    """

    def __init__(self, dataset: LeRobotDataset, threads: int):
        self.dataset = dataset
        self.meta = dataset.meta
        # One torch thread each: the training's own threads would wait for theirs (OpenMP's count is per thread).
        self.pool = ThreadPoolExecutor(threads, "decode", torch.set_num_threads, (1,)) if threads else None
        table = dataset.hf_dataset.data
        self.columns = {key: _contiguous(table.column(key)) for key in dataset.hf_dataset.features}
        self.tasks = self.meta.tasks.index.to_numpy()
        self.deltas = {
            key: torch.tensor(indices) for key, indices in (dataset.reader.delta_indices or {}).items()
        }
        # Rows of an episode are neighbours in the table, so a row's absolute index minus its row number
        # is the same all through the episode.
        bounds = self.meta.episodes.with_format("numpy", columns=["dataset_from_index", "dataset_to_index"])
        self.episode_start = torch.from_numpy(np.asarray(bounds["dataset_from_index"][:]))
        self.episode_end = torch.from_numpy(np.asarray(bounds["dataset_to_index"][:]))
        self.files, self.file_start = {}, {}
        episodes = dataset.episodes if dataset.episodes is not None else range(self.meta.total_episodes)
        for key in self.meta.video_keys:
            self.files[key] = {e: dataset.root / self.meta.get_video_file_path(e, key) for e in episodes}
            starts = self.meta.episodes[f"videos/{key}/from_timestamp"]
            self.file_start[key] = {e: starts[e] for e in episodes}

    @staticmethod
    def can_read(dataset: LeRobotDataset) -> bool:
        """Whether a data set is plain video and numbers. Images in parquet, depth, language columns and
        random image transforms (which need a generator of their own) are left to LeRobot's reading."""
        meta = dataset.meta
        numbers = [f for key, f in meta.features.items() if key not in meta.camera_keys]
        return not (
            dataset.image_transforms is not None
            or meta.has_language_columns
            or meta.depth_keys
            or any(key not in meta.video_keys for key in meta.camera_keys)
            or any(feature["dtype"] == "string" or len(feature["shape"]) > 1 for feature in numbers)
        )

    def __call__(self, indices: list[int]) -> dict:
        """The batch of rows `indices` (row numbers of the possibly filtered data set)."""
        rows = torch.tensor(indices)
        episodes, absolute = self.columns["episode_index"][rows], self.columns["index"][rows]
        first, last = self.episode_start[episodes], self.episode_end[episodes] - 1
        batch = {key: column[rows] for key, column in self.columns.items()}
        stamps = {key: batch["timestamp"][:, None] for key in self.meta.video_keys}
        for key, deltas in self.deltas.items():
            wanted = absolute[:, None] + deltas  # (B, T), may leave the episode
            inside = wanted.clamp(first[:, None], last[:, None]) - (absolute - rows)[:, None]
            batch[f"{key}_is_pad"] = (wanted < first[:, None]) | (wanted > last[:, None])
            if key in stamps:
                stamps[key] = self.columns["timestamp"][inside]
            else:
                batch[key] = self.columns[key][inside]
        jobs = [
            (key, int(e), times)
            for key in stamps
            for e, times in zip(episodes, stamps[key].tolist(), strict=True)
        ]
        frames = list(self._map(lambda job: self._frames(*job), jobs))
        for n, key in enumerate(stamps):
            batch[key] = torch.stack(frames[n * len(indices) : (n + 1) * len(indices)])
        batch["task"] = self.tasks[batch["task_index"].numpy()].tolist()
        return batch

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def _map(self, function, jobs) -> Iterator:
        return self.pool.map(function, jobs) if self.pool else map(function, jobs)

    def _frames(self, key: str, episode: int, timestamps: list[float]) -> torch.Tensor:
        """uint8 frames of one camera: (C, H, W), or (T, C, H, W) with more than one timestamp."""
        path = self.files[key][episode]
        backend = self.dataset._video_backend
        try:
            with DECODER if backend == "torchcodec" else contextlib.nullcontext():
                return decode_video_frames(
                    path,
                    [self.file_start[key][episode] + t for t in timestamps],
                    self.dataset.tolerance_s,
                    backend,
                    return_uint8=True,
                ).squeeze(0)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RunError(f"cannot read {key} of episode {episode} from {path}: {reason}") from error


def _contiguous(column) -> torch.Tensor:
    """An Arrow column as one array, in the dtypes LeRobot gives: float32, int64, bool."""
    column = column.combine_chunks()
    width = None
    if hasattr(column, "flatten") and hasattr(column.type, "value_type"):
        width, column = len(column[0]), column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "f":
        values = values.astype(np.float32, copy=False)
    elif values.dtype.kind in "iu":
        values = values.astype(np.int64, copy=False)
    values = np.ascontiguousarray(values if width is None else values.reshape(-1, width))
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def training_batches(
    cfg: TrainPipelineConfig,
    dataset: LeRobotDataset,
    accelerator: Accelerator,
    *,
    batches_per_step: int = 1,
    resumed: dict | None = None,
) -> Iterator[dict]:
    """Endless training batches of this rank, in the order `lerobot-train` has under accelerate.

    Args:
        batches_per_step: Batches one optimizer step consumes on each rank.
        resumed: `training_step.json` of the checkpoint to go on from, or None at the start of a run.
    """
    sampler = EpisodeAwareSampler(
        dataset.meta.episodes["dataset_from_index"],
        dataset.meta.episodes["dataset_to_index"],
        episode_indices_to_use=dataset.episodes,
        drop_n_last_frames=getattr(cfg.policy, "drop_n_last_frames", 0),
        shuffle=True,
        seed=cfg.seed if cfg.seed is not None else 0,
        absolute_to_relative_idx=dataset.absolute_to_relative_idx,
    )
    ranks = accelerator.num_processes
    per_epoch = math.ceil(math.ceil(len(sampler) / cfg.batch_size) / ranks)
    epoch = skip = 0
    if resumed is not None:
        # Positions are counted with the worker count and batch size that wrote the checkpoint.
        at = compute_sampler_state(
            resumed["step"] * batches_per_step,
            len(sampler),
            resumed.get("batch_size", cfg.batch_size),
            resumed.get("num_processes", ranks),
        )
        epoch, skip = at["epoch"], at["start_index"] // (cfg.batch_size * ranks)
    sampler.set_epoch(epoch)
    # A resumed epoch is generated whole and its beginning skipped: accelerate pads the last batches of an
    # epoch with its first ones, which a sampler started in the middle would not know.
    rows = itertools.islice(_epochs(sampler, cfg.batch_size, accelerator), skip, None)

    # torch's DataLoader takes a number from the global generator whenever it starts an epoch (only the
    # first time with persistent workers). So must we, for noise and dropout to be lerobot-train's.
    draws_every_epoch = cfg.num_workers == 0 or not cfg.persistent_workers
    start = epoch * per_epoch + skip
    for position, batch in enumerate(_read(cfg, dataset, rows, accelerator, start), start):
        if position == 0 or (draws_every_epoch and position % per_epoch == 0):
            torch.empty((), dtype=torch.int64).random_()
        yield batch


def _epochs(sampler: EpisodeAwareSampler, batch_size: int, accelerator: Accelerator) -> Iterator[list[int]]:
    """Row numbers of this rank's batches, epoch after epoch."""
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    if accelerator.num_processes > 1:
        batches = BatchSamplerShard(batches, accelerator.num_processes, accelerator.process_index)
    while True:
        yield from batches


def _read(
    cfg: TrainPipelineConfig,
    dataset: LeRobotDataset,
    rows: Iterator[list[int]],
    accelerator: Accelerator,
    start: int,
) -> Iterator[dict]:
    """The batches of `rows`, a few of them read ahead; `start` is the number of the first one."""
    if not FrameReader.can_read(dataset):
        with_workers = cfg.num_workers > 0
        yield from DataLoader(
            dataset,
            batch_sampler=rows,
            num_workers=cfg.num_workers,
            prefetch_factor=cfg.prefetch_factor if with_workers else None,
            multiprocessing_context=cfg.dataloader_multiprocessing_context if with_workers else None,
            collate_fn=lerobot_collate_fn if dataset.meta.has_language_columns else None,
            pin_memory=accelerator.device.type == "cuda",
            # Its own: a resumed run must not draw from the global one again. It seeds the workers' image
            # transforms, which shall differ with the run's seed and not begin anew after a resume.
            generator=torch.Generator().manual_seed((cfg.seed or 0) + start),
        )
        return
    reader = FrameReader(dataset, threads=cfg.num_workers)
    if cfg.num_workers == 0:
        yield from map(reader, rows)
        return
    with ThreadPoolExecutor(1, "prefetch", torch.set_num_threads, (1,)) as prefetch:
        ahead = deque(prefetch.submit(reader, next(rows)) for _ in range(PREFETCHED_BATCHES))
        try:
            while True:
                batch = ahead.popleft().result()
                ahead.append(prefetch.submit(reader, next(rows)))
                yield batch
        finally:
            for future in ahead:
                future.cancel()
            reader.close()


def to_device(batch: dict, camera_keys: list[str], device: torch.device) -> dict:
    """Turn uint8 camera images into float32 in [0, 1], on the device: a quarter of the bytes to copy."""
    for key in camera_keys:
        if key in batch and batch[key].dtype == torch.uint8:
            batch[key] = batch[key].to(device, non_blocking=True).to(torch.float32).div_(255)
    return batch
