"""How a job or a run ends early: errors that are meant for people, and the reasons to stop a training."""

import errno
import os

# What the loop's `should_stop` answers, and a stopped run's status: with a checkpoint, or without.
STOP_REASONS = GO_ON, INTERRUPTED, PRUNED, PREEMPTED = "", "interrupted", "pruned", "preempted"


class InputError(Exception):
    """The user asked for something that cannot be done. Exit status 2; the message is one or two lines."""


class RunError(Exception):
    """The run started and failed for a reason that trying again will not mend. Exit status 1."""


class StorageError(InputError):
    """Storage does not answer: wrong input where a run is begun, but later it may pass."""


class StorageFull(InputError):
    """There is no room: wrong input where a run is begun, but a search would fail at it with one trial after the other."""


class StorageLost(RunError):
    """Storage has failed for too long, or is full."""


def no_room(error: Exception) -> bool:
    """Whether a disk or a quota is full; safetensors and Arrow say it in words alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full)
