"""FFmpeg for torchcodec, out of PyAV's wheel.

Ray Data's LeRobot reader decodes with torchcodec, which looks for FFmpeg's shared libraries among the system's. PyAV
brings them along, under names of its own. A folder of links that give them back their usual names, first in
LD_LIBRARY_PATH, is all torchcodec asks for (0.11 with PyAV 15: FFmpeg 7); and both then decode the same bits.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import av

from ray_jobs.config.errors import InputError
from ray_jobs.storage.cache_folder import default_folder


def links_folder() -> Path:
    return default_folder() / f"ffmpeg-of-pyav-{av.__version__}"


def link(folder: Path) -> None:
    """Make this node's links. Without PyAV's wheel (built from source) there are none, and the system's serve."""
    for library in Path(av.__file__).parent.parent.glob("av.libs/*.so*"):
        # Under PyAV's names as well: the libraries look for each other beside themselves.
        places = [folder / library.name]
        if usual := re.fullmatch(r"(lib(?:av|sw).+)-\w+\.so\.(\d+)\..*", library.name):
            places.append(folder / f"{usual[1]}.so.{usual[2]}")
        for place in places:
            if place.is_symlink() and place.readlink() == library:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            scratch = place.with_name(f".{place.name}.{os.getpid()}")
            scratch.symlink_to(library)
            scratch.replace(place)


def search_path(folder: Path, more: str) -> dict[str, str]:
    """The environment variable that a process must be started with to find them."""
    return {"LD_LIBRARY_PATH": f"{folder}:{more}"}


def check() -> None:
    """See that torchcodec finds an FFmpeg, in a process that is started for it.

    Raises:
        InputError: It does not.
    """
    link(links_folder())
    path = search_path(links_folder(), os.environ.get("LD_LIBRARY_PATH", ""))
    found = subprocess.run(
        [sys.executable, "-c", "import torchcodec.decoders"], env=os.environ | path, capture_output=True
    )
    if found.returncode:
        raise InputError(
            "--data.source=stream: Ray Data decodes videos with torchcodec, which finds no FFmpeg 4 to 8 here.\n"
            "`apt-get install ffmpeg` brings it, on every node; so does PyAV, as a wheel: pip install av==15.1.0"
        )
