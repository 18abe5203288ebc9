"""`--data.source=stream`: Ray Data reads the data set from wherever it lies, decodes it on CPUs anywhere in the
cluster, and feeds the training workers.

The reader is Ray's own (`ray.data.read_lerobot`); here are the order in which it reads, and what turns its rows into
LeRobot's samples. Two things shuffle: every epoch has its episodes in an order of its own, and each worker draws its
batches from a buffer of samples.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.utils.constants import TRAINING_STATE_DIR, TRAINING_STEP
from ray.data.datasource import LeRobotDatasource, ReadTask

from ray_jobs.config.errors import InputError, first_line
from ray_jobs.config.recipe import Recipe
from ray_jobs.data import ffmpeg
from ray_jobs.data.frames import resized
from ray_jobs.data.stream import make_streamed, shuffle_buffer
from ray_jobs.storage import bucket
from ray_jobs.training import checkpoint

PREFETCHED_BATCHES = 2
DTYPES = {"f": np.float32, "i": np.int64, "u": np.int64}  # what LeRobot makes of numbers
OF_THE_READER = ("dataset_index", "stats")  # columns that LeRobot's samples have not


class ShuffledEpisodes(LeRobotDatasource):
    """Ray's LeRobot reader with a new order of the episodes whenever the data set is read, that is for every epoch."""

    def __init__(self, root: str, **how: Any):
        super().__init__(root, read_granularity="episode", **how)
        self.original_metas = []  # files of the node it was made on; what is read needs none of it
        self.order = np.random.default_rng()

    def get_read_tasks(self, *args: Any, **kwargs: Any) -> list[ReadTask]:
        tasks = super().get_read_tasks(*args, **kwargs)
        return [tasks[n] for n in self.order.permutation(len(tasks))]


@dataclass
class AsLeRobot:
    """Turns rows of Ray's reader into samples of `LeRobotDataset`: keys, shapes, dtypes, padding masks, task strings.

    But for two things, which `FrameReader` has as well: cameras are uint8, and resized ones have no `<camera>_is_pad`.
    """

    cameras: dict[str, bool]
    """Cameras, and whether their frames have a time step that LeRobot drops: the only one of a video."""
    size: list[int] | None
    """Height and width that frames are resized to."""
    ends: np.ndarray | None
    """For each episode, the first frame that is not trained on; None if all are (`drop_n_last_frames`)."""

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        keep = slice(None) if self.ends is None else rows["frame_index"] < self.ends[rows["episode_index"]]
        samples = {}
        without = {*OF_THE_READER, *(f"{key}_is_pad" for key in self.cameras if self.size)}
        for key, column in rows.items():
            if key in without:
                continue
            if key != "task" and column.dtype == object:  # an array for each row
                column = np.stack(list(column))
            column = column[keep]
            if key in self.cameras:
                samples[key] = self._frames(key, column)
            else:
                samples[key] = column.astype(DTYPES.get(column.dtype.kind, column.dtype), copy=False)
        return samples

    def _frames(self, key: str, frames: np.ndarray) -> np.ndarray:
        """(N, H, W, C) or (N, T, H, W, C) to channels first, at the size asked for."""
        frames = np.ascontiguousarray(np.moveaxis(frames, -1, -3))
        if self.size:
            frames = resized(torch.from_numpy(frames), self.size).numpy()
        return frames[:, 0] if self.cameras[key] else frames


