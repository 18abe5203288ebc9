"""Data sets of LeRobot v2.1: whether LeRobot's converter can take one, and the command that converts it.

The converter finds out at its end what it lacks: a traceback, and a half-made folder. So what it reads is looked at first.
"""

import glob
import json
import shlex
from pathlib import Path

import pyarrow.parquet as pq

from ray_jobs.storage import git_lfs

VERSION = "v2.1"
PARTS = ("meta", "data", "videos")
TABLES = ("tasks", "episodes", "episodes_stats")  # meta/*.jsonl
COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # of every LeRobot table


def faults(root: Path, info: dict, repo_id: str) -> list[str]:
    """One line for what the converter cannot take; a line and a command if there is nothing."""
    if pointers := git_lfs.pointers(path for part in PARTS for path in sorted(root.glob(f"{part}/**/*.*"))):
        return [git_lfs.fault(pointers)]
    if found := _lacking(root, info):
        return [f"a LeRobot {VERSION} data set that LeRobot cannot convert: {fault}" for fault in found]
    return [
        f"a LeRobot {VERSION} data set; this LeRobot reads v3.0. This converts it in place, and keeps the old one as "
        f"{root.name}_old:\n"
        f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={shlex.quote(repo_id)} "
        f"--root={shlex.quote(str(root))} --push-to-hub=false"
    ]


def _lacking(root: Path, info: dict) -> list[str]:
    """What the converter reads and does not find, or would take for something else."""
    found = [
        f"meta/info.json has no {field}."
        for field in ("fps", "features", "total_chunks", "total_videos", "video_path")
        if field not in info
    ]
    found += [
        f"meta/{name}.jsonl is missing." for name in TABLES if not (root / "meta" / f"{name}.jsonl").is_file()
    ]
    for name in ("_old", "_v30"):  # it would remove the one, or the data set itself in favour of the other
        if (other := root.parent / f"{root.name}{name}").exists():
            found.append(
                f"{other} is there, and one of the two would be removed. Give it another name first."
            )
    if found:
        return found
    try:
        episodes, stats = (_lines(root / "meta" / f"{name}.jsonl") for name in TABLES[1:])
        lengths = [row["length"] for row in episodes]
        numbers = [row["episode_index"] for row in episodes]
        statistics = [row["episode_index"] for row in stats if row["stats"]]
    except (ValueError, KeyError, TypeError) as error:
        return [f"meta/*.jsonl are damaged ({type(error).__name__}: {error})."]
    everything = list(range(len(numbers)))
    if numbers != everything:
        found.append("meta/episodes.jsonl does not number its episodes 0, 1, 2 ...")
    if statistics != numbers:
        found.append(
            f"meta/episodes_stats.jsonl has {len(statistics)} episodes, meta/episodes.jsonl {len(numbers)}."
        )
    tables = sorted((root / "data").glob("*/*.parquet"))
    if len(tables) != len(numbers):
        found.append(f"data has {len(tables)} tables, meta/episodes.jsonl {len(numbers)} episodes.")
    features = info["features"]
    wanted = {*COLUMNS, *(key for key, feature in features.items() if feature["dtype"] != "video")}
    for table, length in zip(tables, lengths, strict=False):
        try:
            about = pq.read_metadata(table)
        except Exception as error:
            found.append(f"{table.relative_to(root)} is damaged: {error}")
            continue
        if missing := sorted(wanted - set(about.schema.to_arrow_schema().names)):
            found.append(f"{table.relative_to(root)} has no column {', '.join(missing)}.")
            break  # nor will the others
        if about.num_rows != length:
            found.append(
                f"{table.relative_to(root)} has {about.num_rows} rows, meta/episodes.jsonl says {length}."
            )
    for camera in (key for key, feature in features.items() if feature["dtype"] == "video"):
        videos = len(list((root / "videos").glob(f"*/{glob.escape(camera)}/*.mp4")))
        if videos != len(numbers):
            found.append(f"{camera} has {videos} videos, meta/episodes.jsonl {len(numbers)} episodes.")
    return found


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
