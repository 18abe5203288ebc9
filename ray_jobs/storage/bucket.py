"""Data sets in a bucket (`--dataset.root=s3://bucket/set`): they are fetched once per node, all that is trained on, or
for a stream what is small, metadata and the files of held-out episodes. Credentials and endpoints are the environment's
(`AWS_*`).
"""

import fcntl
import functools
import shutil
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from lerobot.datasets import LeRobotDatasetMetadata

from ray_jobs.config.errors import InputError, StorageError, StorageFull, first_line, no_room
from ray_jobs.storage.cache_folder import default_folder
from ray_jobs.storage.fingerprint import fingerprint_of
from ray_jobs.storage.trust import check_name

ANONYMOUS = "anonymous@"  # Ray Data's sign of a public bucket: s3://anonymous@bucket/set
KINDS = ("s3", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "file")
FETCHED_AT_ONCE = 8
IMPATIENT = {"s3": {"config_kwargs": {"connect_timeout": 10, "retries": {"max_attempts": 2}}}}


def is_uri(root: str | Path | None) -> bool:
    return root is not None and "://" in str(root)


def local_folder(place: str, flag: str) -> Path:
    """A folder that was named on the command line.

    Raises:
        InputError: It is an address, which is not used here.
    """
    if is_uri(place):
        raise InputError(
            f"--{flag}={place}: must be a folder; copy what is in a bucket, or what shall be there."
        )
    return Path(place)


def check_address(root: str, flag: str = "dataset.root") -> None:
    """Refuse addresses that are no bucket's, and such with a password in them, before anything is written down.

    Raises:
        InputError: It is one of those.
    """
    kind, _, rest = root.partition("://")
    before, at, _ = rest.partition("@")
    keys = at and (":" in before.partition("/")[0] or "/" not in before)  # a key may have a / in it
    if keys and not rest.startswith(ANONYMOUS):
        raise InputError(
            f"--{flag}: an address as {kind}://...@{rest.partition('@')[2]} has credentials in it, which would be in every log. "
            "They belong into the environment (AWS_ACCESS_KEY_ID ...)."
        )
    name = rest.removeprefix(ANONYMOUS).partition("/")[0]
    if kind not in KINDS or "::" in root or "\0" in root:
        raise InputError(
            f"--{flag}={root!r} is no address of a bucket; it must begin with {', '.join(f'{k}://' for k in KINDS)}."
        )
    if (not name and kind != "file") or ".." in rest.split("/"):
        raise InputError(f"--{flag}={root!r} names no place in a bucket, as s3://bucket/set does.")


def open_root(
    root: str, *, patient: bool = False, flag: str = "dataset.root"
) -> tuple[fsspec.AbstractFileSystem, str]:
    """A data set's file system, and where in it the data set lies.

    Args:
        patient: For days of reading; otherwise who has mistyped an address is told within seconds.

    Raises:
        InputError: Nothing here opens such an address.
    """
    options: dict[str, Any] = {} if patient else IMPATIENT.get(root.partition("://")[0], {})
    options = options | ({"anon": True} if ANONYMOUS in root else {})
    try:
        system, place = fsspec.core.url_to_fs(plain(root), **options)
    except (ImportError, ValueError) as error:  # the package is not here, or there is no such protocol
        raise InputError(f"--{flag}={root}: cannot be opened: {first_line(error)}") from None
    return system, place.rstrip("/")


def plain(root: str) -> str:
    return root.replace(ANONYMOUS, "").rstrip("/")


@functools.cache
def fetch(root: str, episodes: tuple[int, ...] = ()) -> Path:
    """A folder of this node with the data set's metadata, and all files that `episodes` lie in. What is there already,
    in the bucket's version, is not fetched again; a fetch that was killed goes on where it was.

    Raises:
        InputError: The bucket cannot be read, or holds no data set there, or this node has no room for it.
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


def fetch_whole(root: str) -> Path:
    """`fetch` with every episode: LeRobot opens all tables, whatever episodes are asked for."""
    meta = LeRobotDatasetMetadata("fetched/set", root=fetch(root))
    return fetch(root, tuple(range(meta.total_episodes)))


def _get(root: str, folder: Path, files: dict[str, str]) -> None:
    """Fetch files by name, unless they are here in the version that goes with it."""
    try:
        missing = {check_name(name): version for name, version in files.items()}
    except ValueError as error:
        raise InputError(f"--dataset.root={root}: {error}.") from None
    for name, version in files.items():
        file, note = folder / name, _note(folder / name)
        known = file.exists() and note.exists() and note.read_text() == version
        if known and (not version or file.stat().st_size == _size(version)):
            del missing[name]
    size, free = sum(_size(version) for version in missing.values()), shutil.disk_usage(folder).free
    if size > free:
        raise StorageFull(
            f"--dataset.root={root}: {size / 1e9:.1f} GB are to be fetched, and {folder} on {socket.gethostname()} has "
            f"{free / 1e9:.1f} GB left. RAY_JOBS_CACHE names another folder; a training with --data.source=stream needs none."
        )
    system, place = open_root(root)

    def get(item: tuple[str, str]) -> None:
        name, version = item
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}.part")
        try:
            system.get_file(f"{place}/{name}", str(scratch))
            if version and scratch.stat().st_size != _size(version):
                raise OSError(f"{scratch.stat().st_size} bytes came instead of {_size(version)}")
        except Exception as error:
            kind = StorageFull if no_room(error) else StorageError
            raise kind(f"--dataset.root={root}: {name}: {_reason(error)}") from None
        scratch.replace(file)
        _note(file).write_text(version)

    with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
        for _ in pool.map(get, missing.items()):
            pass


def _note(file: Path) -> Path:
    return file.with_name(f".{file.name}.version")


def _size(version: str) -> int:
    """Bytes of a file, of which `listing` gives the version."""
    return int(version.split()[0]) if version[:1].isdigit() else 0


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
        raise StorageError(f"--dataset.root={root}: cannot be read: {_reason(error)}") from None
    return found


def files_of(meta: LeRobotDatasetMetadata, episodes: Sequence[int]) -> list[str]:
    """Names of the parquet and video files that `episodes` lie in."""
    names = {str(meta.get_data_file_path(episode)) for episode in episodes}
    names |= {str(meta.get_video_file_path(e, key)) for e in episodes for key in meta.video_keys}
    return sorted(names)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