def source_of(recipe: Recipe) -> Callable[[], ray.data.Dataset]:
    """What Ray Train calls whenever it starts workers: gives the data set as a stream of samples."""
    cfg, options = recipe.lerobot, recipe.options
    dataset = make_streamed(cfg, options.data.eval_episodes)
    deltas = resolve_delta_timestamps(cfg.policy, dataset.meta)
    videos = {
        key: key in dataset.meta.video_keys and len((deltas or {}).get(key, ())) == 1
        for key in dataset.meta.camera_keys
    }
    ends = np.asarray(dataset.meta.episodes["length"]) - dataset.dropped if dataset.dropped else None
    root, how = cfg.dataset.root, {}
    if bucket.is_uri(root):
        how["filesystem"], root = bucket.open_root(root, patient=True)[0], bucket.plain(root)
    how |= {
        "episodes": dataset.episodes,
        "delta_timestamps": deltas,
        "frame_tolerance_s": cfg.tolerance_s,
    }
    try:
        link_on_every_node()
    except ray.exceptions.RayTaskError as error:
        raise InputError(
            f"--data.source=stream: {ffmpeg.links_folder()}: {first_line(error.cause)}"
        ) from None
    decoders = {"env_vars": ffmpeg.search_path(ffmpeg.links_folder(), "${LD_LIBRARY_PATH}")}
    # Ray's reader wants torchcodec where it is made, and this process has started without its libraries.
    make = ray.remote(num_cpus=0, runtime_env=decoders)(lambda: ShuffledEpisodes(root, **how))
    try:
        source = ray.get(make.remote())
    except ray.exceptions.RayTaskError as error:
        raise InputError(f"--dataset.root={cfg.dataset.root}: Ray Data: {first_line(error.cause)}") from None
    as_lerobot = AsLeRobot(videos, options.data.resize, ends)
    return functools.partial(_read, source, as_lerobot, decoders, cfg.seed or 0, recipe.output_dir)


def _read(
    source: ShuffledEpisodes, as_lerobot: AsLeRobot, decoders: dict, seed: int, output_dir: Path
) -> ray.data.Dataset:
    """Called in Ray Train's controller. Workers that were started anew begin their epoch again, in another order."""
    link_on_every_node()  # one may have come in place of another
    source.order = np.random.default_rng((seed, steps_done(output_dir)))
    blocks = source.default_num_blocks()
    rows = ray.data.read_datasource(source, override_num_blocks=blocks, runtime_env=decoders)
    return rows.map_batches(as_lerobot, batch_size=None, runtime_env=decoders)


def link_on_every_node() -> None:
    """Give all nodes FFmpeg's libraries for torchcodec (see `ffmpeg`)."""
    link = ray.remote(num_cpus=0)(ffmpeg.link)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    ray.get([link.options(label_selector={"ray.io/node-id": n}).remote(ffmpeg.links_folder()) for n in nodes])


def steps_done(output_dir: Path) -> int:
    """Optimizer steps of the run's last checkpoint."""
    newest = checkpoint.last_checkpoint(output_dir)
    if newest is None:
        return 0
    return json.loads((newest / TRAINING_STATE_DIR / TRAINING_STEP).read_text())["step"]


def epochs(recipe: Recipe, shard: ray.data.DataIterator, *, pinned: bool) -> Callable[[int], Iterator[dict]]:
    """A function of a seed: one worker's batches of one epoch, as `FrameReader` gives them.

    Args:
        shard: The worker's part of the stream; every worker's has as many samples.
        pinned: Give images in page-locked memory, from which a GPU copies without waiting.
    """
    buffer = shuffle_buffer(recipe)[0]
    cameras = make_streamed(recipe.lerobot, recipe.options.data.eval_episodes).meta.camera_keys

    def epoch(seed: int) -> Iterator[dict]:
        batches = shard.iter_batches(
            batch_size=recipe.lerobot.batch_size,
            batch_format="numpy",
            prefetch_batches=PREFETCHED_BATCHES,
            local_shuffle_buffer_size=buffer,
            local_shuffle_seed=seed,
        )
        try:
            for columns in batches:
                tasks = columns.pop("task").tolist()
                batch = {key: torch.tensor(column) for key, column in columns.items()}
                for key in cameras if pinned else ():
                    batch[key] = batch[key].pin_memory()
                yield batch | {"task": tasks}
        except ray.exceptions.RayError as error:  # Ray tries again; in the end this is what the user sees
            reasons = [
                text for text in str(error).splitlines() if re.match(r"[\w.]*(Error|Exception): ", text)
            ]
            reason = reasons[-1] if reasons else first_line(error)
            raise RuntimeError(f"{recipe.lerobot.dataset.root} cannot be read: {reason}") from error

    return epoch
