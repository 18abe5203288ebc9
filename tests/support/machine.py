"""What tests need of the machine."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def small_disk(folder: Path, size: str) -> contextlib.AbstractContextManager[Path]:
    """A disk of that size."""
    return _disk(folder, f"size={size}")


def read_only_disk(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """An empty disk that cannot be written."""
    return _disk(folder, "ro")


@contextlib.contextmanager
def _disk(folder: Path, options: str) -> Iterator[Path]:
    """A disk in memory; skips the test where it can't be had."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def free_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
