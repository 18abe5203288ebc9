"""What a run tells while it goes on: from the loop, over the channel of its workers, to a terminal or a search."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    trial: str | None = field(default=None, kw_only=True)
    """Its name, in a search."""


@dataclass(frozen=True)
class Notice(Event):
    """Something that people should know."""

    text: str


@dataclass(frozen=True)
class Doing(Event):
    """What goes on before the first step."""

    text: str


@dataclass(frozen=True)
class Start(Event):
    """Everything is built, the first step comes next."""

    start_step: int
    facts: dict[str, Any]
    """Of the run, as they will stand in its summary."""


@dataclass(frozen=True)
class Step(Event):
    """A training step is done."""

    step: int


@dataclass(frozen=True)
class Log(Event):
    """What happened since the last log step."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Validated(Event):
    """A validation is done, on held-out episodes or in a simulator; all ranks tell the same."""

    step: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Saved(Event):
    """There is a checkpoint; all ranks tell it."""

    step: int


@dataclass(frozen=True)
class Fault(Event):
    """Workers, or a trial's process, are about to be started again."""

    text: str
    announced: bool = False
    """Their node will be taken away, which is no failure."""
    starting: bool = False
    """They had not begun to train."""


@dataclass(frozen=True)
class Begun(Event):
    """A slot has taken up a trial."""


@dataclass(frozen=True)
class Ended(Event):
    """A trial has ended."""

    status: str
    reason: str | None
    value: float | None
    """Of the search's first metric."""
    step: int | None
    """Of the validation that it is judged by."""
    repeat: str | None
    """The other seed, if it was a repetition with one."""
