"""Two processes must never write into one place of a bucket, which itself locks nothing: a note there says who writes, and
is renewed as long as that one lives. Whoever comes next watches it for a while; whoever has lost it stops. A worker of the
same run on another node is waited for: if that node is cut off, it ends itself (see `watchdog`).

    s3://bucket/run/.writer     {"run": ..., "host": ..., "at": seconds since 1970}
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeGuard

from ray_jobs.config.errors import RunError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

NOTE = ".writer"
RENEWED_EVERY_S = 15
OVER_AFTER_S = 60  # a run that has not renewed its note for so long was killed
FORGOTTEN_S = 900  # a note that old by the clock is not watched: clocks of two nodes may differ by minutes
CUT_OFF_S = 300  # so long is waited for a worker of the same run
LOOK_EVERY_S = 2


class BucketLock:
    """The note of one run.

    Args:
        system, place: The run's place in a bucket, as `bucket.open_root` gives it.
        address: The same, as the user has it.
        run: Tells this run from others; its restarted workers have the same. On one node a file lock keeps them apart.
    """

    def __init__(self, system: "AbstractFileSystem", place: str, address: str, run: str):
        self.system, self.place, self.address, self.run = system, place, address, run
        self.note, self.host = f"{place}/{NOTE}", socket.gethostname()[:100]
        self.lost: str | None = None
        self.ended = threading.Event()

    def take(self, tell: Callable[[str], None]) -> None:
        """Return once the place is ours: nobody's, or that of a run that seems dead.

        Raises:
            RunError: Another run is alive and writes there.
        """
        seen, since, told, begin = self._read(), time.monotonic(), False, time.monotonic()
        while self._others(seen) and time.time() - seen["at"] < FORGOTTEN_S:
            if not told:
                tell(
                    f"{self.address} was written to on {seen['host']}; looking for {OVER_AFTER_S} s whether it still is"
                )
                told = True
            time.sleep(LOOK_EVERY_S)
            now = self._read()
            if now == seen:
                if time.monotonic() - since > OVER_AFTER_S:
                    break
                continue
            lives = now is not None and now["run"] == self.run  # on a node that is cut off
            if self._others(now) and (not lives or time.monotonic() - begin > CUT_OFF_S):
                raise RunError(self._taken_by(now))
            seen, since = now, time.monotonic()
        self._write()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, the note is renewed; then it is removed."""
        threading.Thread(target=self._renew, daemon=True).start()
        try:
            yield
        finally:
            self.ended.set()
            with contextlib.suppress(Exception):  # the bucket is away: the note is as good as a dead run's
                if not self._others(self._read()):
                    self.system.rm_file(self.note)

    def check(self) -> None:
        """Raises RunError if another run has taken the place, which it does when this one seems dead."""
        if self.lost:
            raise RunError(self.lost)

    def _renew(self) -> None:
        wait_s = LOOK_EVERY_S  # soon: of two that begin at the same moment, both have found the place free
        while not self.ended.wait(wait_s):
            wait_s = RENEWED_EVERY_S
            with contextlib.suppress(
                Exception
            ):  # that the bucket is away is told by who copies the run there
                note = self._read()
                if self._others(note):
                    self.lost = self._taken_by(note)
                    return
                self._write()

    def _taken_by(self, other: dict) -> str:
        return f"another run is writing into {self.address}, on {other['host']}."

    def _others(self, note: dict | None) -> TypeGuard[dict]:
        return note is not None and (note["run"], note["host"]) != (self.run, self.host)

    def _read(self) -> dict | None:
        """The note, or None: there is none, or it makes no sense."""
        try:
            note = json.loads(self.system.cat_file(self.note))
            return {"run": str(note["run"]), "host": str(note["host"])[:100], "at": float(note["at"])}
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return None

    def _write(self) -> None:
        note = {"run": self.run, "host": self.host, "at": time.time()}
        self.system.pipe_file(self.note, json.dumps(note).encode())
