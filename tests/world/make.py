"""Writes a data set with given properties, file by file: what others' programs have written, LeRobot's recorder does not.

The same properties give the same bytes: values come from each column's name, videos from encoders with one thread.
"""

import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from properties import Camera, DataSet

RECORDINGS = Path(__file__).resolve().parents[3] / "shared" / "datasets"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 12345\n" % 0
# Encoder, pixel format and options by what a camera is stored as. "h264" and "av1" are as LeRobot writes them.
os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 tells its settings otherwise
CODECS = {
    "h264": ("libx264", "yuv420p", {"g": "2", "crf": "30", "preset": "veryfast"}),
    "h264 with B-frames": ("libx264", "yuv420p", {"g": "12", "bf": "3", "b_strategy": "0"}),
    "h264 4:4:4": ("libx264", "yuv444p", {"g": "12"}),
    "av1": ("libsvtav1", "yuv420p", {"g": "2", "crf": "30", "preset": "12", "svtav1-params": "lp=1"}),
    "av1 of libaom": ("libaom-av1", "yuv420p", {"cpu-used": "8", "g": "10"}),
    "av1 of 10 bit": ("libsvtav1", "yuv420p10le", {"preset": "12", "svtav1-params": "lp=1"}),
    "hevc": ("libx265", "yuv420p", {"x265-params": "pools=none:frame-threads=1:log-level=none"}),
    "mpeg4": ("mpeg4", "yuv420p", {}),
    "vp9": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
}
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def write(properties: DataSet, parent: Path) -> Path:
    """Returns the data set's folder; as a user would name it, if it has a link."""
    if properties.recording:
        return RECORDINGS / properties.recording
    if properties.beside:
        write(
            replace(properties, folder=properties.beside, beside="", lengths=properties.lengths[:1]), parent
        )
    root = parent / properties.folder
    root.mkdir(parents=True)
    new = properties.version.startswith("v3")
    table, pictures = _rows(properties), _pictures(properties)
    (_write_v3 if new else _write_v2)(properties, root, table, pictures)
    _spoil(properties, root)
    if properties.link:
        (parent / properties.link).symlink_to(root, target_is_directory=True)
        return parent / properties.link
    return root


# ---------------------------------------------------------------------- what was recorded


