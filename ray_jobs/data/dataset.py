"""From a LeRobot data set to batches on the training device.

The frames, their order and their shards are LeRobot's: `make_dataset`, `EpisodeAwareSampler`, accelerate's
`BatchSamplerShard`. What differs is how a batch is read: as a batch, by one thread of this process, one batch ahead
(see `reader`). No worker processes: nothing to spawn, nothing to copy.
"""

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
)
from lerobot.datasets.factory import make_dataset, make_train_eval_datasets
from lerobot.utils.collate import lerobot_collate_fn
from torch.utils.data import BatchSampler, DataLoader

from ray_jobs.config.errors import RunError
from ray_jobs.config.events import Event, Notice
from ray_jobs.config.recipe import Recipe
from ray_jobs.data.columns import check_rows
from ray_jobs.data.dataset_cache import for_policy, once
from ray_jobs.data.frame_cache import FrameCache, open_frames
from ray_jobs.data.frames import FrameSource, set_frame_size
from ray_jobs.data.position import START, Position, Shards
from ray_jobs.data.reader import FrameReader

PREFETCHED = 2  # times what is handed over at once
HANDED_OVER_BYTES = 2**22  # from the prefetching thread, at a time
MOST_TOGETHER = 16  # batches


def make_datasets(
    cfg: TrainPipelineConfig, eval_episodes: list[int] | None, size: list[int] | None = None
) -> tuple[LeRobotDataset, LeRobotDataset | None]:
    """The training data set and the held-out one (None without held-out episodes).

    Args:
        eval_episodes: An explicit list of held-out episodes, or None to follow `cfg.dataset.eval_split`.
        size: Height and width that the metadata shall say images have; None leaves what they have.
    """

    def open_tables() -> tuple[LeRobotDataset, LeRobotDataset | None]:
        if eval_episodes is None:
            return make_train_eval_datasets(cfg)
        held_out = copy.deepcopy(cfg)
        held_out.dataset.episodes = eval_episodes
        held_out.dataset.image_transforms.enable = False
        return make_dataset(cfg), make_dataset(held_out)

    try:
        what = f"episodes {cfg.dataset.episodes}, {eval_episodes} held out, tolerance {cfg.tolerance_s}"
        opened = once(cfg.dataset, what, open_tables)
    except DatasetGenerationError as error:
        raise RunError(_torn_table(cfg) or f"cannot read {cfg.dataset.repo_id}: {error}") from error
    for of_set in opened:
        if of_set is not None:
            check_rows(of_set)
    dataset, eval_dataset = (of_set and for_policy(of_set, cfg.policy) for of_set in opened)
    for of_set in (dataset, eval_dataset):
        if of_set is not None:
            set_frame_size(of_set.meta, size)
    return dataset, eval_dataset


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


def open_all_frames(
    recipe: Recipe,
    dataset: LeRobotDataset,
    eval_dataset: LeRobotDataset | None,
    ranks: int,
    report: Callable[[Event], None],
) -> list[FrameCache | FrameSource | None]:
    """Where the camera images of the training and of the held-out data set come from (see `open_frames`); None for one
    that LeRobot reads, or that is streamed."""
    cfg, options = recipe.lerobot, recipe.options
    samples = cfg.steps * cfg.batch_size * ranks * options.ray.grad_accumulation * recipe.context.trainings
    validations = math.ceil(cfg.steps / recipe.eval_steps) if recipe.eval_steps else 0
    reads = samples, validations * (cfg.max_eval_samples or 10**9) * recipe.context.trainings

    def say(text: str) -> None:
        report(Notice(text))

    names = "frame cache", "frame cache of the held-out episodes"
    return [
        open_frames(of_set, options.data, reads=count, say=say, name=name)
        if isinstance(of_set, LeRobotDataset) and FrameReader.can_read(of_set)
        else None
        for of_set, count, name in zip((dataset, eval_dataset), reads, names, strict=True)
    ]


