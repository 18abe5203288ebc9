"""What a data set holds and what is wrong with it, from its files: no step trusts what the step before it said.

Tables are read as they lie, since LeRobot refuses to open what is broken, and videos are taken apart into packets:
their times and key frames cost a thousandth of decoding them.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy_config
from lerobot.utils.feature_utils import dataset_to_policy_features

from ray_jobs.checks.columns import check_tables, tasks_unread
from ray_jobs.checks.dataset import (
    DatasetOptions,
    check_episodes,
    file_faults,
    misnamed,
    open_dataset,
    unfit,
    where_it_is,
    with_episodes,
)
from ray_jobs.checks.dataset_files import fault_of, metadata_faults
from ray_jobs.checks.preflight import check_features
from ray_jobs.checks.video_times import camera, some
from ray_jobs.config.errors import InputError, first_line
from ray_jobs.config.recipe import Recipe
from ray_jobs.data import quantiles
from ray_jobs.data.dataset_cache import own_metadata
from ray_jobs.policies.facts import FACTS

TOLERANCE_S = 1e-4  # LeRobot's


@dataclass
class Diagnosis:
    """`faults` stop a training or spoil it, `warnings` do not; `facts` are what the data set is."""

    facts: dict = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def advise(self, text: str) -> None:
        if text not in self.advice:  # each camera may need it
            self.advice.append(text)


def diagnose(asked: DatasetOptions, recipe: Recipe, *, named: bool = True) -> Diagnosis:
    """Look a data set over, the episodes that were asked for.

    Args:
        recipe: Its policy tells which episodes are too short, and which statistics are needed.
        named: Whether the user named the policy. If not, a data set that it cannot be trained on is none the worse for that.
    """
    found, policy = Diagnosis(), recipe.lerobot.policy
    name, root = where_it_is(asked.dataset)
    if root is not None and (faults := metadata_faults(root, asked.dataset.repo_id)):
        found.faults += [f"{name}: {fault}" for fault in faults]
        return found
    try:
        meta = open_dataset(asked.dataset)
    except InputError as error:
        found.faults.append(str(error))
        return found
    episodes = asked.dataset.episodes
    if episodes is not None:
        check_episodes("dataset.episodes", episodes, meta.total_episodes)
    episodes = sorted(episodes) if episodes is not None else list(range(meta.total_episodes))
    found.faults += file_faults(asked.dataset, meta)
    lengths = np.asarray(meta.episodes["length"])[episodes]
    found.facts |= {
        "dataset": asked.dataset.repo_id,
        "episodes": len(episodes),
        "frames": int(lengths.sum()),
        "fps": meta.fps,
        "seconds": round(int(lengths.sum()) / meta.fps, 1),
        "episode_lengths": [int(lengths.min()), int(np.median(lengths)), int(lengths.max())],
        "tasks": [str(task) for task in meta.tasks.index],
    }
    if unread := tasks_unread(meta):
        found.warnings.append(f"{unread}.")
    _features(meta, recipe, named, found)
    columns = _columns(meta, episodes, found)
    tables = _tables(meta, episodes)
    torn = {path for path in set(tables) if fault_of(path)}  # which has been said
    with_table = [episode for episode, path in zip(episodes, tables, strict=True) if path not in torn]
    if {"timestamp", "episode_index", "frame_index"} <= columns.keys():
        _rows(meta, columns, with_table, found)
        _times(meta, columns, found)
    _numbers(meta, columns, found)
    _statistics(meta, columns, policy, found)
    _chunks(np.array(episodes), lengths, policy, found)
    found.facts["cameras"] = {
        key: camera(meta, key, columns, with_table, asked.tolerance_s, found) for key in meta.camera_keys
    }
    if root is not None and not found.faults:  # what has been told would be told again
        try:
            check_tables(name, meta)
        except InputError as error:
            found.faults.append(str(error))
    return found


def _features(meta: LeRobotDatasetMetadata, recipe: Recipe, named: bool, found: Diagnosis) -> None:
    """Features have the names that LeRobot goes by, and are what policies take."""
    if fault := misnamed(meta):
        found.faults.append(fault)
        return
    if named:
        try:  # as before a training
            check_features(with_episodes(recipe, meta), own_metadata(meta))
        except InputError as error:
            found.faults.append(str(error))
        return
    features = dataset_to_policy_features(meta.features)
    reasons: dict[str, list[str]] = {}
    for kind in (kind for kind, facts in FACTS.items() if facts.counted):
        if reason := unfit(make_policy_config(kind, device="cpu"), features):
            reasons.setdefault(reason, []).append(kind)
    for reason, kinds in reasons.items():
        found.warnings.append(f"{', '.join(kinds)} cannot be trained on it: {reason}")


def _tables(meta: LeRobotDatasetMetadata, episodes: list[int]) -> list[Path]:
    """The table that each episode is in."""
    chunks, numbers = (list(meta.episodes[f"data/{name}_index"]) for name in ("chunk", "file"))
    return [meta.root / meta.data_path.format(chunk_index=chunks[e], file_index=numbers[e]) for e in episodes]


def _columns(meta: LeRobotDatasetMetadata, episodes: list[int], found: Diagnosis) -> dict[str, np.ndarray]:
    """The tables' numbers in those episodes, (frames,) or (frames, dimensions), in the order of the files."""
    wanted = [k for k, f in meta.features.items() if f["dtype"] not in ("video", "image", "string")]
    tables = []
    for path in sorted((meta.root / "data").glob("*/*.parquet")):
        if fault_of(path):
            continue  # which has been said
        try:
            there = [key for key in wanted if key in pq.read_schema(path).names]
            tables.append(pq.read_table(path, columns=there))
        except Exception as error:
            found.faults.append(f"{path.relative_to(meta.root)} cannot be read: {first_line(error)}")
    if not tables:
        return {}
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        found.faults.append(f"the tables do not go together: {first_line(error)}")
        return {}
    if len(episodes) < meta.total_episodes and "episode_index" in table.column_names:
        table = table.filter(pa.compute.is_in(table["episode_index"], pa.array(episodes)))
    for key in sorted(set(wanted) - set(table.column_names)):
        found.faults.append(f"the tables have no column {key}, which meta/info.json promises.")
    columns = {}
    for key in table.column_names:
        column = table.column(key).combine_chunks()
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            values = column.flatten().to_numpy(zero_copy_only=False)
            if len(values) % len(column):
                found.faults.append(f"{key}: its rows have different lengths.")
                continue
            columns[key] = values.reshape(len(column), -1)
        else:
            columns[key] = column.to_numpy(zero_copy_only=False)
    return columns


