"""How a job or a run ends early: errors that are meant for people, and the reasons to stop a training."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

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


class Mistakes(list[str]):
    """What is wrong with a command, a line or two each."""

    def of(self, check: Callable[[], object]) -> bool:
        """Collect what a check refuses, unless it has been told; whether it refused nothing."""
        try:
            check()
        except InputError as error:
            told = {line for mistake in self for line in mistake.splitlines()}
            self.extend(line for line in str(error).splitlines() if line not in told)
            return False
        return True


@contextlib.contextmanager
def all_mistakes() -> Iterator[Mistakes]:
    """Within, mistakes are collected in the list; at its end they are raised together."""
    mistakes = Mistakes()
    yield mistakes
    if mistakes:
        raise InputError("\n".join(mistakes))


def first_line(error: BaseException) -> str:
    """An error's message, as far as it belongs on a terminal."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def causes(error: BaseException) -> list[BaseException]:
    """An error and what caused it, outermost first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain
