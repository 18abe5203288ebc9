"""Finds the worker that a run waits for. Workers wait for each other in every step: when one stops, all do, and nothing
says which.

Each worker has a thread that tells the run's channel, every few seconds, how far its training is and where in the code. A
worker that tells nothing has stopped, or its node is cut off; one that tells of the same step for too long hangs. So it is
with a search's trials that have one worker each; nobody waits for those but the search.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import ray

from ray_jobs.config.busy import busy_with
from ray_jobs.config.events import Event, Log, Saved, Step, Validated

if TYPE_CHECKING:
    from ray_jobs.cluster.channel import ChannelHandle

HEARTBEAT_S = 2.0
CUT_OFF_S = 120  # Ray itself takes up to eight minutes to notice, on the side that is cut off
WAITING = (
    "backward",
    "all_reduce",
    "wait",
    "barrier",
    "all_gather",
    "broadcast",
    "reduce",
)  # for other ranks


@dataclass
class Heartbeat:
    """What a worker tells of itself."""

    rank: int | str
    """The trial's name in a search."""
    node_id: str
    address: str
    pid: int
    step: int | None
    """The last one done; None before the first."""
    where: str
    """The innermost lines of its training."""
    slow: bool
    """It validates, saves, or waits for storage: that may take long (see `busy`)."""
    waits: bool
    """It waits for other workers."""


def heartbeat(channel: "ChannelHandle", rank: int | str) -> Callable[[Event], None]:
    """Begin to tell, of the thread that calls this. Returns what must hear of the run's events."""
    context = ray.get_runtime_context()
    node, address, pid = context.get_node_id(), ray.util.get_node_ip_address(), os.getpid()
    training, step, begun = threading.current_thread(), None, threading.Event()

    def tell() -> None:
        while training.is_alive() and (frame := sys._current_frames().get(training.ident or 0)) is not None:  # noqa: SLF001  (documented)
            files, names = [], []
            while frame is not None:
                files.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                names.append(frame.f_code.co_name)
                frame = frame.f_back
            slow = bool(busy_with(training))
            waits = any(word in name for name in names[:6] for word in WAITING)
            where = ", called from ".join(f"{n} ({f})" for n, f in list(zip(names, files, strict=True))[:3])
            now = Heartbeat(rank, node, address, pid, step, where, slow, waits)
            told = channel.heartbeat.remote(now)
            # Asked twice: whoever was suspended wakes up with the time over and the answer on its way.
            if not any(ray.wait([told], timeout=seconds)[0] for seconds in (CUT_OFF_S, 5 * HEARTBEAT_S)):
                os._exit(1)  # this node is cut off, and another worker waits to write into the run's folder
            # The first step is told at once, else who stops soon after it is said to have stopped before it.
            (begun.wait if now.step is None else time.sleep)(HEARTBEAT_S)
        with contextlib.suppress(Exception):  # Ray is gone, too
            channel.forget_heartbeat.remote(
                rank
            )  # its part is done; another may still have the run's end to write

    def hear(event: Event) -> None:
        nonlocal step
        if isinstance(event, Step | Log | Validated | Saved):  # notices may come from another thread
            step = event.step
            begun.set()

    threading.Thread(target=tell, daemon=True).start()
    return hear


class Watchdog:
    """Looks after a run from its driver.

    Args:
        channel: Handle of the run's `channel.Channel`.
        patience_s: How long a worker may be silent, or the run without a step; 0 for ever.
    """

    def __init__(self, channel: "ChannelHandle", patience_s: float):
        self.channel, self.patience_s = channel, patience_s
        self.looked = time.monotonic()
        self.out_of_reach: set[int] = set()  # processes that could not be ended yet

    def look(self) -> str | None:
        """Call now and then. If the run hangs: end the worker that it waits for, so that Ray Train starts the group
        again, and return what to tell."""
        found = culprit(self._heartbeats(), self.patience_s)
        if found is None:
            return None
        told, ended = self._end(*found, "rank", "it is replaced")
        if ended:
            self.channel.forget_heartbeats.remote()
        return told

    def look_at_trials(self) -> list[str]:
        """The same for a search, whose trials Ray Tune has go on in other processes."""
        told = []
        for trial, one in self._heartbeats().items():
            if found := culprit({trial: one}, self.patience_s):
                text, ended = self._end(*found, "trial", "the process is ended")
                if ended:
                    self.channel.forget_heartbeat.remote(trial)
                told += [text] if text else []
        return told

    def _end(self, heartbeat: Heartbeat, reason: str, kind: str, then: str) -> tuple[str | None, bool]:
        """End a worker; returns what to tell, and whether it has ended."""
        alive = _kill_on_its_node(heartbeat)
        who = f"{kind} {heartbeat.rank} on {heartbeat.address} (process {heartbeat.pid}) {reason}"
        if alive is None:  # its node is cut off, or too busy: tried again at the next look
            new = heartbeat.pid not in self.out_of_reach
            self.out_of_reach.add(heartbeat.pid)
            return (f"{who}; its node does not answer either" if new else None), False
        return (f"{who}; {then}" if alive else None), True  # that it has died before is Ray's to tell

    def _heartbeats(self) -> dict[int | str, tuple[Heartbeat, float, float]]:
        if not self.patience_s or time.monotonic() - self.looked < HEARTBEAT_S:
            return {}
        self.looked = time.monotonic()
        return ray.get(self.channel.heartbeats.remote())


def _kill_on_its_node(heartbeat: Heartbeat) -> bool | None:
    """End a worker; False if it was no longer there, None if that could not be found out."""
    here = {"ray.io/node-id": heartbeat.node_id}
    kill = ray.remote(num_cpus=0, max_retries=0, label_selector=here)(_kill)
    done, _ = ray.wait([asked := kill.remote(heartbeat.pid)], timeout=10)
    with contextlib.suppress(ray.exceptions.RayError):
        if done:
            return ray.get(asked)
        ray.cancel(asked)
    return None


def _kill(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if any("ray::" in word for word in process.cmdline()):  # and not another one that has got its number
            process.kill()
            return True
    return False


def culprit(
    heartbeats: dict[int | str, tuple[Heartbeat, float, float]], patience_s: float
) -> tuple[Heartbeat, str] | None:
    """The worker that a run waits for, and why it is thought to be; None while the run goes on.

    Args:
        heartbeats: By rank, its last heartbeat, the seconds since, and the seconds since its step has changed.
    """
    silent = [heartbeat for heartbeat, age, _ in heartbeats.values() if age > patience_s]
    if silent:
        heartbeat = silent[0]
        after = f"after step {heartbeat.step}" if heartbeat.step is not None else "before the first step"
        return heartbeat, f"has stopped answering {after}"
    if not heartbeats or any(
        heartbeat.step is None or heartbeat.slow or unchanged <= patience_s
        for heartbeat, _, unchanged in heartbeats.values()
    ):
        return None
    behind = min(heartbeat.step for heartbeat, _, _ in heartbeats.values() if heartbeat.step is not None)
    suspects = [heartbeat for heartbeat, _, _ in heartbeats.values() if heartbeat.step == behind]
    heartbeat = next((heartbeat for heartbeat in suspects if not heartbeat.waits), suspects[0])
    return (
        heartbeat,
        f"has not come further than step {heartbeat.step} for {patience_s:g} s, it is in {heartbeat.where}",
    )
