"""Files that Git LFS has yet to bring: after `git clone` without it, or with GIT_LFS_SKIP_SMUDGE, a note of three lines
stands in the place of each."""

from collections.abc import Iterable
from pathlib import Path

BEGINNING = b"version https://git-lfs.github.com/spec/"


def pointers(paths: Iterable[Path]) -> list[Path]:
    """Those that are but notes."""
    found = []
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(BEGINNING)) == BEGINNING:
                    found.append(path)
    return found


def fault(found: list[Path]) -> str:
    """What to say of them: one cause, however many there are."""
    if len(found) == 1:
        return (
            f"{found[0]} is a Git LFS pointer, not the file itself: `git lfs pull` in its folder brings it."
        )
    return (
        f"{len(found)} files are Git LFS pointers, not the files themselves, {found[0]} the first: `git lfs pull` in that "
        "folder brings them."
    )
