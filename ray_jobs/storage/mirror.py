"""A run whose `--output_dir` is a bucket: it lives in a folder of the node, and a copy of it in the bucket.

    s3://bucket/run/checkpoints/000200/...      uploaded in the background, file by file
    s3://bucket/run/checkpoints/000200.json     names and sizes of its files, written last: without it there is none
    s3://bucket/run/{summary.json,metrics.jsonl,options.json,.progress,events.out.tfevents.*,wandb/...}

Object stores rename nothing, so that what is whole is what the last write says.
"""

import contextlib
import fcntl
import glob
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fsspec import AbstractFileSystem

from ray_jobs.config.busy import busy
from ray_jobs.config.errors import InputError, RunError, StorageError, StorageFull, first_line, no_room
from ray_jobs.config.options import ASKED, OPTIONS_FILE
from ray_jobs.storage.bucket import check_address, open_root
from ray_jobs.storage.cache_folder import default_folder
from ray_jobs.storage.fingerprint import fingerprint_of
from ray_jobs.storage.lease import BucketLock
from ray_jobs.storage.records import METRICS_FILE, SUMMARY_FILE, parse_json
from ray_jobs.storage.retry import patiently, storage_may_return
from ray_jobs.storage.trust import check_name

CHECKPOINTS = "checkpoints"
EVERY_S = 30  # between looks for what has changed
FILES = (SUMMARY_FILE, METRICS_FILE, OPTIONS_FILE, ".progress")


def folder_of(address: str) -> Path:
    """Where a run lives whose `--output_dir` is `address`: on all nodes under the path that the driver's has."""
    return default_folder() / "outputs" / fingerprint_of(address.rstrip("/"))


def check_new(address: str, resumable: str = OPTIONS_FILE) -> None:
    """Refuse a place for a new run that has something in it.

    Args:
        resumable: Name of the file by which the job knows what it could continue.

    Raises:
        InputError: It has, or it cannot be read.
    """
    check_address(address, "output_dir")
    system, place = open_root(address, flag="output_dir")
    with told(address):
        taken = system.exists(place) and system.find(place)
        more = ", or --resume=true to continue what is in it" if system.exists(f"{place}/{resumable}") else ""
    if taken:
        raise InputError(
            f"--output_dir={address} already exists, and nothing in it is overwritten. Give another place{more}."
        )
    here = folder_of(address)
    if (here / CHECKPOINTS).is_dir():
        raise InputError(
            f"--output_dir={address} is empty, but {here} holds a run that was to go there. Remove that folder, or give "
            "another place."
        )
    shutil.rmtree(here, ignore_errors=True)


def check_writable(address: str) -> None:
    """Raises InputError if nothing can be written there."""
    system, place = open_root(address, flag="output_dir")
    with told(address):
        system.pipe_file(f"{place}/.writable", b"yes")
        system.rm_file(f"{place}/.writable")


def pull(address: str, here: Path) -> None:
    """Bring the newest whole checkpoint of a run, the best one, and its small files, to its folder on this node, unless they are here.

    Raises:
        InputError: The bucket cannot be read.
    """
    check_address(address, "output_dir")
    system, place = open_root(address, flag="output_dir")
    here.mkdir(parents=True, exist_ok=True)
    with (here / ".pulled").open("w") as lock, told(address):  # one process of a node
        fcntl.flock(lock, fcntl.LOCK_EX)
        system.invalidate_cache()
        _set_aside(system, place, here)
        (here / CHECKPOINTS).mkdir(exist_ok=True)
        whole = whole_checkpoints(system, place)
        newest = max(whole, default=-1)
        # The run has gone on elsewhere since it was here.
        behind = newest > max(map(int, _checkpoints_in(here / CHECKPOINTS)), default=-1)
        _fetch_files(system, place, here, again=behind)
        if whole:
            _fetch_checkpoint(system, place, whole[newest], here / CHECKPOINTS / whole[newest])
        if behind or not (here / CHECKPOINTS / "best").exists():
            _fetch_link(system, place, "best", here)


