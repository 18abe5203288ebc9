"""A job as a process: typed here or submitted to a cluster, and its exit status."""

import contextlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ray_jobs.cli import environment
from ray_jobs.cli.command_line import read_flags
from ray_jobs.cli.pages import page_of
from ray_jobs.cli.signals import interrupt, on_interruption, take_back
from ray_jobs.cli.terminal import doing
from ray_jobs.cluster import connect
from ray_jobs.cluster.ray_internals import SUBMITTED
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.config.options import NO_CACHE, SOME_CACHE

RELATIVE = re.compile(r"(?![/~]|[\w+]+://).")
RELATIVE_FILE = re.compile(r"(sqlite(\+\w+)?:///|journal://)(?!/)")  # as a study's storage
HAS_OUTPUT = (
    "train",
    "tune",
    "evaluate",
    "demo",
)  # jobs with an --output_dir of their own, below this folder


def run_job(main: Callable[[list[str]], int], at_end: Callable[[], None]) -> None:
    """Run a job's main, then `at_end`, and exit: 0 done, 2 wrong input, 1 failed, 130 interrupted."""
    environment.be_heard()
    connect.before_ray()
    on_interruption(interrupt)
    try:
        check_submitted(Path(sys.argv[0]).stem, sys.argv[1:])
        status = main(sys.argv[1:])
    except BaseException as error:
        doing("")
        # Ctrl-C ends processes that an import has started, too, and so the import, before it is raised here.
        if isinstance(error, KeyboardInterrupt) or take_back():
            told, status = "interrupted.", 130
        elif isinstance(error, InputError):
            told, status = f"error: {error}", 2
        elif isinstance(error, RunError):
            told, status = f"failed: {error}", 1
        else:
            raise
        if status != 130 and (page := page_of(error)):
            told += f"\nmore: {page}"
        if status == 2 and not sys.argv[1:] and (about := sys.modules["__main__"].__doc__):
            told += f"\nshortest: {shortest(about)}"
        print(told, file=sys.stderr)
    doing("")
    sys.stdout.flush()
    take_back()
    on_interruption(lambda *_: os._exit(status))  # who does not want to wait need not
    try:
        at_end()  # last: nobody should wait for Ray's end to read what is wrong
    except TimeoutError:  # what has been started ends with this process
        os._exit(status)
    sys.exit(status)


def shortest(text: str) -> str:
    """The first command in a job's description, without what may be left out."""
    return (
        next(line for line in text.splitlines() if line.startswith("    python")).partition(" [")[0].strip()
    )


def check_submitted(job: str, words: list[str]) -> None:
    """Refuse relative places to write to in a job of `ray job submit`: it runs in a folder of Ray's own, a copy of the one
    that was submitted, which goes with the session.

    Args:
        job: Its name, as `train`.
        words: Its command line.

    Raises:
        InputError: There are some.
    """
    if SUBMITTED not in os.environ:
        return
    flags: dict[str, str] = {}
    with contextlib.suppress(InputError):  # the job says it
        flags, _ = read_flags(words[1:] if job == "cache" else words)
    if {"help", "h", "dry-run", "dry_run", "tune.dry_run"} & set(flags) or "-h" in words:
        return
    places = {
        f"--{name}": flags[name] for name in ("output_dir", "config_path", "data.cache") if name in flags
    }
    if places.get("--data.cache", "").lower() in (*NO_CACHE, *SOME_CACHE):
        del places["--data.cache"]
    places |= {name: os.environ[name] for name in environment.PATHS if name in os.environ}
    wrong = [f"{name}={value}" for name, value in places.items() if RELATIVE.match(value)]
    if RELATIVE_FILE.match(storage := flags.get("tune.storage", "")):
        wrong.append(f"--tune.storage={storage}")
    if job in HAS_OUTPUT and not {"output_dir", "config_path"} & set(flags):
        wrong.insert(0, "no --output_dir")
    if wrong:
        raise InputError(
            f"{', '.join(wrong)}: a submitted job runs in a folder of Ray's own, which goes with it. Give the whole path, "
            "of a folder that all nodes see, or a bucket's (s3://...)."
        )
