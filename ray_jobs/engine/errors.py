"""The two ways a job can go wrong, and the exit status each one has."""


class InputError(Exception):
    """The user asked for something that cannot be done. Exit status 2; the message is one or two lines."""


class RunError(Exception):
    """The run started and failed for a reason that trying again will not mend. Exit status 1."""
