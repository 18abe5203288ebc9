"""Where caches of this project lie on a node."""

import os
import shutil
from pathlib import Path

from ray_jobs.config.errors import InputError
from ray_jobs.config.options import DataOptions


def default_folder() -> Path:
    """Where `--data.cache=auto` keeps frames: `$RAY_JOBS_CACHE`, else beside the user's other caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RAY_JOBS_CACHE") or Path(caches) / "ray_jobs")


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder lies on, or would."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


def folder_of(data: DataOptions) -> Path:
    """Where `--data.cache` keeps frames.

    Raises:
        InputError: Nowhere.
    """
    if data.cache == "off":
        raise InputError("--data.cache=off: no frames are kept there; name a folder, or leave it out.")
    return default_folder() if data.cache == "auto" else Path(data.cache)
