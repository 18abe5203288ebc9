"""Where caches of this project lie on a node."""

import os
import shutil
from pathlib import Path


def default_folder() -> Path:
    """Where `--data.cache=auto` keeps frames: `$RAY_JOBS_CACHE`, else beside the user's other caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RAY_JOBS_CACHE") or Path(caches) / "ray_jobs")


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder lies on, or would."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
