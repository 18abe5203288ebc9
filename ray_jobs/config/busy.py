"""What a thread is about that may take long for good reasons: validating, saving, waiting for storage. Who does it says so,
and the `watchdog` does not take it for a hang.
"""

import contextlib
import threading
from collections.abc import Iterator

_doing: dict[int, list[str]] = {}  # by thread, the innermost last


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Within, or within a function that it decorates, this thread is busy with `what`."""
    mine = _doing.setdefault(threading.get_ident(), [])
    mine.append(what)
    try:
        yield
    finally:
        mine.pop()


def busy_with(thread: threading.Thread) -> str:
    """What a thread is busy with; nothing if it just goes on."""
    return next(reversed(_doing.get(thread.ident or 0, [])), "")
