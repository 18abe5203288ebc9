"""Data sets in a bucket (`--dataset.root=s3://bucket/set`): what is small comes to this node, metadata and the files of
held-out episodes. Whatever fsspec opens will do; credentials and endpoints are the environment's (`AWS_*`).
"""

import fcntl
import functools
from pathlib import Path

import fsspec
from lerobot.datasets import LeRobotDatasetMetadata

from ray_jobs.engine.errors import InputError
from ray_jobs.engine.explain import first_line
from ray_jobs.engine.fingerprint import fingerprint_of
from ray_jobs.engine.frame_cache import default_folder

ANONYMOUS = "anonymous@"  # Ray Data's sign of a public bucket: s3://anonymous@bucket/set
IMPATIENT = {"s3": {"config_kwargs": {"connect_timeout": 10, "retries": {"max_attempts": 2}}}}


def is_uri(root: str | Path | None) -> bool:
    return root is not None and "://" in str(root)


def open_root(root: str, *, patient: bool = False) -> tuple[fsspec.AbstractFileSystem, str]:
    """A data set's file system, and where in it the data set lies.

    Args:
        patient: For days of reading; otherwise who has mistyped an address is told within seconds.

    Raises:
        InputError: Nothing here opens such an address.
    """
    options = {} if patient else IMPATIENT.get(root.partition("://")[0], {})
    options = options | ({"anon": True} if ANONYMOUS in root else {})
    try:
        system, place = fsspec.core.url_to_fs(plain(root), **options)
    except (ImportError, ValueError) as error:  # the package is not here, or there is no such protocol
        raise InputError(f"--dataset.root={root}: cannot be opened: {first_line(error)}") from None
    return system, place.rstrip("/")


def plain(root: str) -> str:
    return root.replace(ANONYMOUS, "").rstrip("/")


@functools.cache
def fetch(root: str, episodes: tuple[int, ...] = ()) -> Path:
    """A folder of this node with the data set's metadata, and all files that `episodes` lie in.

    Raises:
        InputError: The bucket cannot be read, or holds no data set there.
    """
    there = listing(root, "meta")
    if "meta/info.json" not in there:
        raise InputError(f"--dataset.root={root}: not a LeRobot data set, it has no meta/info.json.")
    folder = default_folder() / "fetched" / fingerprint_of(plain(root), sorted(there.items()))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # one process of a node fetches, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        _get(root, folder, there)
        if episodes:
            meta = LeRobotDatasetMetadata("fetched/set", root=folder)
            files = listing(root, "data", "videos")
            _get(root, folder, {name: files.get(name, "") for name in files_of(meta, episodes)})
    return folder


def _get(root: str, folder: Path, files: dict[str, str]) -> None:
    """Fetch files by name, unless they are here in the version that goes with it."""
    system, place = open_root(root)
    for name, version in files.items():
        file = folder / name
        note = file.with_name(f".{file.name}.version")
        if file.exists() and note.exists() and note.read_text() == version:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}.part")
        try:
            system.get_file(f"{place}/{name}", str(scratch))
        except Exception as error:
            raise InputError(f"--dataset.root={root}: {name}: {_reason(error)}") from None
        scratch.replace(file)
        note.write_text(version)


def listing(root: str, *folders: str) -> dict[str, str]:
    """Files below the data set's `folders`, relative to its root, each with what tells one version from another."""
    system, place = open_root(root)
    found = {}
    try:
        for folder in folders:
            for name, about in system.find(f"{place}/{folder}", detail=True).items():
                version = about.get("ETag") or about.get("etag") or about.get("mtime")
                found[name.removeprefix(f"{place}/")] = f"{about['size']} {version}"
    except Exception as error:
        raise InputError(f"--dataset.root={root}: cannot be read: {_reason(error)}") from None
    return found


def files_of(meta: LeRobotDatasetMetadata, episodes: tuple[int, ...]) -> list[str]:
    """Names of the parquet and video files that `episodes` lie in."""
    names = {str(meta.get_data_file_path(episode)) for episode in episodes}
    names |= {str(meta.get_video_file_path(e, key)) for e in episodes for key in meta.video_keys}
    return sorted(names)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
