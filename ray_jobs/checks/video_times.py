"""Whether every row of the tables has its frame in the videos, by the times of the videos' packets."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from lerobot.datasets import LeRobotDatasetMetadata
from numpy.typing import ArrayLike

from ray_jobs.data.frames import frame_shape

if TYPE_CHECKING:
    from ray_jobs.checks.diagnosis import Diagnosis

GRID_S = 1e-3  # how far from the grid of the frame rate a video's own frames may be: its clock counts in whole ticks


def camera(
    meta: LeRobotDatasetMetadata,
    key: str,
    columns: dict[str, np.ndarray],
    episodes: list[int],
    tolerance_s: float,
    found: "Diagnosis",
) -> dict:
    """Codec, size and key frames of a camera; adds to `found` what is wrong with its frames."""
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
    for episode in episodes:
        in_file.setdefault(meta.root / meta.get_video_file_path(episode, key), []).append(episode)
    distances, codecs, rows = [], set(), []
    for path, inside in in_file.items():
        try:
            times, keys, about = _packets(path)
        except Exception:  # missing or damaged, which has been said of it
            continue
        codecs.add(about)
        distances += np.diff([*np.flatnonzero(keys), len(keys)]).tolist()
        rows += [_Rows(e, starts[e], columns, times, meta.fps) for e in inside if "timestamp" in columns]
    _judge(key, rows, meta.fps, tolerance_s, found)
    recorded = {f"{h}x{w}" for _, h, w in codecs}
    if recorded and recorded != {f"{height}x{width}"}:
        found.faults.append(
            f"{key}: the video is {', '.join(sorted(recorded))}, meta/info.json says {height}x{width}."
        )
    if codecs:
        facts |= {
            "codecs": sorted({codec for codec, *_ in codecs}),
            "files": len(in_file),
            "key_frame_distance": max(distances, default=0),
        }
    return facts


class _Rows:
    """How far the rows of an episode are from their frames, in seconds; compared in float32, as LeRobot does.

    Attributes:
        away: From the nearest frame to the row's timestamp, whichever that is.
        on_grid: From the frame nearest to where the row's number belongs.
        others: Rows whose timestamp is nearest to another row's frame.
    """

    def __init__(self, episode: int, start: float, columns: dict, times: np.ndarray, fps: int):
        mine = columns["episode_index"] == episode
        stamps = start + columns["timestamp"][mine].astype(np.float64)
        numbers = start + columns["frame_index"][mine] / fps
        self.episode, self.rows = episode, len(stamps)
        self.away, nearest = _nearest(times, stamps)
        self.on_grid, own = _nearest(times, numbers)
        self.others = int((nearest != own).sum())


def _nearest(times: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest of ascending times, and which it is."""
    if not len(times):
        return np.full(len(wanted), np.inf), np.zeros(len(wanted), int)
    after = np.searchsorted(times, wanted).clip(0, len(times) - 1)
    before = (after - 1).clip(0)
    times, wanted = times.astype(np.float32), wanted.astype(np.float32)
    away = np.stack([np.abs(times[before] - wanted), np.abs(times[after] - wanted)])
    return away.min(0), np.where(away[0] <= away[1], before, after)


def _judge(key: str, rows: list[_Rows], fps: int, tolerance_s: float, found: "Diagnosis") -> None:
    """Say which rows have no frame, and what would help."""
    off = {row.episode: int((row.away >= tolerance_s).sum()) for row in rows}
    off = {episode: count for episode, count in off.items() if count}
    others = sum(row.others for row in rows)
    fits = all((row.on_grid < GRID_S).all() for row in rows)
    where = f"{sum(off.values())} frames of episode(s) {some(list(off))}"
    if off and not fits:
        found.faults.append(
            f"{key}: {where} are not in the video within --tolerance_s={tolerance_s:g}: it is cut short, or its times are others."
        )
        return
    exchanged = f"{others} rows are given another row's image"
    if off:
        furthest = float(max(row.away.max() for row in rows))
        found.faults.append(
            f"{key}: {where} are up to {furthest:.4g} s away from their timestamps, --tolerance_s={tolerance_s:g} is all that is allowed. "
            f"With --tolerance_s={above(furthest)} it trains, but {exchanged}."
        )
    elif others:
        found.warnings.append(f"{key}: by their timestamps {exchanged}.")
    else:
        return
    found.advise(
        f"The frames of the videos lie on the grid of {fps} fps: with timestamp = frame_index / {fps} in data/*/*.parquet "
        "(of a copy) every row has its own."
    )


def above(seconds: float) -> str:
    """A tolerance of two digits that is larger than `seconds`, in float32 as well, in which LeRobot compares."""
    seconds *= 1 + 1e-6
    digit = 10 ** (math.floor(math.log10(seconds)) - 1)
    return f"{(math.floor(seconds / digit) + 1) * digit:.2g}"


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
        assert stream.time_base is not None  # every stream of a file has one
        times = np.array([float(pts * stream.time_base) for pts, _ in packets])
        about = (
            stream.codec_context.codec.canonical_name,
            stream.codec_context.height,
            stream.codec_context.width,
        )
    return times, np.array([key for _, key in packets], bool), about


def some(values: ArrayLike) -> str:
    """The first few of them."""
    found = list(dict.fromkeys(np.asarray(values).tolist()))
    return ", ".join(map(str, found[:5])) + (f" ... ({len(found)} in all)" if len(found) > 5 else "")
