"""What lies below a folder: runs and searches, how far they are, how good, how old, and how they go on.

    python -m ray_jobs.list [FOLDER]

FOLDER is `outputs` if it is left out. The newest comes first; a search's trials are not listed on their own. Below each that has
not reached its end stands the command that goes on with it.
"""

import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.cli.command_line import not_an_address
from ray_jobs.cli.terminal import quiet
from ray_jobs.cluster.job import run_job
from ray_jobs.cluster.run_folder import MARK_FILE
from ray_jobs.config.errors import InputError
from ray_jobs.config.options import OPTIONS_FILE
from ray_jobs.config.units import duration
from ray_jobs.search.files import (
    DONE,
    ENDED,
    GOING_ON,
    SEARCH_FILE,
    TRIALS_DIR,
    read_search,
)
from ray_jobs.search.options import MORE_IS_BETTER
from ray_jobs.storage.records import (
    METRIC,
    METRICS_FILE,
    SUMMARY_FILE,
    Damaged,
    read_json,
    read_metrics,
    read_summary,
)

DEFAULT = "outputs"
LAST = Path("checkpoints", "last", "pretrained_model", "train_config.json")
RUNNING, CUT_OFF = "running", "cut off"  # the latter: it ended without a word, as a killed process does


@dataclass(frozen=True)
class Found:
    """A run or a search: the columns of its line, and the command that goes on with it, if it is not at its end."""

    kind: str
    state: str
    progress: str
    best: str
    changed: float  # seconds since 1970
    go_on: str = ""


def main(argv: list[str]) -> int:
    quiet()
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    folder = _folder(argv)
    found = sorted(((place, read(place)) for place in places(folder)), key=lambda pair: -pair[1].changed)
    if not found:
        print(f"there is no run and no search below {folder}")
    now = time.time()
    rows = [
        (str(place), f.kind, f.state, f.progress, f.best, f"{duration(max(0, now - f.changed))} ago")
        for place, f in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, (_, each) in zip(rows, found, strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if each.go_on:
            print(f"    {each.go_on}")
    return 0


def _folder(words: list[str]) -> Path:
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise InputError(
            f"{shlex.join(words)}: one folder is wanted, as in python -m ray_jobs.list {DEFAULT}."
        )
    if words and (mistakes := not_an_address("FOLDER", words[0])):
        raise InputError(mistakes[0].replace("--FOLDER=", ""))
    folder = Path(words[0] if words else DEFAULT).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder.")
    return folder


def places(folder: Path) -> Iterator[Path]:
    """The folders of runs and searches, links not followed; none within another one."""
    for place, folders, files in os.walk(folder):
        if (
            SEARCH_FILE in files
            or (OPTIONS_FILE in files and "checkpoints" in folders)
            or METRICS_FILE in files
        ):
            folders.clear()
            yield Path(place)


def read(folder: Path) -> Found:
    """What a run's or a search's folder tells; also of one that is damaged, whose state says so."""
    is_search = (folder / SEARCH_FILE).is_file()
    files = [folder / name for name in (METRICS_FILE, SUMMARY_FILE, SEARCH_FILE, OPTIONS_FILE)]
    changed = max(file.stat().st_mtime for file in (*files, folder) if file.exists())
    try:
        return (_search if is_search else _run)(folder, changed)
    except (Damaged, OSError) as error:
        why = str(error).replace(f"{folder}/", "")
        return Found("search" if is_search else "run", f"unreadable: {why}", "", "", changed)


def _run(folder: Path, changed: float) -> Found:
    summary, records = read_summary(folder, step=int | None, steps=int | None), read_metrics(folder)
    typed = (
        read_json(folder / OPTIONS_FILE).get("asked", {}).get("typed", {})
        if (folder / OPTIONS_FILE).is_file()
        else {}
    )
    step = max((record["step"] for record in records), default=summary.get("step") or 0)
    steps = summary.get("steps") or typed.get("steps") or "?"
    state = RUNNING if _is_held(folder) else summary.get("status") or CUT_OFF
    values = [(record[METRIC], record["step"]) for record in records if record.get(METRIC) is not None]
    best = f"{METRIC} {min(values)[0]:.4g} at {min(values)[1]}" if values else ""
    go_on = ""
    if state not in (RUNNING, *ENDED) and (folder / LAST).is_file():
        go_on = f"python -m ray_jobs.train --resume=true --config_path={shlex.quote(str(folder / LAST))}"
    return Found("run", state, f"step {step}/{steps}", best, changed, go_on)


def _search(folder: Path, changed: float) -> Found:
    asked, summary = read_search(folder), read_summary(folder)
    held = _is_held(folder)
    state = summary.get("status") or CUT_OFF
    if held or state == GOING_ON:
        state = RUNNING if held else CUT_OFF
    trials = [
        trial for trial in (folder / TRIALS_DIR).glob("*") if trial.is_dir() and "-seed" not in trial.name
    ]
    ended = sum((trial / SUMMARY_FILE).is_file() for trial in trials)
    best = summary.get("best") or {}
    metric = asked.metrics[0]
    shown = f"{metric} {best['values'][metric]:.4g}, trial {best['trial']}" if best.get("values") else ""
    if not shown:
        values = [r[metric] for trial in trials for r in read_metrics(trial) if r.get(metric) is not None]
        shown = f"{metric} {(max if metric in MORE_IS_BETTER else min)(values):.4g}" if values else ""
    go_on = ""
    if state not in (RUNNING, DONE):
        go_on = f"python -m ray_jobs.tune --resume=true --output_dir={shlex.quote(str(folder))}"
    of = asked.flags.get("tune.num_samples", "16")
    return Found("search", state, f"{ended}/{of} trials", shown, changed, go_on)


def _is_held(folder: Path) -> bool:
    """Whether a command is at work in a folder, as far as this machine can tell (NFS tells of others, too). The lock is held
    for microseconds, in which a command that begins just then would be refused."""
    try:
        with (folder / MARK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


if __name__ == "__main__":
    run_job(main, at_end=lambda: None)
