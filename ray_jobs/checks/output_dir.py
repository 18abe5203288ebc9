"""Whether a job may begin in a folder: nothing that a user made is overwritten."""

import errno
import tempfile
from pathlib import Path

from ray_jobs.config.errors import InputError

# All that a run leaves that has ended before it began (a worker's node had no data set, say), and what an empty disk has.
NOTHING = {".driver", ".lock", ".ray", "lost+found"}
NEVER_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
RUN = ("options.json", "checkpoints/[0-9]*")  # what a training leaves that can be continued


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is not there, or empty, or nothing was begun in it: a link to such a one, or a disk, will do."""
    return not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= NOTHING)


def check_output_dir(folder: Path, resumable: tuple[str, ...] = ()) -> None:
    """See that a job can begin in a folder.

    Args:
        resumable: Patterns of the files by which the job knows what it could continue.

    Raises:
        InputError: There is something in it, or it is no folder.
    """
    try:
        for place in (folder, *folder.parents):
            if place.is_symlink() and not place.exists():
                raise InputError(f"--output_dir={folder}: {place} is a link that leads nowhere.")
            if place.exists():
                if not place.is_dir():
                    which = "" if place == folder else f"{place} "
                    raise InputError(f"--output_dir={folder}: {which}is a file, not a folder.")
                break
        empty = holds_nothing(folder)
    except OSError as error:
        raise InputError(f"--output_dir={folder}: cannot be read ({error.strerror}).") from None
    if empty:
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            if error.errno in NEVER_WRITABLE:  # of the others some pass: see `preflight`
                told = f"--output_dir={folder}: {place} cannot be written ({error.strerror})."
                raise InputError(told) from None
        return
    goes_on = any(next(folder.glob(name), None) for name in resumable)
    more = ", or --resume=true to continue what is in it" if goes_on else ""
    raise InputError(
        f"--output_dir={folder} already exists, and nothing in it is overwritten. Give another folder{more}."
    )


def check_to_resume(folder: Path, resumable: tuple[str, ...]) -> None:
    """See that there is something to go on from.

    Args:
        resumable: Patterns of the files by which the job knows it.

    Raises:
        InputError: There is nothing.
    """
    if not any(next(folder.glob(name), None) for name in resumable):
        kind = "run" if resumable == RUN else "search"
        raise InputError(f"--resume=true: nothing to resume, there is no {kind} in {folder}.")
