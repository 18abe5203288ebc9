"""A job as a process that can be watched, stopped and killed."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from uuid import uuid4

import psutil

from support.commands import PATIENCE, ROOT


def nothing_is_left(variable: str, value: str) -> None:
    """Wait until no process has this in its environment (Ray's agents hide theirs)."""

    def left() -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # a zombie has no environment
                if process.environ().get(variable) == value:
                    yield process

    give_up = time.monotonic() + 30 * PATIENCE
    while found := list(left()):
        if time.monotonic() > give_up:
            for process in found:
                process.kill()
            raise AssertionError(f"left behind: {found}")
        time.sleep(0.5)


class Run:
    """A training in a process group of its own, as in a terminal."""

    def __init__(self, flags: list[str], job: str = "ray_jobs.train", **env: str):
        self.id = uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", job, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **env, "RAY_JOBS_TEST_RUN": self.id},
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.seen = 0  # lines that `wait_for` has looked at
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()

    @property
    def printed(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, timeout: float = 240) -> None:
        """Return once a line with this text was printed, after those that were waited for before."""
        give_up = time.monotonic() + timeout * PATIENCE
        while time.monotonic() < give_up and (self.reader.is_alive() or self.seen < len(self.lines)):
            if self.seen == len(self.lines):
                time.sleep(0.01)
                continue
            self.seen += 1
            if text in self.lines[self.seen - 1]:
                return
        self.kill_all()  # else it would train on beside all other tests
        raise AssertionError(f"{text!r} was not printed:\n{self.printed}")

    def end(self, timeout: float = 120) -> int:
        try:
            self.process.wait(timeout * PATIENCE)
        except subprocess.TimeoutExpired:
            print(self.printed)
            self.kill_all()
            raise
        self.reader.join(10)
        nothing_is_left("RAY_JOBS_TEST_RUN", self.id)
        return self.process.returncode

    def kill_all(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (*self.family(), psutil.Process(self.process.pid)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()  # one by one: Ray's have sessions of their own

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.family() if "RayTrainWorker" in " ".join(p.cmdline())]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
