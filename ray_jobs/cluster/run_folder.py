"""A run's folder: one writer at a time, and the same folder on every node.

Light, since a busy folder is refused before anything is imported.
"""

import contextlib
import fcntl
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ray_jobs.config.errors import RunError

LOCK_FILE = ".lock"
MARK_FILE = ".driver"  # what tells workers that they see the driver's folder
LOCK_WAIT_S = 30  # a killed run's last worker may take a moment to die
CUT_OFF_S = 300  # on a node that is cut off it ends itself after two minutes (see `watchdog`); NFS then frees its lock


def mark_of(folder: Path) -> str:
    """What tells processes of other nodes that they see this very folder (see `check_node`)."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK_FILE
    if not mark.is_file() or not mark.read_text():
        mark.write_text(uuid.uuid4().hex)
    return mark.read_text()


def check_node(root: str | None, output_dir: Path | None, mark: str) -> None:
    """See that this node has the folders that the driver's has.

    Args:
        root: Of the data set.
        output_dir: Of the run or search; None for one that is copied to a bucket.
        mark: What `mark_of` gives on the driver's node.

    Raises:
        RunError: It has not.
    """
    import ray

    from ray_jobs.storage.bucket import is_uri

    where = f"on node {ray.util.get_node_ip_address()}"
    if root is not None and not is_uri(root) and not Path(root).is_dir():
        raise RunError(
            f"--dataset.root={root} is not there {where}. All nodes must see it, or it must be a bucket."
        )
    seen = output_dir and output_dir / MARK_FILE
    if seen and not (seen.is_file() and seen.read_text() == mark):
        raise RunError(
            f"--output_dir={output_dir} is not {where} what it is on the driver's node. All nodes must see the "
            "same folder, or it must be a bucket (s3://...)."
        )


@contextlib.contextmanager
def only_driver(output_dir: Path) -> Iterator[None]:
    """Be the one command that runs, or searches, in a folder. Who else tries is told at once: a driver that was killed
    holds nothing any more, whatever its workers may still do (see `lock`).

    Raises:
        RunError: There is another one.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / MARK_FILE).open("a") as file:
        _take(file, output_dir)
        yield


def refuse_busy(flags: dict[str, str]) -> None:
    """See that no other command is at work in the folder that these flags mean; before anything is imported for it.

    Raises:
        RunError: There is one.
    """
    folders: Sequence[Path] = ()
    if "output_dir" in flags:
        folders = [Path(flags["output_dir"])]
    elif (
        "config_path" in flags
    ):  # <run>/checkpoints/<step>/pretrained_model/train_config.json, or the last folder of that
        folders = Path(flags["config_path"]).absolute().parents[2:4]
    for folder in folders:
        with contextlib.suppress(OSError), (folder / MARK_FILE).open("r+") as file:
            _take(file, folder)


def _take(file: IO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"another run is writing into {folder}.") from None


@contextlib.contextmanager
def lock(output_dir: Path, run: str = "") -> Iterator[None]:
    """Hold a run's folder: two workers must never write into one. Ends with the process, however it ends.

    Args:
        run: Tells this run from others. For a worker of the same run, on a node that was cut off, is waited longer.

    Raises:
        RunError: Somebody else holds it still, after a while.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK_FILE).open("a+") as file:
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                wait = CUT_OFF_S if run and file.read() == run else LOCK_WAIT_S
                if time.monotonic() - begin > wait:
                    raise RunError(f"another run is writing into {output_dir}.") from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(run)
        file.flush()
        yield
