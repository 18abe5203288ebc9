"""The files of a data set as they lie on a disk: are they there, whole, LeRobot's, and in today's format?

All that is wrong is found at once. Nothing here imports torch or LeRobot: a broken data set is answered in a second.
"""

import functools
import glob
import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import av
import pyarrow.parquet

from ray_jobs.checks import old_format
from ray_jobs.config.errors import InputError, first_line
from ray_jobs.storage import git_lfs
from ray_jobs.storage.trust import check_info, read_json

PARTS = ("meta", "data", "videos")
FORMAT = "v3.0"  # LeRobot's CODEBASE_VERSION


def fault_of(path: Path) -> str | None:
    """What is wrong with a file, as far as its first and last bytes show; None if nothing is."""
    if not path.is_file():
        return "is missing."
    about = path.stat()
    return _fault_of(path, about.st_mtime_ns, about.st_size)


@functools.cache  # a job looks before LeRobot is imported, and again with what LeRobot says
def _fault_of(path: Path, *changed: int) -> str | None:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".parquet":
            pyarrow.parquet.read_metadata(path)
        else:
            av.open(str(path)).close()
    except Exception as error:
        return f"is damaged: {getattr(error, 'strerror', None) or first_line(error)}"
    return None


def faults_of(root: Path, files: Iterable[tuple[Path, str]]) -> list[str]:
    """What is wrong with files of a data set, one line each, those that are pointers in one line.

    Args:
        files: Paths, and what to say behind the file's name.
    """
    found = {path: (fault, more) for path, more in files if (fault := fault_of(path))}
    pointers = git_lfs.pointers(found)
    told = [git_lfs.fault(pointers)] if pointers else []
    others = found.keys() - set(pointers)
    return told + [
        f"{p.relative_to(root)}{more} {fault}" for p, (fault, more) in found.items() if p in others
    ]


def missing_files(root: Path, episodes: Iterable[int] | None = None, opened: int | None = None) -> list[str]:
    """What is missing or torn of the tables and videos that will be read, of a data set whose metadata can be.

    Args:
        episodes: Those that will be read, by default all.
        opened: How many files are looked into at most, which takes 3 ms for a video; by default all.
    """
    info = read_json(root / "meta" / "info.json")
    cameras = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    patterns = {"data": info.get("data_path")} | {f"videos/{key}": info.get("video_path") for key in cameras}
    columns = [f"{kind}/{of}_index" for kind in patterns for of in ("chunk", "file")]
    tables = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    for path in tables:
        there = pyarrow.parquet.read_schema(path).names
        if lacking := [column for column in columns if column not in there]:
            return [f"meta/episodes has no column {', '.join(lacking)}."]
    rows = [row for path in tables for row in pyarrow.parquet.read_table(path, columns=columns).to_pylist()]
    wanted = range(len(rows)) if episodes is None else sorted({*episodes} & {*range(len(rows))})
    # LeRobot opens all tables that lie there, whatever episodes are asked for.
    files = {path: "" for path in sorted((root / "data").glob("*/*.parquet"))}
    for kind, pattern in patterns.items():
        for episode in wanted if pattern else ():
            chunk, file = (rows[episode][f"{kind}/{of}_index"] for of in ("chunk", "file"))
            place = {"chunk_index": chunk, "file_index": file, "video_key": kind.removeprefix("videos/")}
            try:
                path = root / pattern.format(**place)
            except ValueError as error:
                return [f"meta/episodes: {kind} of episode {episode}: {error}."]
            files[path] = files.get(path) or f" (episode {episode} is in it)"
    looked_at = (
        item for n, item in enumerate(files.items()) if opened is None or n < opened or not item[0].exists()
    )
    return faults_of(root, looked_at)


def count_episodes(root: Path) -> int:
    """How many episodes there are, of a data set whose metadata can be read."""
    tables = (root / "meta" / "episodes").glob("*/*.parquet")
    return sum(pyarrow.parquet.read_metadata(path).num_rows for path in tables)


