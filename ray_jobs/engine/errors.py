"""How a job or a run ends early: errors that are meant for people, and the reasons to stop a training."""

# What the loop's `should_stop` answers, and a stopped run's status: with a checkpoint, or without.
STOP_REASONS = GO_ON, INTERRUPTED, PRUNED = "", "interrupted", "pruned"


class InputError(Exception):
    """The user asked for something that cannot be done; exit status 2."""


class RunError(Exception):
    """The run itself failed, for a reason that can be told in a line or two; exit status 1."""
