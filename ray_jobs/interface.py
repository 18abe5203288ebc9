"""The jobs as functions, for notebooks and scripts: `from ray_jobs import train, tune, evaluate`.

    summary = train(dataset={"repo_id": "me/parts", "root": "datasets/parts"}, policy={"type": "act"}, steps=2000,
                    output_dir="outputs/act")
    summary = tune("--space=search_spaces/act.yaml", "--tune.num_samples=8", output_dir="outputs/act_search", ...)

A call is the command: it runs in a process of its own, so that a notebook's own process keeps its memory, its signals and its
environment. What the job prints is printed here; an interrupted cell (the stop button, Ctrl-C) interrupts the job, which saves a
checkpoint as ever.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ray_jobs.config.errors import InputError, RunError
from ray_jobs.config.flag_table import Flag, load
from ray_jobs.storage.records import read_json

INTERRUPTED = 130  # a job's exit status


class Job(ModuleType):
    """A job's module that can be called: `ray_jobs.train` is one, and so `train(...)` what `python -m ray_jobs.train` is."""

    def __call__(self, *words: Any, **flags: Any) -> Any:
        """Run the job to its end.

        Args:
            words: Flags as they are typed, `--steps=2000`, or one list of them.
            flags: The same by name, `steps=2000`; of a group as a dictionary, `policy={"type": "act"}`. Numbers, true and false,
                lists and None are written as the command line has them, texts and paths as they are.

        Returns:
            What the job has written down: the summary of a training or a search (`summary.json`), the results of an
            evaluation (`evaluation.json`).

        Raises:
            InputError: The job refused what was asked for.
            RunError: It failed.
            KeyboardInterrupt: It was interrupted.
        """
        given: Iterable[str] = words[0] if len(words) == 1 and not isinstance(words[0], str) else words
        line = [*given, *as_words(flags)]
        places = [word.partition("=")[2] for word in line if word.startswith("--output_dir=")]
        if not places or "://" in places[-1]:
            raise InputError(
                "output_dir: a folder is wanted, out of which the summary is read when the job has ended."
            )
        assert self.__spec__ is not None
        status, said = _run(self.__spec__.name, line)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            raise (InputError if status == 2 else RunError)(said)
        return read_json(Path(places[-1]) / self.RESULT, object)


def callable_as_job(name: str, result: str) -> None:
    """Make a job's module callable.

    Args:
        name: Of the module, as it is in `sys.modules`.
        result: The file in its output folder that a call returns the content of.
    """
    module: Any = sys.modules[name]
    module.__class__, module.RESULT = Job, result


def as_words(flags: Mapping[str, Any], group: str = "") -> Iterator[str]:
    """Flags by name as the words of a command line.

    >>> list(as_words({"policy": {"type": "act", "use_vae": False}, "steps": 3}))
    ['--policy.type=act', '--policy.use_vae=false', '--steps=3']
    """
    table = load()
    known: Mapping[str, Flag] = table.flags() if table else {}
    for name, value in flags.items():
        name = f"{group}{name}"
        if isinstance(value, Mapping) and not (name in known and known[name].type.startswith("dict")):
            yield from as_words(value, f"{name}.")
        elif isinstance(value, str | os.PathLike):
            yield f"--{name}={os.fspath(value)}"
        else:
            yield f"--{name}={json.dumps(value)}"


def _run(module: str, words: list[str]) -> tuple[int, str]:
    """Run a job as a process, and print what it prints; its exit status, and its last lines: a refusal stands there."""
    # A notebook's kernel asks for colours with these; what is printed here is lines.
    env = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    job = subprocess.Popen(
        [sys.executable, "-u", "-m", module, *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C comes here alone, and is handed on once
    )
    assert job.stdout is not None
    refusal: list[str] = []
    while True:
        try:
            for line in job.stdout:
                print(line, end="", flush=True)
                if line.startswith(("error: ", "failed: ")):
                    refusal.clear()
                    line = line.partition(": ")[2]
                    refusal.append(line)
                elif refusal:
                    refusal.append(line)
            return job.wait(), "".join(refusal).strip() or f"{module} has ended with status {job.returncode}."
        except KeyboardInterrupt:
            job.send_signal(signal.SIGINT)  # it says what it does, and how to make it end at once
