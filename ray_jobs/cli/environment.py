"""What a process finds around it: who it is, where it may write, who hears it. Seen to before anything reads it.

Containers run as users that are in no list, with a home that is not there or cannot be written; schedulers close what would be
printed to; and paths in the environment may be relative, while Ray's workers run in folders of their own.
"""

import contextlib
import getpass
import io
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

# All that LeRobot, and what it stands on, take for a file or a folder.
PATHS = (
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "HF_ASSETS_CACHE",
    "HF_DATASETS_CACHE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_LEROBOT_HOME",
    "HF_TOKEN_PATH",
    "HF_XET_CACHE",
    "HOME",
    "HUGGINGFACE_HUB_CACHE",
    "MPLCONFIGDIR",
    "NETRC",
    "PGPASSFILE",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_JOBS_CACHE",
    "RAY_TMPDIR",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_HOME",
    "TRITON_CACHE_DIR",
    "WANDB_ARTIFACT_DIR",
    "WANDB_CACHE_DIR",
    "WANDB_CONFIG_DIR",
    "WANDB_DATA_DIR",
    "WANDB_DIR",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
)
# Of these, what a worker takes from the driver where its node has none of its own, and has that folder.
HANDED_ON = (
    "HF_DATASETS_CACHE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_LEROBOT_HOME",
    "RAY_JOBS_CACHE",
    "TORCH_HOME",
)
WRITTEN = ("HF_DATASETS_CACHE", "RAY_JOBS_CACHE")  # by every training; into the others goes what is fetched
LONGEST_FOR_RAY = 107 - len("/ray/session_2026-12-01_02-22-51_200122_1234567/sockets/plasma_store")


def settle() -> None:
    """Give this process a name, a home and folders that it may write, and make paths in its environment absolute."""
    for name in PATHS:
        value = os.environ.get(name)
        if value == "":
            del os.environ[name]  # is no path; huggingface_hub would take this folder for it
        elif value is not None and not os.path.isabs(value):
            os.environ[name] = os.path.abspath(os.path.expanduser(value))
    try:
        getpass.getuser()  # torch names a folder after it when it is imported
    except (KeyError, OSError):
        os.environ["USER"] = os.environ["LOGNAME"] = f"uid{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_refuge())
    _caches()


def _caches() -> None:
    """Have what must be written written elsewhere, where the usual folder cannot be: else whatever is read first is blamed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    usual = {
        "HF_DATASETS_CACHE": hub / "datasets",
        "RAY_JOBS_CACHE": cache / "ray_jobs",
        "HF_HUB_CACHE": os.environ.get("HUGGINGFACE_HUB_CACHE") or hub / "hub",
        "HF_LEROBOT_HOME": hub / "lerobot",
        "HF_XET_CACHE": hub / "xet",
        "TORCH_HOME": cache / "torch",
        "TRITON_CACHE_DIR": Path.home() / ".triton" / "cache",
        "MPLCONFIGDIR": config / "matplotlib",
        "WANDB_CACHE_DIR": cache / "wandb",
        "WANDB_CONFIG_DIR": config / "wandb",
    }
    moved = {}
    for name, place in usual.items():
        place = Path(os.environ.get(name) or place)
        if not _writable(place) and (name in WRITTEN or not place.exists()):
            moved[name] = place
    if not moved:
        return
    refuge = _refuge()
    for name in moved:
        os.environ[name] = str(refuge / name.lower())
    written = " and ".join(str(moved[name]) for name in WRITTEN if name in moved) or str(cache)
    print(
        f"{written} cannot be written: caches are in {refuge} for this time. {', '.join(moved)} in the environment move "
        "them, or XDG_CACHE_HOME and HF_HOME as a whole.",
        file=sys.stderr,
    )


def _writable(folder: Path) -> bool:
    """Whether a folder can be written, or made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _refuge() -> Path:
    """A folder of this user's alone, the same in every process, for want of another."""
    folder = Path(tempfile.gettempdir()) / f"ray_jobs-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if not folder.is_symlink() and folder.stat().st_uid == os.getuid():
            return folder
    return Path(tempfile.mkdtemp(prefix="ray_jobs-"))


def prepare_for_ray() -> None:
    """See that a Ray of our own can start: it (2.60) wants sockets below the temporary folder, whose names Linux limits to 107
    bytes, and writes a token to ~/.ray/auth_token."""
    if "RAY_TMPDIR" not in os.environ and len(os.fsencode(tempfile.gettempdir())) > LONGEST_FOR_RAY:
        os.environ["RAY_TMPDIR"] = "/tmp"  # as where TMPDIR is not set
    usual = Path.home() / ".ray" / "auth_token"
    if (
        {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
        or usual.exists()
        or _writable(usual.parent)
    ):
        return
    place = _refuge() / "auth_token"
    with contextlib.suppress(FileExistsError):
        with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(place)


def handed_on() -> dict[str, str]:
    """What a worker shall `take_over`."""
    return {name: os.environ[name] for name in HANDED_ON if name in os.environ}


def take_over(paths: dict[str, str]) -> None:
    """On a worker: the driver's paths, where this node has none of its own. (A Ray that the driver has started has them
    anyway; one that was joined has the environment of its `ray start`.)"""
    for name, value in paths.items():
        if name not in os.environ and os.path.isdir(value):
            os.environ[name] = value


# ---------------------------------------------------------------------- who hears it


class _Unheard(io.FileIO):
    """Output that nobody may be there to read any more: `| head`, a terminal that was closed, a log on a full disk. What
    takes hours does not end for it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def be_heard() -> None:
    """Let printing never end a job: where an output is closed, cannot be written, or has no letter for what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file to be opened would be it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    for name, number in (("stdout", 1), ("stderr", 2)):
        was = getattr(sys, name)
        raw = _Unheard(number, "w", closefd=False)
        by_line, at_once = was is not None and was.line_buffering, was is not None and was.write_through
        encoding = "utf-8" if was is None else was.encoding
        buffer = raw if at_once else io.BufferedWriter(raw)
        text = io.TextIOWrapper(
            buffer, encoding, "backslashreplace", line_buffering=by_line, write_through=at_once
        )
        setattr(sys, name, text)