def wrong_episodes(flag: str, episodes: list[int], total: int) -> list[str]:
    """Why these are not some of a data set's episodes, each once: one mistake, or none."""
    if not episodes or len(set(episodes)) < len(episodes):
        fault = "names an episode twice" if episodes else "name at least one episode, or leave it out"
        return [f"--{flag}={episodes}: {fault}."]
    if wrong := sorted(set(episodes) - set(range(total))):
        return [f"--{flag}={episodes}: there is no episode {wrong[0]}; the data set has 0 to {total - 1}."]
    return []


def refuse(name: str, faults: list[str]) -> None:
    """Raises InputError if there are any: the first one, and where the others are told."""
    if not faults:
        return
    more = f"\nThere are {len(faults) - 1} more faults; ray_jobs.doctor lists them."
    raise InputError(
        f"{name}: {faults[0]}{more if len(faults) > 1 and len(faults[0].splitlines()) == 1 else ''}"
    )


def metadata_faults(root: Path, repo_id: str) -> list[str]:
    """What keeps LeRobot from opening a data set: all of it, as far as the one does not hide the other."""
    info = root / "meta" / "info.json"
    if not root.exists():
        return ["there is no such folder."]
    if not info.is_file():
        return ["not a LeRobot data set, it has no meta/info.json."]
    if git_lfs.pointers([info]):
        return [git_lfs.fault([info])]
    try:
        content = read_json(info)
    except Exception as error:
        return [f"meta/info.json is damaged ({type(error).__name__}: {first_line(error)})."]
    if "codebase_version" not in content:
        return [
            f"not a LeRobot data set: meta/info.json has no codebase_version, it has {', '.join(content)}."
        ]
    version = str(content["codebase_version"])
    if version == old_format.VERSION:
        return old_format.faults(root, content, repo_id)
    if version.split(".")[0] != FORMAT.split(".")[0]:
        newer = version > FORMAT
        more = "; a newer LeRobot has made it" if newer else f" and can convert {old_format.VERSION}"
        return [f"a LeRobot {version} data set; this LeRobot reads {FORMAT}{more}."]
    faults = []
    try:
        check_info(content)
        if not content["fps"] > 0:
            raise ValueError(f"fps is {content['fps']}")
    except Exception as error:
        faults.append(f"meta/info.json is damaged ({type(error).__name__}: {first_line(error)}).")
    # A missing file would make LeRobot ask the Hub for the whole data set.
    episodes = sorted((root / "meta" / "episodes").glob("*/*.parquet")) or [root / "meta" / "episodes"]
    stats = root / "meta" / "stats.json"  # not all policies need one, nor does LeRobot
    files = [root / "meta" / "tasks.parquet", *([stats] if stats.exists() else []), *episodes]
    if git_lfs.pointers(files):  # then of all of them: one cause
        everything = (path for part in PARTS for path in sorted(root.glob(f"{part}/**/*.*")))
        return [*faults, git_lfs.fault(git_lfs.pointers(everything))]
    return faults + faults_of(root, [(path, "") for path in files]) + _read_as_a_pattern(root)


def _read_as_a_pattern(root: Path) -> list[str]:
    """LeRobot gives `datasets` the tables' paths, which takes them for patterns: those of the folder's name, too."""
    root = root.absolute()
    tables = [
        str(path) for part in ("meta/episodes", "data") for path in sorted(root.glob(f"{part}/*/*.parquet"))
    ]
    signs = [sign for sign in ("::", "**", "[", "?", "*") if sign in str(root)]
    if os.path.expandvars(root) != str(root):
        signs.append("$")
    if all(glob.glob(path) == [path] for path in tables[:1]) and not {"::", "**", "$"} & {*signs}:
        return []
    place = next(folder for folder in root.parents if not any(sign in str(folder) for sign in signs))
    name = re.sub(r"[^\w.-]+", "_", root.name).strip("_") + "_link"
    return [
        f"LeRobot's reader takes the '{signs[0]}' in the folder's name for a pattern. Another name will do, or a link:\n"
        f"ln -sT {shlex.quote(str(root))} {shlex.quote(str(place / name))}"
    ]
