"""Storage that fails for a while, a mount whose server is away or a bucket: what is to be written is tried again, with ever
longer waits, before the run is given up with its last checkpoint intact. (Mounts that block meanwhile, as NFS does by
default, need none of it.) Who is asked to stop meanwhile waits no longer.
"""

import errno
import re
import time
from collections.abc import Callable

from ray_jobs.config.busy import busy
from ray_jobs.config.errors import StorageError, StorageLost, first_line

PATIENCE_S = 900
LONGEST_WAIT_S = 30
STOPPING_S = 5  # of patience that are left to who is asked to stop
LOOK_EVERY_S = 0.5  # whether somebody has
# What may pass by itself. A full disk does not.
PASSING = {getattr(errno, name) for name in ("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "EHOSTDOWN",
           "EHOSTUNREACH", "ENOTCONN", "ESHUTDOWN", "ECONNRESET", "EROFS")}  # fmt: skip
IN_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors tells of an errno
INTACT = "The last checkpoint is intact; --resume=true goes on from it."


def may_pass(error: Exception) -> bool:
    """Whether a mount that reports this may be well again later."""
    told = IN_RUST.search(str(error))
    return (int(told[1]) if told else getattr(error, "errno", None)) in PASSING


def storage_may_return(error: Exception) -> bool:
    """Whether a bucket may be well again later. A bare error of this node's disk is not waited for: another node's may be
    well."""
    return isinstance(error, StorageError)


@busy("waiting for storage")
def patiently[Result](
    write: Callable[[], Result],
    what: object,
    tell: Callable[[str], None],
    *,
    doing: str = "written",
    passing: Callable[[Exception], bool] = may_pass,
    kept: Callable[[], str] = lambda: INTACT,
    stop: Callable[[], object] = lambda: False,
) -> Result:
    """Call `write` until it succeeds; it must be one that can be repeated.

    Args:
        what: Is written (or `doing`), for the messages.
        tell: Called with a line of text when storage fails, and when it is back.
        passing: Whether to try again after this error.
        kept: Says what is not lost, at the end of patience.
        stop: Whether somebody has asked to stop.

    Raises:
        StorageLost: It has failed for PATIENCE_S, or for STOPPING_S since somebody has asked to stop.
    """
    failing_since = stopping_since = None
    wait = 1.0
    while True:
        try:
            result = write()
        except Exception as error:
            if not passing(error):
                raise
            reason, now = f"{type(error).__name__}: {first_line(error)}", time.monotonic()
            if failing_since is None:
                failing_since = now
                tell(f"{what} cannot be {doing}, trying again: {reason}")
            if stopping_since is None and stop():
                stopping_since, wait = now, 1.0
            for since, seconds, when in (
                (failing_since, PATIENCE_S, f"for {PATIENCE_S:g} s"),
                (stopping_since, STOPPING_S, "before this was stopped"),
            ):
                if since is not None and now - since > seconds:
                    raise StorageLost(f"{what} could not be {doing} {when}: {reason}\n{kept()}") from error
            again = now + wait
            while (left := again - time.monotonic()) > 0 and (stopping_since is not None or not stop()):
                time.sleep(min(left, LOOK_EVERY_S))
            wait = min(2 * wait, LONGEST_WAIT_S) if stopping_since is None else 1.0
        else:
            if failing_since is not None:
                tell(f"{what} is {doing}: storage is back after {time.monotonic() - failing_since:.0f} s.")
            return result