def _rows(
    meta: LeRobotDatasetMetadata, columns: dict[str, np.ndarray], episodes: list[int], found: Diagnosis
) -> None:
    """Every episode has the rows that meta/episodes says, in order, and of tasks that meta/tasks knows."""
    rows, lengths = Counter(columns["episode_index"].tolist()), list(meta.episodes["length"])
    wrong = {e: lengths[e] for e in episodes if rows[e] != lengths[e]}
    for episode, length in list(wrong.items())[:3]:
        found.faults.append(
            f"episode {episode} has {rows[episode]} rows in the tables, meta/episodes says {length}."
        )
    if len(wrong) > 3:
        found.faults.append(f"... and so on for {len(wrong)} episodes.")
    starts = list(meta.episodes["dataset_from_index"])
    numbers = np.concatenate([np.arange(starts[e], starts[e] + lengths[e]) for e in episodes])
    if not wrong and "index" in columns and not np.array_equal(columns["index"], numbers):
        found.faults.append(
            "the rows are not numbered 0, 1, 2 ... by 'index': LeRobot would read the wrong ones."
        )
    tasks = columns.get("task_index", np.zeros(0))
    unknown = tasks[(tasks < 0) | (tasks >= len(meta.tasks))]
    if len(unknown):
        found.faults.append(f"there are rows of task {unknown[0]}, meta/tasks has {len(meta.tasks)}.")


