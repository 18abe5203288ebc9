"""The channel between a run's driver and its workers: an actor that carries events one way, the wish to stop the other way."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray

from ray_jobs.config.errors import GO_ON, PREEMPTED, PRUNED, InputError, RunError
from ray_jobs.config.events import Event, Fault, Saved, Step

if TYPE_CHECKING:
    from ray_jobs.cluster.watchdog import Heartbeat

ANSWERED_AFTER_S = 60
TELL_EVERY_S = 0.5  # how often the driver hears of steps


class Channel:
    def __init__(self) -> None:
        self.events: asyncio.Queue = asyncio.Queue()
        self.lost = self.lost_when_saved = 0  # how often workers were lost, and until the last checkpoint
        self.saved = -1  # the step of that one
        self.asked = asyncio.Condition()  # that somebody shall stop
        self.stop_reason = GO_ON
        self.leaving: set[str] = set()  # nodes
        self.given_up: set[str] = set()
        self.failure: RunError | InputError | None = None
        self.errors: dict[int | str, tuple] = {}  # by rank or trial, the last one
        # By rank or trial: its last heartbeat, when, and when its step had changed.
        self.told: dict[int | str, tuple] = {}

    async def tell(self, event: Event) -> None:
        if isinstance(event, Saved) and event.step > self.saved:
            self.lost_when_saved, self.saved = self.lost, event.step
        if isinstance(event, Fault) and not event.announced:
            self.lost += 1
        await self.events.put(event)

    async def losses(self) -> int:
        """How often workers were lost since the run has got to another checkpoint."""
        return self.lost - self.lost_when_saved

    async def hear(self, timeout_s: float) -> list[Event]:
        """Events since the last call; waits up to `timeout_s` for the first."""
        heard = []
        if self.events.empty() and timeout_s > 0:
            try:
                heard.append(await asyncio.wait_for(self.events.get(), timeout_s))
            except TimeoutError:
                return heard
        while not self.events.empty():
            heard.append(self.events.get_nowait())
        return heard

    async def fail(self, error: RunError | InputError) -> None:
        self.failure = self.failure or error

    async def why_failed(self) -> RunError | InputError | None:
        """What a worker gave the run up for: no other need try."""
        return self.failure

    async def came_before(self, who: int | str, error: tuple) -> bool:
        """Whether a worker has failed with this before, the last time that it failed."""
        before, self.errors[who] = self.errors.get(who), error
        return before == error

    async def ask_to_stop(self, reason: str) -> None:
        """`reason` is one of the loop's STOP_REASONS; the first one counts."""
        async with self.asked:
            self.stop_reason = self.stop_reason or reason
            self.asked.notify_all()

    async def leave(self, node: str) -> None:
        """Ask the trials that run on a node to stop: it will be taken away."""
        async with self.asked:
            self.leaving.add(node)
            self.asked.notify_all()

    async def heartbeat(self, heartbeat: "Heartbeat") -> None:
        """What a worker tells of itself (see `watchdog`)."""
        now, before = time.monotonic(), self.told.get(heartbeat.rank)
        since = now
        if before and (before[0].pid, before[0].step, before[0].slow) == (
            heartbeat.pid,
            heartbeat.step,
            heartbeat.slow,
        ):
            since = before[2]
        self.told[heartbeat.rank] = heartbeat, now, since

    async def heartbeats(self) -> dict[int | str, tuple]:
        """By rank or trial, the last heartbeat, the seconds since, and the seconds since its step has changed."""
        now = time.monotonic()
        return {
            rank: (heartbeat, now - at, now - since) for rank, (heartbeat, at, since) in self.told.items()
        }

    async def forget_heartbeat(self, rank: int | str) -> None:
        self.told.pop(rank, None)

    async def forget_heartbeats(self) -> None:
        self.told.clear()

    async def give_up(self, trial: str) -> None:
        """Ask one trial of a search to stop."""
        self.given_up.add(trial)

    async def why_stopped(self, trial: str) -> str:
        """The reason, or nothing if nobody has asked this trial to stop."""
        return self.stop_reason or (PRUNED if trial in self.given_up else "")

    async def stop_asked(self, node: str | None = None) -> str:
        """Returns the reason once somebody asked to stop, or GO_ON after a while: whoever asks may be dead.

        Args:
            node: Where the trial runs that asks. Other runs' workers hear from Ray Train that a node will be taken away.
        """
        async with self.asked:
            with contextlib.suppress(TimeoutError):
                asked = self.asked.wait_for(lambda: self.stop_reason or node in self.leaving)
                await asyncio.wait_for(asked, ANSWERED_AFTER_S)
            return self.stop_reason or (PREEMPTED if node in self.leaving else GO_ON)


ChannelHandle = Any  # Ray's own type knows of no methods


def open_channel() -> ChannelHandle:
    """A handle of a new `Channel`, on the driver's node."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    remote = ray.remote(num_cpus=0, max_concurrency=1000, label_selector=here)  # type: ignore[call-overload]  # Ray's own types have options of functions only
    return remote(Channel).remote()


def teller(channel: ChannelHandle) -> Callable[[Event], None]:
    """Sends a run's events over the channel; of the steps, only one now and then."""
    told_at = 0.0

    def tell(event: Event) -> None:
        nonlocal told_at
        if not isinstance(event, Step) or time.monotonic() - told_at > TELL_EVERY_S:
            told_at = time.monotonic()
            channel.tell.remote(event)

    return tell


_asked_to_stop: dict = {}  # channel -> the reason it has told; one listening thread for each, however many trials


def listen_for_stop(channel: ChannelHandle, node: str | None = None) -> Callable[[], str]:
    """The loop's `should_stop`: what the run was asked to stop for, as far as the channel has told.

    Args:
        node: This one, for a trial, which has nobody else to hear from that it will be taken away.
    """

    def wait() -> None:
        with contextlib.suppress(Exception):  # the driver is gone: Ray ends this process
            while not _asked_to_stop[channel]:
                _asked_to_stop[channel] = ray.get(channel.stop_asked.remote(node))

    if channel not in _asked_to_stop:
        _asked_to_stop[channel] = ""
        threading.Thread(target=wait, daemon=True).start()
    return lambda: _asked_to_stop[channel]
