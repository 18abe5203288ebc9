"""A data set whose samples come as a stream, as the loop sees it: metadata, held-out episodes, endless batches. Where
the stream comes from is `stream_reader`'s business; no Ray here.
"""

import copy
import itertools
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.factory import make_dataset, resolve_delta_timestamps
from lerobot.utils.constants import IMAGENET_STATS

from ray_jobs.config.errors import RunError
from ray_jobs.config.recipe import Recipe
from ray_jobs.data.frames import frame_shape, set_frame_size
from ray_jobs.storage import bucket

BUFFER_BYTES = 2**30  # of decoded samples that a worker shuffles among, unless told otherwise
BUFFER_SAMPLES = 10_000


@dataclass
class StreamedDataset:
    """What the loop must know of a data set whose samples come to it as a stream."""

    meta: LeRobotDatasetMetadata
    episodes: list[int]
    dropped: int
    """Frames at the end of each episode that are not trained on (`drop_n_last_frames`)."""

    @property
    def num_episodes(self) -> int:
        return len(self.episodes)

    @property
    def num_frames(self) -> int:
        return sum(self._lengths())

    @property
    def num_samples(self) -> int:
        """Frames that are trained on."""
        return sum(max(0, length - self.dropped) for length in self._lengths())

    def _lengths(self) -> list[int]:
        lengths = list(self.meta.episodes["length"])
        return [lengths[episode] for episode in self.episodes]


def make_streamed_datasets(
    cfg: TrainPipelineConfig, eval_episodes: list[int] | None, size: list[int] | None = None
) -> tuple[StreamedDataset, LeRobotDataset | None]:
    """As `make_datasets`: the training data set is known by its metadata alone; the held-out one is local, its files
    fetched to this node if they lie in a bucket."""
    dataset = make_streamed(cfg, eval_episodes, size)
    _, held_out = split_episodes(cfg, dataset.meta, eval_episodes)
    if not held_out:
        return dataset, None
    local = copy.deepcopy(cfg)
    if bucket.is_uri(cfg.dataset.root):
        local.dataset.root = str(bucket.fetch(cfg.dataset.root, tuple(held_out)))
    local.dataset.episodes = held_out
    eval_dataset = make_dataset(local)
    set_frame_size(eval_dataset.meta, size)
    return dataset, eval_dataset


def make_streamed(
    cfg: TrainPipelineConfig, eval_episodes: list[int] | None, size: list[int] | None = None
) -> StreamedDataset:
    """The first of `make_streamed_datasets`."""
    root = bucket.fetch(cfg.dataset.root) if bucket.is_uri(cfg.dataset.root) else cfg.dataset.root
    meta = LeRobotDatasetMetadata(cfg.dataset.repo_id, root=root)
    if cfg.dataset.use_imagenet_stats:  # as LeRobot's `make_dataset` has them
        for key in meta.camera_keys:
            meta.stats.setdefault(key, {}).update(
                {name: torch.tensor(stats) for name, stats in IMAGENET_STATS.items()}
            )
    set_frame_size(meta, size)
    episodes, _ = split_episodes(cfg, meta, eval_episodes)
    return StreamedDataset(meta, episodes, getattr(cfg.policy, "drop_n_last_frames", None) or 0)


def split_episodes(
    cfg: TrainPipelineConfig, meta: LeRobotDatasetMetadata, eval_episodes: list[int] | None
) -> tuple[list[int], list[int]]:
    """Episodes to train on and to hold out, as `make_datasets` chooses them: under `--dataset.eval_split` LeRobot
    takes the last ones of every task, rounded up."""
    chosen = cfg.dataset.episodes if cfg.dataset.episodes is not None else list(range(meta.total_episodes))
    if eval_episodes is not None:
        return [episode for episode in chosen if episode not in eval_episodes], list(eval_episodes)
    by_task: dict[str, list[int]] = {}
    tasks = list(meta.episodes["tasks"])
    for episode in chosen:
        by_task.setdefault(tasks[episode][0] if tasks[episode] else "", []).append(episode)
    train: list[int] = []
    held_out: list[int] = []
    for episodes in by_task.values():
        left = len(episodes) - math.ceil(len(episodes) * cfg.dataset.eval_split)
        train, held_out = train + episodes[:left], held_out + episodes[left:]
    return train, held_out


def shuffle_buffer(recipe: Recipe) -> tuple[int, int]:
    """Samples that each worker shuffles among, and their bytes: `--data.shuffle_buffer`, else what fits into a GiB."""
    cfg, options = recipe.lerobot, recipe.options.data
    meta = make_streamed(cfg, options.eval_episodes, options.resize).meta
    deltas = resolve_delta_timestamps(cfg.policy, meta) or {}
    frames = {key: len(deltas.get(key, [0])) for key in meta.camera_keys}
    sample = sum(math.prod(frame_shape(meta, key)) * count for key, count in frames.items())
    samples = options.shuffle_buffer or max(1, min(BUFFER_SAMPLES, BUFFER_BYTES // max(1, sample)))
    return samples, samples * sample


def streamed_batches(
    cfg: TrainPipelineConfig,
    dataset: StreamedDataset,
    accelerator: Accelerator,
    stream: Callable[[int], Iterator[dict]],
    *,
    epoch: int = 0,
    step: int = 0,
) -> Generator[dict, None, None]:
    """Endless training batches of this rank out of a stream. A resumed run begins the epoch it was in again, in
    another order.

    Args:
        stream: This rank's batches of one epoch, shuffled by a seed.
        epoch, step: Where the run begins, or goes on.
    """
    for number in itertools.count(epoch):
        seed = np.random.SeedSequence((cfg.seed or 0, number, step, accelerator.process_index))
        batches = stream(int(seed.generate_state(1)[0]))
        first = next(batches, None)
        if first is None:
            raise RunError("the stream gives no sample: fewer are trained on than there are workers.")
        yield first
        yield from batches
