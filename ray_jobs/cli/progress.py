"""What a search shows while it runs: a small table on a terminal, plain lines in a log file."""

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ray_jobs.cli.terminal import OUTPUT_EVERY_S
from ray_jobs.config.events import Begun, Ended, Event, Fault, Log, Notice, Start, Step, Validated
from ray_jobs.config.units import duration

SHOWN = 12  # rows at most
EARLY_S = 5  # how often a log file hears what is waited for, until the first step


class Progress:
    """Takes the events of the study (`ended`, `notice`) and of the trials, which carry a `trial`.

    Args:
        higher: Whether more of the metric is better.
        done: Trials that had ended before, in a resumed search.
        best: Their best value and trial, or None.
        slots: Trials at a time.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        steps: int,
        metric: str,
        higher: bool,
        done: int,
        best: tuple[float, str] | None,
        slots: int,
    ):
        self.console = Console(highlight=False, soft_wrap=True)
        self.num_samples, self.steps, self.metric = num_samples, steps, metric
        self.sign, self.done, self.best = (-1 if higher else 1), done, best
        self.counts: dict[str, int] = {}
        self.said: set[str] = set()
        self.running: dict[str, dict] = {}
        self.started, self.ended_here = time.monotonic(), 0
        self.steps_ended = 0  # of the trials that have ended here
        self.slots = slots
        self.stepped = False  # a trial has taken a step
        self.waiting, self.waits_since = "", self.started  # what for
        self.last_line = time.monotonic()
        self.last_told: tuple[int, str] | None = None
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        if self.console.is_terminal:
            self.live.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
        self.last_line = time.monotonic()

    def close(self) -> None:
        self.live.stop()

    def show(self, event: Event) -> None:
        row = self.running.get(event.trial or "")
        match event:
            case Begun() if event.trial:
                fresh = {"step": 0, "from": 0, "at_work": False, "value": None, "since": time.monotonic()}
                self.running[event.trial] = fresh
            case Notice() if event.text not in self.said:  # every trial says much the same
                self.said.add(event.text)
                self.say(event.text)
            case Fault():
                self.say(f"trial {event.trial}: {event.text}; it goes on from its last checkpoint")
            case Ended():
                self._ended(event)
            case Step() | Log() if row:
                row["step"], self.stepped = event.step, True
            case Start() if row:
                row |= {"step": event.start_step, "from": event.start_step, "at_work": True}
            case Validated() if row:
                row |= {"step": event.step, "value": event.values.get(self.metric)}

    def refresh(self) -> None:
        """Call a few times a second."""
        waiting = self._waiting()
        if self.live.is_started:
            self.live.update(self._table(waiting), refresh=True)
        elif time.monotonic() - self.last_line > (OUTPUT_EVERY_S if self.stepped else EARLY_S):
            steps = ", ".join(str(row["step"]) for row in list(self.running.values())[:SHOWN])
            if waiting:
                self.say(waiting)
            elif self.last_told != (told := (self.done, steps)):
                self.last_told = told
                self.say(f"{self._head()}; steps {steps} of {self.steps}")

    def _waiting(self) -> str:
        """What is waited for, and for how long already, where no trial takes steps."""
        names = ", ".join(list(self.running)[:SHOWN])
        if not self.running:
            slots = max(1, min(self.slots, self.num_samples - self.done))
            what = "waiting for a slot" if self.stepped else f"starting {slots} slot(s) for trials"
        elif not any(row["at_work"] for row in self.running.values()):
            what = f"opening the data and building the policy of trial {names}"
        elif not self.stepped:
            what = f"taking the first step of trial {names}"
        else:
            what = ""
        if what != self.waiting:
            self.waiting, self.waits_since = what, time.monotonic()
        waited = time.monotonic() - self.waits_since
        return (
            f"{self._head()}: {what}" + (f", {duration(waited)} so far" if waited > 1 else "") if what else ""
        )

    def _ended(self, event: Ended) -> None:
        name = event.trial or ""
        self.running.pop(name, None)
        status, value = event.status, event.value
        self.counts[status] = self.counts.get(status, 0) + 1
        text = f"trial {name} {status}"
        if value is not None:
            text += f": {self.metric} {value:.4g}"
        if event.step:
            text += f" at step {event.step}"
        if event.reason:
            text += f" ({event.reason})"
        if not event.repeat and status != "interrupted":
            self.done, self.ended_here = self.done + 1, self.ended_here + 1
            self.steps_ended += event.step or 0
            if status not in ("failed", "pruned") and value is not None:
                if self.best is None or self.sign * value < self.sign * self.best[0]:
                    self.best, text = (value, name), text + ", the best so far"
        self.say(text)

    def _head(self) -> str:
        parts = [f"{self.done}/{self.num_samples} trials"]
        parts += [f"{len(self.running)} running"] if self.running else []
        parts += [f"{n} {status}" for status, n in self.counts.items() if status in ("pruned", "failed")]
        if self.best:
            parts.append(f"best {self.metric} {self.best[0]:.4g} (trial {self.best[1]})")
        if left := self._left():
            parts.append(f"left {duration(left)}")
        return ", ".join(parts)

    def _left(self) -> float:
        """Seconds until all trials have ended, by the steps that were taken: a trial is expected to take as many as those that
        have ended here, or all of them once it has taken more. 0 as long as none has ended."""
        usual = self.steps_ended / max(1, self.ended_here)
        steps = [row["step"] for row in self.running.values()]
        not_begun = max(0, self.num_samples - self.done - len(steps))
        left = not_begun * usual + sum((usual if step < usual else self.steps) - step for step in steps)
        taken = self.steps_ended + sum(row["step"] - row["from"] for row in self.running.values())
        return (time.monotonic() - self.started) / taken * left if self.steps_ended else 0

    def _table(self, waiting: str) -> Table:
        table = Table(title=waiting or self._head(), title_justify="left", box=None, pad_edge=False)
        for column in ("trial", "step", self.metric, "for"):
            table.add_column(column, justify="right")
        for name, row in list(self.running.items())[:SHOWN]:
            value = "" if row["value"] is None else f"{row['value']:.4g}"
            table.add_row(
                name, f"{row['step']}/{self.steps}", value, duration(time.monotonic() - row["since"])
            )
        if len(self.running) > SHOWN:
            table.add_row(f"+{len(self.running) - SHOWN}")
        return table