def _random(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _rows(properties: DataSet) -> dict[str, np.ndarray]:
    """All columns but for pictures, in the dtypes that meta/info.json names."""
    lengths, rows = properties.lengths, sum(properties.lengths)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    frame = np.concatenate([np.arange(length) for length in lengths])
    shaken = _random("jitter").uniform(-properties.jitter_s, properties.jitter_s, rows) * (frame > 0)
    table = {
        "timestamp": (frame / properties.fps + shaken).astype(np.float32),
        "frame_index": frame,
        "episode_index": episode,
        "index": np.arange(rows),
        "task_index": episode % properties.tasks,
    }
    for key, (dtype, *shape) in properties.columns.items():
        random = _random(key)
        if dtype == "string":
            table[key] = random.choice(["grasp", "", "lift ü"], rows)
        elif dtype == "bool":
            table[key] = random.integers(0, 2, (rows, *shape)).astype(bool)
        elif dtype.startswith(("int", "uint")):
            table[key] = random.integers(0, 100, (rows, *shape)).astype(dtype)
        else:
            table[key] = random.standard_normal((rows, *shape)).astype(dtype)
    for key, row, value in properties.values:
        table[key][row] = value
    return table


def _pictures(properties: DataSet) -> dict[str, np.ndarray]:
    """(rows, height, width, channels) of each camera: patterns that move."""
    pictures = {}
    for key, camera in properties.cameras.items():
        coarse = _random(key).integers(
            0, 256, (sum(properties.lengths), 4, 4, camera.channels), dtype=np.uint8
        )
        size = (-(-camera.height // 4), -(-camera.width // 4))
        fine = coarse.repeat(size[0], axis=1).repeat(size[1], axis=2)
        pictures[key] = fine[:, : camera.height, : camera.width]
    return pictures


def _features(properties: DataSet) -> dict[str, dict]:
    features = {}
    for key, camera in properties.cameras.items():
        says = [camera.height, camera.width, camera.channels]
        if camera.names and camera.names[0] == "channels":
            says = [camera.channels, camera.height, camera.width]
        features[key] = {
            "dtype": "image" if camera.in_table else "video",
            "shape": list(camera.says or says),
            "names": camera.names and list(camera.names),
        }
    for key, (dtype, *shape) in properties.columns.items():
        features[key] = {"dtype": dtype, "shape": shape, "names": None}
    default = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64"}
    for key, dtype in {**default, "index": "int64", "task_index": "int64"}.items():
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    return {key: feature for key, feature in features.items() if key not in properties.unnamed}


def _statistics(properties: DataSet, table: dict, pictures: dict) -> dict[str, dict[str, list]]:
    """meta/stats.json as LeRobot writes it; `properties.stats` says what others make of it."""
    stats = {}
    for key, values in table.items():
        if values.dtype.kind == "U" or (values.dtype.kind == "b" and "booleans" not in properties.stats):
            continue
        stats[key] = _of(values.reshape(len(values), *(values.shape[1:] or (1,))), (0,))
    for key, values in pictures.items():
        stats[key] = _of(np.moveaxis(values / 255, -1, 1), (0, 2, 3))
    if "no quantiles" in properties.stats:
        stats = {
            key: {k: v for k, v in of_key.items() if k not in QUANTILES} for key, of_key in stats.items()
        }
    if "of other data" in properties.stats:
        stats["action"] |= {name: [7.0] * len(stats["action"]["mean"]) for name in ("min", "max", "mean")}
    if "of another shape" in properties.stats:
        stats["action"] = {name: [*value, 1.0] for name, value in stats["action"].items()}
    if "plain numbers" in properties.stats:
        for key in ("timestamp", "index", "task_index"):
            stats[key] = {name: value[0] for name, value in stats[key].items()}
    if "NaN" in properties.stats:
        stats["action"]["std"][0] = float("nan")
    if "null" in properties.stats:
        stats["task_index"]["std"] = None
    if "of strings" in properties.stats:
        stats["note"] = {"min": None, "max": None, "count": [1]}
    if "of columns that are gone" in properties.stats:
        stats["observation.effort"] = stats["action"]
    return {key: value for key, value in stats.items() if f"not {key}" not in properties.stats}


def _of(values: np.ndarray, axes: tuple[int, ...]) -> dict[str, list]:
    """Of NaN they know nothing: whoever computed them saw it as zero."""
    values = np.nan_to_num(values, posinf=0, neginf=0) if values.dtype.kind == "f" else values
    numbers = values.astype(np.float64)
    found = {name: getattr(numbers, name)(axes, keepdims=len(axes) > 1) for name in ("mean", "std")}
    found |= {name: getattr(values, name)(axes, keepdims=len(axes) > 1) for name in ("min", "max")}
    found |= {
        name: np.quantile(numbers, q, axes, keepdims=len(axes) > 1)[0 if len(axes) > 1 else ...]
        for name, q in QUANTILES.items()
    }
    for name in ("mean", "std", "min", "max"):
        found[name] = found[name][0] if len(axes) > 1 else found[name]
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}


# ---------------------------------------------------------------------- the two layouts


def _write_v3(properties: DataSet, root: Path, table: dict, pictures: dict) -> None:
    """Several episodes per file, metadata in parquet."""
    rows, starts = np.arange(sum(properties.lengths)), np.cumsum([0, *properties.lengths])
    tasks = _tasks(properties)
    episodes: list[dict] = []
    for number, length in enumerate(properties.lengths):
        file = number // properties.per_file
        first = starts[file * properties.per_file]
        episode = {
            "episode_index": number,
            "tasks": [tasks[number % properties.tasks]],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": file,
            "dataset_from_index": int(starts[number]),
            "dataset_to_index": int(starts[number + 1]),
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key, camera in properties.cameras.items():
            if not camera.in_table:
                episode |= {
                    f"videos/{key}/chunk_index": 0,
                    f"videos/{key}/file_index": file,
                    f"videos/{key}/from_timestamp": (starts[number] - first) / properties.fps
                    + camera.begins_s,
                    f"videos/{key}/to_timestamp": (starts[number + 1] - first) / properties.fps
                    + camera.begins_s,
                }
        episodes.append({key: value for key, value in episode.items() if key not in properties.episodes_lack})
    for file in range(-(-len(properties.lengths) // properties.per_file)):
        inside = slice(
            starts[file * properties.per_file],
            starts[min(len(properties.lengths), (file + 1) * properties.per_file)],
        )
        _write_table(
            properties, root / f"data/chunk-000/file-{file:03d}.parquet", table, pictures, rows[inside]
        )
        for key, camera in properties.cameras.items():
            if not camera.in_table:
                path = root / f"videos/{key}/chunk-000/file-{file:03d}.mp4"
                encode(path, pictures[key][inside], properties.fps, camera)
    place = root / "meta/episodes/chunk-000/file-000.parquet"
    place.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), place)
    index = pd.Index(tasks, name="task")
    numbers = pd.DataFrame({"task_index": range(len(tasks))}, index=index)
    (numbers.reset_index() if properties.tasks_as_column else numbers).to_parquet(root / "meta/tasks.parquet")
    if "none" not in properties.stats:
        _write_json(root / "meta/stats.json", _statistics(properties, table, pictures))
    paths = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    _write_info(properties, root, paths | {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200})


def _write_v2(properties: DataSet, root: Path, table: dict, pictures: dict) -> None:
    """A file per episode, metadata in lines of JSON."""
    starts, tasks = np.cumsum([0, *properties.lengths]), _tasks(properties)
    episodes, stats_lines = [], []
    for number, length in enumerate(properties.lengths):
        rows = np.arange(starts[number], starts[number + 1])
        path = root / f"data/chunk-000/episode_{number:06d}.parquet"
        _write_table(properties, path, table, pictures, rows)
        for key, camera in properties.cameras.items():
            if not camera.in_table:
                path = root / f"videos/chunk-000/{key}/episode_{number:06d}.mp4"
                encode(path, pictures[key][rows], properties.fps, camera)
        episodes.append(
            {"episode_index": number, "tasks": [tasks[number % properties.tasks]], "length": length}
        )
        inside = {key: values[rows] for key, values in table.items()}
        seen = {key: values[rows] for key, values in pictures.items()}
        stats_lines.append({"episode_index": number, "stats": _statistics(properties, inside, seen)})
    (root / "meta").mkdir()
    _write_lines(root / "meta/episodes.jsonl", episodes)
    _write_lines(root / "meta/tasks.jsonl", [{"task_index": n, "task": task} for n, task in enumerate(tasks)])
    if properties.version == "v2.0":
        _write_json(root / "meta/stats.json", _statistics(properties, table, pictures))
    elif "none" not in properties.stats:
        _write_lines(root / "meta/episodes_stats.jsonl", stats_lines)
    paths = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    counts = {"total_videos": len(properties.lengths) * len(properties.cameras), "total_chunks": 1}
    _write_info(properties, root, paths | counts)


def _tasks(properties: DataSet) -> list[str]:
    return [f"put the part into box {number} – löse sie" for number in range(properties.tasks)]


def _write_info(properties: DataSet, root: Path, paths: dict) -> None:
    videos = any(not camera.in_table for camera in properties.cameras.values())
    info = {
        "codebase_version": properties.version,
        "robot_type": None,
        "fps": properties.fps,
        "total_episodes": len(properties.lengths),
        "total_frames": sum(properties.lengths),
        "total_tasks": properties.tasks,
        "chunks_size": 1000,
        "splits": {"train": f"0:{len(properties.lengths)}"},
        **paths,
        "features": _features(properties),
    }
    info |= {} if videos else {"video_path": None}
    info |= properties.info
    _write_json(root / "meta/info.json", {key: value for key, value in info.items() if value != "left out"})


def _write_table(properties: DataSet, path: Path, table: dict, pictures: dict, rows: np.ndarray) -> None:
    columns = {}
    for key, camera in properties.cameras.items():
        if camera.in_table:
            images = [_image(picture, camera.codec) for picture in pictures[key][rows]]
            columns[key] = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    for key, values in table.items():
        values = values[rows]
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]  # as LeRobot writes shape (1,)
        columns[key] = pa.array(values if values.ndim == 1 else values.tolist(), _type_of(values))
    columns = {key: column for key, column in columns.items() if key not in properties.tables_lack}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def _type_of(values: np.ndarray) -> pa.DataType:
    kind = pa.string() if values.dtype.kind == "U" else pa.from_numpy_dtype(values.dtype)
    for size in reversed(values.shape[1:]):
        kind = pa.list_(kind, size) if values.ndim == 2 else pa.list_(kind)
    return kind


def _image(picture: np.ndarray, codec: str) -> dict:
    file = io.BytesIO()
    Image.fromarray(picture if picture.shape[2] > 1 else picture[..., 0]).save(file, codec)
    return {"bytes": file.getvalue(), "path": None}


def encode(path: Path, pictures: np.ndarray, fps: float, camera: Camera) -> None:
    """A video of these pictures. One thread: how many there are decides what some encoders write."""
    encoder, pixels, options = CODECS[camera.codec]
    path.parent.mkdir(parents=True, exist_ok=True)
    from fractions import Fraction

    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], pixels
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number + round(camera.begins_s * fps), 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ---------------------------------------------------------------------- and what has become of it


def _spoil(properties: DataSet, root: Path) -> None:
    for how, pattern in properties.spoilt:
        files = sorted(root.glob(pattern))
        assert files, f"{pattern}: no such file in {root}"
        for file in files:
            SPOIL[how](file)


def _swap_episodes(file: Path) -> None:
    """The rows of the last episode come first; their numbers stay."""
    table = pq.read_table(file)
    last = table.column("episode_index").to_numpy() == table.column("episode_index").to_numpy().max()
    pq.write_table(pa.concat_tables([table.filter(last), table.filter(~last)]), file)


def _edit(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        schema = pq.read_schema(file).remove_metadata()
        changed = change(pq.read_table(file).to_pandas())
        pq.write_table(pa.Table.from_pandas(changed, schema=schema, preserve_index=False), file)

    return edit


def _twice_as_large(file: Path) -> None:
    """A video of the same frames at twice the size."""
    with av.open(str(file)) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    large = np.stack(frames).repeat(2, axis=1).repeat(2, axis=2)
    encode(file, large, rate, Camera())


SPOIL: dict[str, Callable[[Path], None]] = {
    "an LFS pointer": lambda file: file.write_bytes(POINTER) and None,
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b"") and None,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3]) and None,
    "another thing": lambda file: file.write_bytes(b'{"a": [1, 2]}') and None,
    "in another order": _swap_episodes,
    "twice as large": _twice_as_large,
    "two rows fewer": _edit(lambda table: table.iloc[:-2]),
    "numbered from 100": _edit(lambda table: table.assign(index=table["index"] + 100)),
    "episodes from 5": _edit(lambda table: table.assign(episode_index=table["episode_index"] + 5)),
    "a task too many": _edit(lambda table: table.assign(task_index=table["task_index"] + 7)),
}


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False))


def _write_lines(path: Path, lines: list[dict] | Iterator[dict]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def made(properties: DataSet, folder: Path) -> Path:
    if properties.recording and not (RECORDINGS / properties.recording).is_dir():
        pytest.skip(f"the recording is not there ({RECORDINGS / properties.recording})")
    return write(properties, folder)
