"""Storage that fails for a while, a mount whose server is away or a bucket: what is to be written is tried again, with ever
longer waits, before the run is given up with its last checkpoint intact. (Mounts that block meanwhile, as NFS does by
default, need none of it.)
"""

import errno
import re
import time
from collections.abc import Callable

from ray_jobs.engine.busy import busy
from ray_jobs.engine.errors import StorageError, StorageLost
from ray_jobs.engine.explain import first_line

PATIENCE_S = 900
LONGEST_WAIT_S = 30
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
) -> Result:
    """Call `write` until it succeeds; it must be one that can be repeated.

    Args:
        what: Is written (or `doing`), for the messages.
        tell: Called with a line of text when storage fails, and when it is back.
        passing: Whether to try again after this error.
        kept: Says what is not lost, at the end of patience.

    Raises:
        StorageLost: It has failed for PATIENCE_S.
    """
    failing_since, wait = None, 1.0
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
            if now - failing_since > PATIENCE_S:
                raise StorageLost(
                    f"{what} could not be {doing} for {PATIENCE_S:g} s: {reason}\n{kept()}"
                ) from error
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)
        else:
            if failing_since is not None:
                tell(f"{what} is {doing}: storage is back after {time.monotonic() - failing_since:.0f} s.")
            return result
