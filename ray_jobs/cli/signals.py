"""Ctrl-C, and SIGTERM, which `ray job stop` and process managers send: what they do to a job."""

import math
import os
import signal
import time
from collections.abc import Callable
from types import FrameType

# Signals this close are one interruption: `uv run` hands on, 0.2 s later, what its child has got, too, and Python may hear of
# a signal only when what the main thread waits for returns.
ONE_S = 1.5
AGAIN_S = 0.05  # between looks whether an import is over

_came = -math.inf  # when the last interruption came
_put_off = False  # until an import is over


def on_interruption(handler: Callable[[int, FrameType | None], None]) -> Callable[[], None]:
    """Call `handler`, as a signal's, once for every interruption from now on.

    In the background of a shell, where Ctrl-C is ignored, it stays ignored.

    Returns:
        What restores the handlers of before.
    """

    def once(signum: int, frame: FrameType | None) -> None:
        global _came
        if time.monotonic() - _came >= ONE_S:
            _came = time.monotonic()
            handler(signum, frame)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] == signal.SIG_IGN:
        del before[signal.SIGINT]
    for number in before:
        signal.signal(number, once)

    def restore() -> None:
        for number, was in before.items():
            signal.signal(number, was)

    return restore


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, though not amid an import, but once that is over; asked again there, end the process.

    Amid an import, Python (3.12) may never give the import lock back, and the thread that starts Ray, which imports, too,
    would wait for it for ever; or a library takes it for an import that fails, and goes on.
    """
    global _put_off
    looks_again = signum == signal.SIGALRM
    if looks_again and not _put_off:  # it was raised, or taken back, meanwhile
        return
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if _put_off and not looks_again:
                os.write(2, b"interrupted.\n")
                os._exit(130)
            _put_off = True
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
            return
        frame = frame.f_back
    take_back()
    raise KeyboardInterrupt


def take_back() -> bool:
    """Let an interruption that is put off never come; returns whether one was."""
    global _put_off
    was, _put_off = _put_off, False
    signal.setitimer(signal.ITIMER_REAL, 0)
    return was
