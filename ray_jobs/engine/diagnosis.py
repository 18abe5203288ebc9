"""What a data set holds and what is wrong with it, from its files: no step trusts what the step before it said.

Tables are read as they lie, since LeRobot refuses to open what is broken, and videos are taken apart into packets:
their times and key frames cost a thousandth of decoding them.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.configs.types import FeatureType
from lerobot.datasets import LeRobotDatasetMetadata

from ray_jobs.engine import quantiles
from ray_jobs.engine.dataset_options import DatasetOptions
from ray_jobs.engine.errors import InputError
from ray_jobs.engine.explain import first_line
from ray_jobs.engine.frames import frame_shape
from ray_jobs.engine.preflight_data import check_files, open_dataset

TOLERANCE_S = 1e-4  # LeRobot's


@dataclass
class Diagnosis:
    """`faults` stop a training or spoil it, `warnings` do not; `facts` are what the data set is."""

    facts: dict = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def diagnose(asked: DatasetOptions, policy) -> Diagnosis:
    """Look a data set over.

    Args:
        policy: A LeRobot policy config: which episodes are too short, and which statistics are needed.
    """
    found = Diagnosis()
    try:
        meta = open_dataset(asked.dataset)
    except InputError as error:
        found.faults.append(str(error))
        return found
    try:
        check_files(asked.dataset, meta)
    except InputError as error:
        found.faults.append(str(error))
    lengths = np.asarray(meta.episodes["length"])
    found.facts |= {
        "dataset": asked.dataset.repo_id,
        "episodes": meta.total_episodes,
        "frames": meta.total_frames,
        "fps": meta.fps,
        "seconds": round(meta.total_frames / meta.fps, 1),
        "episode_lengths": [int(lengths.min()), int(np.median(lengths)), int(lengths.max())],
        "tasks": meta.tasks.index.tolist(),
    }
    columns = _columns(meta, found)
    if "timestamp" in columns and "episode_index" in columns:
        _rows(meta, columns, found)
        _times(meta, columns, found)
    _numbers(meta, columns, found)
    _statistics(meta, columns, policy, found)
    _chunks(lengths, policy, found)
    found.facts["cameras"] = {key: _camera(meta, key, columns, found) for key in meta.camera_keys}
    return found


def _columns(meta: LeRobotDatasetMetadata, found: Diagnosis) -> dict[str, np.ndarray]:
    """The tables' numbers, (frames,) or (frames, dimensions), in the order of the files."""
    wanted = [k for k, f in meta.features.items() if f["dtype"] not in ("video", "image", "string")]
    tables = []
    for path in sorted((meta.root / "data").glob("*/*.parquet")):
        try:
            tables.append(pq.read_table(path, columns=wanted))
        except Exception as error:
            found.faults.append(f"{path.relative_to(meta.root)} cannot be read: {first_line(error)}")
    if not tables:
        return {}
    table = pa.concat_tables(tables, promote_options="permissive")
    for key in set(wanted) - set(table.column_names):
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


def _rows(meta: LeRobotDatasetMetadata, columns: dict[str, np.ndarray], found: Diagnosis) -> None:
    """Every episode has the rows that meta/episodes says, in order."""
    rows = Counter(columns["episode_index"].tolist())
    wrong = {e: n for e, n in enumerate(meta.episodes["length"]) if rows[e] != n}
    for episode, length in list(wrong.items())[:3]:
        found.faults.append(
            f"episode {episode} has {rows[episode]} rows in the tables, meta/episodes says {length}."
        )
    if len(wrong) > 3:
        found.faults.append(f"... and so on for {len(wrong)} episodes.")
    total = len(columns["episode_index"])
    if not wrong and not np.array_equal(columns["index"], np.arange(total)):
        found.faults.append(
            "the rows are not numbered 0, 1, 2 ... by 'index': LeRobot would read the wrong ones."
        )


