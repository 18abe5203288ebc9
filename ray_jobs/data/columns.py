"""A data set's states, actions and other numbers as contiguous arrays, one per column.

LeRobot's table gives all columns of a row, through Python objects (4-6 ms per sample); an array gives the rows of a
batch at once. Written to the cache they are mapped into memory, so that all processes of a node share them.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import lerobot
import numpy as np
import torch
from lerobot.datasets import LeRobotDataset

from ray_jobs.config.errors import RunError
from ray_jobs.data.frame_store import COLUMNS_FILE
from ray_jobs.storage.fingerprint import FORMAT, file_hashes, fingerprint_of, hash_file
from ray_jobs.storage.records import read_json

if TYPE_CHECKING:
    import pyarrow as pa

COUNTERS = ("timestamp", "episode_index", "index", "task_index")

_checked: set[Path] = set()  # arrays that this process found to be good


def columns_of(dataset: LeRobotDataset) -> dict[str, torch.Tensor]:
    """The (filtered) table's columns but for images, by name."""
    table, images = dataset.hf_dataset.data, dataset.meta.image_keys
    return {key: _contiguous(table.column(key)) for key in dataset.hf_dataset.features if key not in images}


def cached_columns(dataset: LeRobotDataset, folder: Path) -> dict[str, torch.Tensor]:
    """The same, mapped from `<folder>/<data set>.columns.<fingerprint>/`, which is written if it is not there.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    content = file_hashes(dataset.root, ("meta/info.json", "data/**/*.parquet"), folder)
    fingerprint = fingerprint_of(FORMAT, lerobot.__version__, dataset.episodes, content)
    place = folder / f"{dataset.repo_id.replace('/', '--')}.columns.{fingerprint}"
    if not _is_sound(place):
        shutil.rmtree(place, ignore_errors=True)
        scratch = place.with_name(f".{place.name}.{os.getpid()}")
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            for key, column in columns_of(dataset).items():
                np.save(scratch / f"{key}.npy", column.numpy())
            checksums = {file.name: hash_file(file) for file in scratch.glob("*.npy")}
            (scratch / COLUMNS_FILE).write_text(json.dumps(checksums))
            with contextlib.suppress(OSError):  # another process has been faster
                scratch.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    # Copy on write: nobody writes, but torch wants arrays that could be.
    arrays = {path.stem: np.load(path, mmap_mode="c") for path in sorted(place.glob("*.npy"))}
    return {key: torch.from_numpy(arrays[key]) for key in dataset.hf_dataset.features if key in arrays}


def _is_sound(place: Path) -> bool:
    try:
        checksums = read_json(place / COLUMNS_FILE)
        if place in _checked:
            return True
        if all(hash_file(place / name) == checksum for name, checksum in checksums.items()):
            _checked.add(place)
            return True
    except (OSError, ValueError):
        pass
    return False


def _contiguous(column: "pa.ChunkedArray") -> torch.Tensor:
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


def check_rows(dataset: LeRobotDataset) -> None:
    """See that the rows are where LeRobot will look for them, and that no policy is given NaN.

    Raises:
        RunError: They are not: episode, rows or column.
    """
    table, meta = dataset.hf_dataset.data, dataset.meta
    bounds = meta.episodes.with_format("numpy", columns=["dataset_from_index", "dataset_to_index"])[:]
    chosen = range(len(meta.episodes)) if dataset.episodes is None else sorted(dataset.episodes)
    spans = [
        (episode, bounds["dataset_from_index"][episode], bounds["dataset_to_index"][episode])
        for episode in chosen
    ]
    found = {key: table.column(key).to_numpy() for key in COUNTERS if key != "timestamp"}
    expected = np.concatenate([np.full(end - begin, episode) for episode, begin, end in spans])
    rows, counts = np.unique(found["episode_index"], return_counts=True)
    counted = dict(zip(rows.tolist(), counts.tolist(), strict=True))
    for episode, begin, end in spans:
        if counted.get(episode, 0) != end - begin:
            raise RunError(
                f"{meta.repo_id}: episode {episode} has {counted.get(episode, 0)} rows in the tables, meta/episodes "
                f"says {end - begin}."
            )
    index = np.concatenate([np.arange(begin, end) for _, begin, end in spans])
    if not (np.array_equal(found["index"], index) and np.array_equal(found["episode_index"], expected)):
        raise RunError(
            f"{meta.repo_id}: the rows of the tables are not numbered 0, 1, 2 ... by 'index': LeRobot would read the "
            "wrong ones."
        )
    unknown = found["task_index"][(found["task_index"] >= len(meta.tasks)) | (found["task_index"] < 0)]
    if len(unknown):
        raise RunError(
            f"{meta.repo_id}: there are rows of task {unknown[0]}, meta/tasks has {len(meta.tasks)}."
        )