def training_batches(
    cfg: TrainPipelineConfig,
    dataset: LeRobotDataset,
    accelerator: Accelerator,
    *,
    shards: Shards | None = None,
    frames: FrameCache | FrameSource | None = None,
    batches_per_step: int = 1,
    begin: Position = START,
) -> Generator[dict, None, None]:
    """Endless training batches of this rank, in the order `lerobot-train` has under accelerate.

    Args:
        shards: Which of the data's order are this rank's; by default one of as many as there are ranks.
        frames: Where camera images come from (see `open_frames`); by default they are decoded one by one.
        batches_per_step: Batches one optimizer step consumes of each shard.
        begin: Where in the data's order.
    """
    if shards is None:
        shards = Shards(
            accelerator.num_processes, range(accelerator.process_index, accelerator.process_index + 1), 1
        )
    samplers = [_sampler(cfg, dataset) for _ in shards.mine]
    samples, taken = len(samplers[0]), cfg.batch_size * shards.count
    start = begin.within(samples)
    orders: list[Iterator[list[int]]] = []
    for shard, sampler in zip(shards.mine, samplers, strict=True):
        # A resumed epoch is generated from where its batches were first cut as they are now, which is from its beginning
        # if nothing has changed, and what was read is skipped: accelerate pads the last batches of an epoch with its first
        # ones, which a sampler started in the middle would not know.
        sampler.load_state_dict({"epoch": start.epoch, "start_index": start.start_index % taken})
        order = _epochs(sampler, cfg.batch_size, shards.count, shard)
        orders.append(itertools.islice(order, start.start_index // taken, None))

    # torch's DataLoader takes a number from the global generator whenever it starts an epoch (only the
    # first time with persistent workers). So must we, for noise and dropout to be lerobot-train's.
    draws_every_epoch = cfg.num_workers == 0 or not cfg.persistent_workers
    first_epoch = start.left(samples, cfg.batch_size, shards.count) if start.start_index else 0
    per_epoch = START.left(samples, cfg.batch_size, shards.count)
    # Random transforms shall not begin anew after a resume.
    seed = (cfg.seed or 0) + start.epoch * samples + start.start_index
    batches = _read(cfg, dataset, _in_turn(orders, batches_per_step), accelerator, seed, frames)
    for number, batch in enumerate(batches):
        step, turn = divmod(number, len(orders) * batches_per_step)
        number = (
            step * batches_per_step + turn - first_epoch
        )  # since an epoch began, of this worker's first shard
        begins = turn < batches_per_step and number >= 0 and number % per_epoch == 0
        if begins and (draws_every_epoch or (start == START and number == 0)):
            torch.empty((), dtype=torch.int64).random_()
        yield batch


def samples_of(cfg: TrainPipelineConfig, dataset: LeRobotDataset) -> int:
    """Samples of an epoch: the frames that are trained on."""
    return len(_sampler(cfg, dataset))


def _sampler(cfg: TrainPipelineConfig, dataset: LeRobotDataset) -> EpisodeAwareSampler:
    """As `lerobot-train` makes it."""
    return EpisodeAwareSampler(
        dataset.meta.episodes["dataset_from_index"],
        dataset.meta.episodes["dataset_to_index"],
        episode_indices_to_use=dataset.episodes,
        drop_n_last_frames=getattr(cfg.policy, "drop_n_last_frames", 0),
        shuffle=True,
        seed=cfg.seed if cfg.seed is not None else 0,
        absolute_to_relative_idx=dataset.absolute_to_relative_idx,
    )


def _epochs(sampler: EpisodeAwareSampler, batch_size: int, shards: int, shard: int) -> Iterator[list[int]]:
    """Row numbers of a shard's batches, epoch after epoch."""
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    if shards > 1:
        batches = BatchSamplerShard(batches, shards, shard)
    while True:
        yield from batches


def _in_turn(orders: list[Iterator[list[int]]], batches_per_step: int) -> Iterator[list[int]]:
    """The batches of several shards: those of one step, then those of the next."""
    while True:
        for order in orders:
            yield from itertools.islice(order, batches_per_step)


def _read(
    cfg: TrainPipelineConfig,
    dataset: LeRobotDataset,
    rows: Iterator[list[int]],
    accelerator: Accelerator,
    seed: int,
    frames: FrameCache | FrameSource | None,
) -> Iterator[dict]:
    """The batches of `rows`, a few of them read ahead; `seed` is for random image transforms."""
    on_gpu = accelerator.device.type == "cuda"
    if not reads_in_a_thread(dataset):
        # In processes: random transforms need a random generator of their own, and time.
        ours, with_workers = FrameReader.can_read(dataset), cfg.num_workers > 0
        lerobots = lerobot_collate_fn if dataset.meta.has_language_columns else None
        yield from DataLoader(
            FrameReader(dataset, 0, frames) if ours else dataset,  # type: ignore[arg-type]  # needs only __getitems__
            batch_sampler=rows,
            num_workers=cfg.num_workers,
            prefetch_factor=cfg.prefetch_factor if with_workers else None,
            multiprocessing_context=cfg.dataloader_multiprocessing_context if with_workers else None,
            collate_fn=_as_read if ours else lerobots,
            pin_memory=on_gpu,
            # Its own: a resumed run must not draw from the global one again. It seeds the workers' image transforms.
            generator=torch.Generator().manual_seed(seed),
        )
        return
    reader = FrameReader(dataset, cfg.num_workers, frames, pinned=on_gpu)
    if cfg.num_workers == 0:
        yield from map(reader, rows)
        return
    # Small batches are read and handed from thread to thread several at a time: either takes longer to begin than to do.
    together = min(MOST_TOGETHER, max(1, HANDED_OVER_BYTES // reader.bytes_read(cfg.batch_size)))

    if on_gpu:  # no thread may pin memory while the kernels of the first step are recorded
        yield reader(next(rows))

    def read() -> list[dict]:
        return reader.several(list(itertools.islice(rows, together)))

    with ThreadPoolExecutor(1, "prefetch", torch.set_num_threads, (1,)) as prefetch:
        ahead = deque(prefetch.submit(read) for _ in range(PREFETCHED))
        try:
            while True:
                batches = ahead.popleft().result()
                ahead.append(prefetch.submit(read))
                yield from batches
        finally:
            for future in ahead:
                future.cancel()
            reader.close()


def reads_in_a_thread(dataset: LeRobotDataset) -> bool:
    """Whether batches are read ahead by a thread of this process, and not by processes of LeRobot's loader."""
    return FrameReader.can_read(dataset) and dataset.image_transforms is None


def _as_read(batch: Any) -> Any:
    return batch


def to_device(batch: dict, camera_keys: list[str], device: torch.device) -> dict:
    """Turn uint8 camera images into float32 in [0, 1], on the device: a quarter of the bytes to copy."""
    for key in camera_keys:
        if key in batch and batch[key].dtype == torch.uint8:
            batch[key] = batch[key].to(device, non_blocking=True).to(torch.float32).div_(255)
    return batch