def _times(meta: LeRobotDatasetMetadata, columns: dict[str, np.ndarray], found: Diagnosis) -> None:
    """Timestamps lie on the grid of the frame rate."""
    episode, stamps = columns["episode_index"], columns["timestamp"].astype(np.float64)
    inside = episode[1:] == episode[:-1]
    steps = np.diff(stamps)[inside]
    if len(steps) and abs(np.median(steps) * meta.fps - 1) > 0.01:
        found.faults.append(
            f"meta/info.json says {meta.fps} fps, the timestamps are {np.median(steps):.4g} s apart: "
            f"{1 / np.median(steps):.3g} fps."
        )
        return
    # float32 seconds are coarser than the tolerance after half an hour
    allowed = TOLERANCE_S + np.spacing(stamps.astype(np.float32))
    off = np.abs(stamps - columns["frame_index"] / meta.fps) > allowed
    if off.any():
        worst = np.abs(stamps - columns["frame_index"] / meta.fps).argmax()
        away = stamps[worst] - columns["frame_index"][worst] / meta.fps
        found.faults.append(
            f"{off.sum()} timestamps are off the grid of {meta.fps} fps, in episode(s) {_some(episode[off])}; "
            f"the worst by {away:.4g} s (episode {episode[worst]}, frame {columns['frame_index'][worst]})."
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
            found.warnings.append(f"{key}: dimension(s) {_some(named)} never move.")


def _statistics(meta: LeRobotDatasetMetadata, columns: dict, policy, found: Diagnosis) -> None:
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


def _chunks(lengths: np.ndarray, policy, found: Diagnosis) -> None:
    chunk = len(policy.action_delta_indices)
    short = np.flatnonzero(lengths < chunk)
    if len(short):
        found.warnings.append(
            f"episode(s) {_some(short)} are shorter than the {chunk} actions that {policy.type} predicts: "
            "the rest is padding."
        )


def _camera(meta: LeRobotDatasetMetadata, key: str, columns: dict, found: Diagnosis) -> dict:
    """Codec, size and key frames of a camera; sees that every row has its frame in the video."""
    feature, (channels, height, width) = meta.features[key], frame_shape(meta, key)
    facts = {
        "shape": [height, width, channels],
        "stored_as": feature["dtype"],
        "depth": key in meta.depth_keys,
    }
    if key in meta.image_keys:
        return facts
    starts = meta.episodes[f"videos/{key}/from_timestamp"]
    in_file: dict[Path, list[int]] = {}
    for episode in range(meta.total_episodes):
        in_file.setdefault(meta.root / meta.get_video_file_path(episode, key), []).append(episode)
    distances, codecs, without = [], set(), Counter()
    for path, episodes in in_file.items():
        try:
            times, keys, about = _packets(path)
        except Exception:  # missing or damaged: check_files has said so, or the table below does
            times, keys, about = np.empty(0), np.empty(0, bool), None
        if about:
            codecs.add(about)
            distances += np.diff([*np.flatnonzero(keys), len(keys)]).tolist()
        for episode in episodes if "timestamp" in columns else ():
            wanted = starts[episode] + columns["timestamp"][columns["episode_index"] == episode].astype(
                np.float64
            )
            padded = np.concatenate(([-np.inf], times, [np.inf]))
            after = np.searchsorted(padded, wanted)
            away = np.minimum(wanted - padded[after - 1], padded[after] - wanted)
            # float32 seconds are coarser than the tolerance after half an hour
            missing = away >= TOLERANCE_S + np.spacing(wanted.astype(np.float32))
            if missing.any():
                without[episode] = int(missing.sum())
    if without:
        episode = next(iter(without))
        file = meta.get_video_file_path(episode, key)
        found.faults.append(
            f"{key}: {sum(without.values())} frames of episode(s) {_some(list(without))} are not in the video "
            f"({file}): it is cut short, or its times are others."
        )
    facts |= {
        "codecs": sorted(codecs),
        "files": len(in_file),
        "key_frame_distance": max(distances, default=0),
    }
    recorded = {f"{h}x{w}" for _, h, w in codecs}
    if recorded and recorded != {f"{height}x{width}"}:
        found.faults.append(
            f"{key}: the video is {_some(sorted(recorded))}, meta/info.json says {height}x{width}."
        )
    facts["codecs"] = sorted({codec for codec, *_ in codecs})
    return facts


def _packets(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, int, int]]:
    """Times in seconds and key-frame marks of a video's frames, in order of time; codec, height and width."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        try:
            packets = [
                (p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None and p.size
            ]
        except av.FFmpegError:
            packets = []
        packets.sort()
        times = np.array([float(pts * stream.time_base) for pts, _ in packets])
        about = (
            stream.codec_context.codec.canonical_name,
            stream.codec_context.height,
            stream.codec_context.width,
        )
        return times, np.array([key for _, key in packets], bool), about


def _some(values) -> str:
    """The first few of them."""
    values = list(dict.fromkeys(np.asarray(values).tolist()))
    return ", ".join(map(str, values[:5])) + (f" ... ({len(values)} in all)" if len(values) > 5 else "")