def _times(meta: LeRobotDatasetMetadata, columns: dict[str, np.ndarray], found: Diagnosis) -> None:
    """Timestamps lie on the grid of the frame rate. LeRobot goes by them only to find a video's frames, so what is off
    is a fault where a frame is not found."""
    episode, stamps = columns["episode_index"], columns["timestamp"].astype(np.float64)
    inside = episode[1:] == episode[:-1]
    steps = np.diff(stamps)[inside]
    if len(steps) and abs(np.median(steps) * meta.fps - 1) > 0.05:
        found.faults.append(
            f"meta/info.json says {meta.fps} fps, the timestamps are {np.median(steps):.4g} s apart: "
            f"{1 / np.median(steps):.3g} fps."
        )
        return
    away = stamps - columns["frame_index"] / meta.fps
    # float32 seconds are coarser than the tolerance after half an hour
    off = np.abs(away) > TOLERANCE_S + np.spacing(stamps.astype(np.float32))
    if off.any():
        worst = np.abs(away).argmax()
        found.warnings.append(
            f"{off.sum()} timestamps are off the grid of {meta.fps} fps, in episode(s) {some(episode[off])}; "
            f"the worst by {away[worst]:.4g} s (episode {episode[worst]}, frame {columns['frame_index'][worst]})."
        )


def _numbers(meta: LeRobotDatasetMetadata, columns: dict[str, np.ndarray], found: Diagnosis) -> None:
    """Ranges, NaN, and dimensions that never move."""
    found.facts["numbers"] = {}
    for key, values in columns.items():
        if not (key.startswith("observation.") or key == "action") or values.dtype.kind != "f":
            continue
        values = values if values.ndim == 2 else values[:, None]
        finite = np.isfinite(values)
        if not finite.all():
            row, dimension = np.argwhere(~finite)[0]
            where = f"first in episode {columns['episode_index'][row]}, frame {columns['frame_index'][row]}"
            found.faults.append(
                f"{key}: {(~finite).sum()} value(s) are NaN or infinite, {where}, dimension {dimension}."
            )
        values = np.where(finite, values, np.nan)
        with np.errstate(all="ignore"):
            low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        still = np.flatnonzero(low == high).tolist()
        found.facts["numbers"][key] = {
            "dimensions": values.shape[1],
            "min": low.tolist(),
            "max": high.tolist(),
            "never_move": still,
        }
        if still:
            names = meta.features[key].get("names")
            named = [names[d] for d in still] if isinstance(names, list) and len(names) == len(low) else still
            found.warnings.append(f"{key}: dimension(s) {some(named)} never move.")


def _statistics(
    meta: LeRobotDatasetMetadata, columns: dict, policy: PreTrainedConfig, found: Diagnosis
) -> None:
    """meta/stats.json has what policies normalize by, and it fits the data."""
    if meta.stats is None:
        found.faults.append("meta/stats.json is missing: nothing would be normalized.")
        return
    stats = meta.stats
    features = [k for k, f in meta.features.items() if k.startswith("observation.") or k == "action"]
    features = [key for key in features if meta.features[key]["dtype"] != "string"]
    missing = [key for key in features if not {"min", "max", "mean", "std"} <= set(stats.get(key, ()))]
    if missing:
        found.faults.append(f"meta/stats.json has no (whole) statistics of {', '.join(missing)}.")
    without = [key for key in features if key not in missing and not {"q01", "q99"} <= set(stats[key])]
    if without:
        # Those of states and actions a training computes itself.
        needed = FeatureType.VISUAL in quantiles.lacking(policy, meta).values()
        (found.faults if needed else found.warnings).append(
            f"meta/stats.json has no quantiles (q01, q99) of {', '.join(without)}; pi0.5 normalizes by them."
        )
    for key, facts in found.facts["numbers"].items():
        if key in stats and key not in missing:
            counted = np.asarray(stats[key]["max"]).size
            if counted != facts["dimensions"]:
                found.faults.append(
                    f"{key}: meta/stats.json is not of these data: it has {counted} dimensions, they have "
                    f"{facts['dimensions']}."
                )
                continue
            span = np.asarray(facts["max"]) - np.asarray(facts["min"]) + 1e-6
            away = np.abs(np.asarray(stats[key]["max"]).ravel() - facts["max"]) / span
            away = np.maximum(away, np.abs(np.asarray(stats[key]["min"]).ravel() - facts["min"]) / span)
            if (away > 0.01).any():
                found.warnings.append(
                    f"{key}: meta/stats.json is not of these data (dimension {away.argmax()})."
                )


def _chunks(episodes: np.ndarray, lengths: np.ndarray, policy: PreTrainedConfig, found: Diagnosis) -> None:
    chunk = len(policy.action_delta_indices or ())
    short = episodes[lengths < chunk]
    if len(short):
        found.warnings.append(
            f"episode(s) {some(short)} are shorter than the {chunk} actions that {policy.type} predicts: "
            "the rest is padding."
        )