def pull_result(address: str, here: Path, links: tuple[str, ...] = ()) -> None:
    """Bring a run's small files, and the checkpoint that the first of `links` (`best`, `last`) that is there leads to.

    Raises:
        InputError: The bucket cannot be read.
    """
    system, place = open_root(address, flag="output_dir")
    (here / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    with told(address):
        system.invalidate_cache()
        _fetch_files(system, place, here, again=True)
        for link in links:
            if _fetch_link(system, place, link, here):
                return


def take_up(address: str, here: Path) -> bool:
    """Bring a run here that another process, dead by now, may have begun, as it is in the bucket. False if it has not: then
    the place is empty.

    Raises:
        InputError: The bucket cannot be used.
    """
    system, place = open_root(address, flag="output_dir")
    with told(address):
        system.invalidate_cache()
        begun = system.exists(f"{place}/{OPTIONS_FILE}")
        if not begun:
            remove(system, place)
    shutil.rmtree(here, ignore_errors=True)
    if begun:
        pull(address, here)
    return begun


def _set_aside(system: AbstractFileSystem, place: str, here: Path) -> None:
    """Move away what another run has left on this node: it had the same address, and is no longer there."""
    there = system.cat_file(f"{place}/{OPTIONS_FILE}") if system.exists(f"{place}/{OPTIONS_FILE}") else b"{}"
    file = here / OPTIONS_FILE
    if not file.is_file() or _run_of(file.read_bytes()) == _run_of(there):
        return
    old = here.with_name(f"{here.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir()
    for name in (*FILES, CHECKPOINTS, "wandb"):
        if (here / name).exists():
            (here / name).rename(old / name)


def _run_of(options: bytes) -> str | None:
    """The id of the run that has written these options."""
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(options).get(ASKED, {}).get("id")
    return None


def send(address: str, name: str, file: Path) -> None:
    """Send a file of a run that has ended, if the bucket will have it."""
    with contextlib.suppress(Exception):
        system, place = open_root(address, flag="output_dir")
        system.put_file(str(file), f"{place}/{name}")


def remove(system: AbstractFileSystem, place: str) -> None:
    """Remove all there is at a place. fsspec would take one that is called `run[12]` for a pattern, and remove `run1`."""
    with contextlib.suppress(FileNotFoundError):
        if place == glob.escape(place):
            system.rm(place, recursive=True)
            return
        for path in system.find(place):
            system.rm_file(path)


def _fetch_files(system: AbstractFileSystem, place: str, here: Path, again: bool = False) -> None:
    for name in FILES:
        if (again or not (here / name).exists()) and system.exists(f"{place}/{name}"):
            system.get_file(f"{place}/{name}", str(here / name))


def _fetch_link(system: AbstractFileSystem, place: str, link: str, here: Path) -> bool:
    """Fetch the whole checkpoint that a link of the run leads to; False if there is none."""
    with contextlib.suppress(FileNotFoundError):
        name = check_name(system.cat_file(f"{place}/{CHECKPOINTS}/{link}").decode())
        _fetch_checkpoint(system, place, name, here / CHECKPOINTS / name)
        (here / CHECKPOINTS / link).unlink(missing_ok=True)
        (here / CHECKPOINTS / link).symlink_to(name)
        return True
    return False


def _fetch_checkpoint(system: AbstractFileSystem, place: str, name: str, target: Path) -> None:
    if target.is_dir():
        return
    scratch = target.with_name(f".{target.name}.pulled")
    shutil.rmtree(scratch, ignore_errors=True)
    for file_name, size in parse_json(system.cat_file(f"{place}/{CHECKPOINTS}/{name}.json")).items():
        file = scratch / check_name(file_name)
        file.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(f"{place}/{CHECKPOINTS}/{name}/{file_name}", str(file))
        if file.stat().st_size != size:
            raise OSError(f"{name}/{file_name} has {file.stat().st_size} bytes instead of {size}")
    scratch.rename(target)


def _checkpoints_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("[0-9]*") if path.is_dir()} if folder.is_dir() else set()


def whole_checkpoints(system: AbstractFileSystem, place: str) -> dict[int, str]:
    """Names of the whole checkpoints in a bucket, by step."""
    with contextlib.suppress(FileNotFoundError):
        names = [Path(path).name for path in system.ls(f"{place}/{CHECKPOINTS}", detail=False)]
        return {int(n[:-5]): n[:-5] for n in names if n.endswith(".json") and n[:-5].isdigit()}
    return {}


def read_file(address: str, name: str) -> bytes:
    system, place = open_root(address, flag="output_dir")
    with told(address):
        return system.cat_file(f"{place}/{name}")


@contextlib.contextmanager
def told(address: str, flag: str = "output_dir") -> Iterator[None]:
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        text = f"--{flag}={address}: cannot be used: {type(error).__name__}: {first_line(error)}"
        if no_room(error):
            raise StorageFull(text) from None
        raise (InputError if isinstance(error, ValueError) else StorageError)(text) from None


@contextlib.contextmanager
def mirrored(
    address: str,
    here: Path,
    tell: Callable[[str], None],
    run: str,
    kind: type["Mirror"] | None = None,
    when_taken: Callable[[], None] = lambda: None,
    stop: Callable[[], object] = lambda: False,
) -> Iterator["Mirror"]:
    """Within, this process alone keeps the copy of a run in its bucket up to date, beginning with what is here now.

    Args:
        here: The run's folder on this node.
        tell: Called with a line of text when the bucket fails, and when it is back.
        run: Tells this run from others that would go there.
        kind: What a copy consists of; that of a training if left out.
        when_taken: Called once nobody else can write there, before anything is sent.
        stop: Whether somebody has asked the run to stop, which does not wait for a bucket that fails.

    Raises:
        RunError: Another run writes there, or the bucket has failed for too long.
    """
    system, place = open_root(address, patient=True, flag="output_dir")
    lock = BucketLock(system, place, address, run)

    def take() -> None:
        with told(address):
            lock.take(tell)

    patiently(take, address, tell, passing=storage_may_return, stop=stop)
    with lock.held():
        with told(address):
            when_taken()
        mirror = (kind or Mirror)(address, here, tell, lock, stop)
        try:
            mirror.flush()
            yield mirror
        except KeyboardInterrupt:  # at once
            raise
        except BaseException:
            mirror.close()
            raise
        mirror.close()


class Mirror:
    """Keeps the copy of a run in its bucket up to date, from a thread of the process that writes the run.

    Args:
        address: Where to, an address such as `s3://bucket/run`.
        here: The run's folder on this node.
        tell: Called with a line of text when the bucket fails, and when it is back.
        lock: Ours, as long as nobody has taken it.
        stop: Whether somebody has asked the run to stop.
    """

    def __init__(
        self,
        address: str,
        here: Path,
        tell: Callable[[str], None],
        lock: BucketLock,
        stop: Callable[[], object] = lambda: False,
    ):
        self.address, self.here, self.tell, self.lock, self.stop = address, here, tell, lock, stop
        self.system, self.place = lock.system, lock.place
        self.sent: dict[str, object] = {}  # files: what tells whether they have changed since they were sent
        self.known: set[str] = set()  # checkpoints that this process has seen here
        self.failure: RunError | None = None
        self.rounds = 0  # of sending that have succeeded
        self.wake, self.closing = threading.Event(), False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def changed(self) -> None:
        """There is a new checkpoint.

        Raises:
            RunError: The bucket has failed for too long, or another run writes there.
        """
        if self.failure:
            raise self.failure
        self.wake.set()

    @busy("uploading")
    def flush(self) -> None:
        """Wait until all that is here now is there.

        Raises:
            RunError: The bucket has failed for too long.
        """
        rounds = self.rounds
        while self.rounds < rounds + 2 and not self.failure:  # one may have begun before
            self.wake.set()
            time.sleep(0.1)
        self.changed()

    @busy("uploading")
    def close(self) -> None:
        """Send what is left, and wait for it.

        Raises:
            RunError: The bucket has failed for too long.
        """
        self.closing = True
        self.wake.set()
        self.thread.join()
        if self.failure:
            raise self.failure

    def _run(self) -> None:
        try:
            closing = False
            while not closing:
                self.wake.wait(EVERY_S)
                self.wake.clear()
                closing = self.closing
                patiently(
                    self._send,
                    self.address,
                    self.tell,
                    passing=lambda e: not isinstance(e, RunError),
                    kept=self._kept,
                    stop=self.stop,
                )
                self.rounds += 1
        except RunError as error:
            self.failure = error

    def _kept(self) -> str:
        here = sorted(_checkpoints_in(self.here / CHECKPOINTS))
        return f"What is whole there is intact; the checkpoints {', '.join(here[-3:])} are in {self.here}."

    def _send(self) -> None:
        """Send new checkpoints, remove those that were removed here, then send small files that have changed.

        Raises:
            RunError: Another run writes there.
        """
        self.lock.check()
        folder = self.here / CHECKPOINTS
        here = _checkpoints_in(folder)
        self.system.invalidate_cache()
        there = set(whole_checkpoints(self.system, self.place).values())
        for name in sorted(here - there):
            with contextlib.suppress(FileNotFoundError):  # it was pruned meanwhile
                self._send_checkpoint(folder / name)
        for name in self.known - here:
            self._remove(name)
        self.known |= here
        for link in ("last", "best"):
            if (folder / link).is_symlink():
                self._send_text(f"{CHECKPOINTS}/{link}", (folder / link).resolve().name)
        small = [self.here / name for name in FILES]
        small += self.here.glob("events.out.tfevents*")
        small += [path for path in (self.here / "wandb").rglob("*") if not path.is_symlink()]
        for path in small:
            self._send_file(str(path.relative_to(self.here)), path)

    def _send_checkpoint(self, folder: Path) -> None:
        sizes = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = str(path.relative_to(folder))
                self.system.put_file(str(path), f"{self.place}/{CHECKPOINTS}/{folder.name}/{name}")
                sizes[name] = path.stat().st_size
        if folder.is_dir():
            self.system.pipe_file(
                f"{self.place}/{CHECKPOINTS}/{folder.name}.json", json.dumps(sizes).encode()
            )

    def _send_file(self, name: str, path: Path, *, grows: bool = True) -> None:
        """Send a file, unless it was sent as it is. One that grows is read at once, lest its size change meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            version = stat.st_size, stat.st_mtime_ns
            if path.is_file() and self.sent.get(name) != version:
                if grows:
                    self.system.pipe_file(f"{self.place}/{name}", path.read_bytes())
                else:
                    self.system.put_file(str(path), f"{self.place}/{name}")
                self.sent[name] = version

    def _send_text(self, name: str, text: str) -> None:
        if self.sent.get(name) != (text,):
            self.system.pipe_file(f"{self.place}/{name}", text.encode())
            self.sent[name] = (text,)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{self.place}/{CHECKPOINTS}/{name}.json")  # first: it is no longer whole
        remove(self.system, f"{self.place}/{CHECKPOINTS}/{name}")
        self.known.discard(name)
