"""What reaches the user's terminal: progress, notices and one-line errors; not the noise of dependencies.

Importing this module is cheap, and `quiet()` must come before LeRobot is imported.
"""

import contextlib
import gc
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ray_jobs.cli import environment
from ray_jobs.config.events import Doing, Event, Fault, Log, Notice, Start, Step, Validated
from ray_jobs.config.units import duration

WORKER_LOST = "a worker was lost"
STILL_EVERY_S = 5  # how often is said what goes on before the first step
OUTPUT_EVERY_S = 30  # how often a log file (no terminal) hears of the progress between log steps


def quiet() -> None:
    """Keep warnings and logs of dependencies away from the terminal (`RAY_JOBS_DEBUG=1` shows them), and see to what they
    read from the environment. Nothing is unpickled from here on."""
    environment.settle()
    # torchvision's own loader of weights would unpickle whatever lies in `--assets.dir`.
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    if os.environ.get("RAY_JOBS_DEBUG"):
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.simplefilter("ignore")
    # Without FFmpeg, LeRobot logs 150 lines of torchcodec's traceback before it falls back to PyAV.
    logging.disable(logging.ERROR)


_doing = ("", 0.0)  # what goes on before the first step, and since when
_something_else = threading.Event()
_telling: threading.Thread | None = None


def doing(what: str) -> None:
    """Say what goes on, at once and every 5 s from then on, until something else does; nothing, with an empty text."""
    global _doing, _telling
    if what == _doing[0]:
        return
    _doing = what, time.monotonic()
    if what:
        print(f"{what} ...", flush=True)
    _something_else.set()
    if _telling is None:
        _telling = threading.Thread(target=_tell_on, daemon=True)
        _telling.start()


def _tell_on() -> None:
    while True:
        if _something_else.wait(
            STILL_EVERY_S
        ):  # a clock of its own would leave up to twice as long without a word
            _something_else.clear()
            continue
        what, since = _doing
        if what:
            with contextlib.suppress(OSError, ValueError):  # nobody listens
                print(f"{what}, {duration(time.monotonic() - since)} ...", flush=True)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For importing LeRobot: Python would spend a fifth of the time looking for garbage among what stays."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


class Display:
    """Shows a run's events: a bar on a terminal, plain lines in a log file."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.facts: dict = {}
        self.waits_since: float | None = time.monotonic()  # for workers; None while they train
        self.bar: Progress | None = None
        self.step = 0
        self.values = ""
        self.why_again = WORKER_LOST  # what will have begun the run anew, if it begins anew
        self.rate_from: tuple[float, int] | None = None  # (time, step) the time left is estimated from
        self.last_line = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def show(self, event: Event) -> None:
        match event:
            case Notice():
                self.say(event.text)
            case Doing():
                doing(event.text)
            case Fault():
                self._fault(event)
            case Start():
                self._start(event.start_step, event.facts)
            case Step():
                self._step(event.step)
            case Log():
                self._log(event)
            case Validated():
                self._validated(event)

    def close(self) -> None:
        doing("")
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _fault(self, event: Fault) -> None:
        """Something for which the workers are about to be started again. Told once they have been, with what it has cost."""
        if event.starting:
            self.say(event.text)  # for they had not been yet
        else:
            self.why_again = event.text
        self.waits_since = time.monotonic()

    def _start(self, start_step: int, facts: dict[str, Any]) -> None:
        self.waits_since = None
        if self.facts:
            again = facts.get("lost_steps", 0) - self.facts.get("lost_steps", 0)
            steps = f"; {again} step(s) are done again" if again else ""
            fewer = (
                f" with {facts['num_workers']} worker(s)"
                if facts["num_workers"] != self.facts["num_workers"]
                else ""
            )
            self.say(f"{self.why_again}; the run goes on from step {facts['start_step']}{fewer}{steps}")
            self.why_again = WORKER_LOST
            self.facts, self.step, self.rate_from = facts, start_step, None
            return
        doing("")
        self.facts, self.step = facts, start_step
        held_out = f", {facts['eval_episodes']} held out" if facts["eval_episodes"] else ""
        accumulated = f" x {facts['grad_accumulation']} accumulated" if facts["grad_accumulation"] > 1 else ""
        full = facts["global_batch_size"] // (facts["batch_size"] * facts["grad_accumulation"])
        fewer = f" on {facts['num_workers']}" if facts["num_workers"] < full else ""
        self.say(
            f"{facts['policy']}: {facts['learnable_parameters'] / 1e6:.1f} M learnable of "
            f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['device']}, precision {facts['precision']}\n"
            f"{facts['dataset']}: {facts['episodes']} episodes, {facts['frames']} frames{held_out}\n"
            f"effective batch {full} worker(s) x {facts['batch_size']}{accumulated}{fewer} = "
            f"{facts['global_batch_size']}; {facts['steps']} steps = {facts['epochs']:.1f} epochs"
        )
        if self.step:
            self.say(f"goes on from the checkpoint of step {self.step}")
        if self.console.is_terminal and self.bar is None:
            columns = (BarColumn(30), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=facts["steps"])
            self.bar.start()
        doing("the first step")

    def _step(self, step: int) -> None:
        doing("")
        self.step = step
        now = time.monotonic()
        if self.rate_from is None or self.rate_from[1] > self.step:
            self.rate_from = (now, self.step)  # the first step compiles and warms up: not counted
        if self.bar:
            self.bar.update(self.task, completed=self.step, description=self._progress())
        elif now - self.last_line > OUTPUT_EVERY_S:
            self._line()

    def _log(self, event: Log) -> None:
        self._step(event.step)
        self.values = (
            f"loss {event.values['train/loss']:.4g}  {event.values['train/samples_per_s']:.3g} samples/s  "
            f"{event.values['train/step_s']:.3g} s/step"
        )
        self._line()

    def _validated(self, event: Validated) -> None:
        units = {"val/loss": "", "val/action_error": " std", "env/success_rate": ""}
        values = (
            f"{name} {event.values[name]:.4g}{unit}" for name, unit in units.items() if name in event.values
        )
        self.say(f"step {event.step}: " + "  ".join(values))
        self.last_line = time.monotonic()

    def _line(self) -> None:
        self.say(self._progress())
        self.last_line = time.monotonic()

    def _progress(self) -> str:
        left = ""
        assert self.rate_from is not None  # a step has been told
        begin, first = self.rate_from
        if self.step > first:
            rate = (time.monotonic() - begin) / (self.step - first)
            left = f"  left {duration(rate * (self.facts['steps'] - self.step))}"
        return f"step {self.step}/{self.facts['steps']}  {self.values}{left}"
