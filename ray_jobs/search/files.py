"""Where things lie in a search's folder, and `search.json`, which says what was asked for. Imports nothing large."""

import re
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.config.errors import InputError
from ray_jobs.storage.records import METRIC, Damaged, parse_json, read_metrics

SEARCH_FILE = "search.json"  # the command line of a search, for --resume
LEFT_OUT = "left_out"  # part of that file
SPACES_DIR = "search_spaces"  # copies of the space files, for --resume and for the record
STUDY_FILE, TRIALS_FILE, TRIALS_DIR = "study.db", "trials.csv", "trials"
BEST_DIR, COMMAND_FILE = "best", "command.sh"
A_TRIAL = re.compile(r"(\d{4,})(?:-seed(\d+))?")  # the name of its folder: number, and seed of a repetition
# How a search has ended; a resumed one has not. (It may also have failed, or been interrupted.)
DONE, TIME_IS_UP, GOING_ON = "done", "time is up", "still going on"


@dataclass(frozen=True)
class Asked:
    """What search.json holds: the flags of a search as they were typed, and the policies of its spaces."""

    flags: dict[str, str]
    policies: list[str]
    left_out: list[str]
    """What the spaces would search for nothing. A search that began before there was this has left out nothing."""

    @property
    def metrics(self) -> list[str]:
        return self.flags.get("tune.metric", METRIC).split(",")


def read_search(place: Path | str, text: bytes | None = None) -> Asked:
    """What was asked for in a search.

    Args:
        place: Its folder, or its address in a bucket.
        text: Of its search.json, if that is not a file here.

    Raises:
        Damaged: It is not a search's.
    """
    try:
        text = (Path(place) / SEARCH_FILE).read_bytes() if text is None else text
        content = parse_json(text, flags=dict, policies=list, left_out=list | None)
        left_out = content.get(LEFT_OUT) or []
        for value in (*content["flags"].values(), *content["policies"], *left_out):
            if not isinstance(value, str):
                raise ValueError(f"{value!r} is no text")
    except ValueError as error:
        raise Damaged(f"{place}/{SEARCH_FILE}", error) from None
    return Asked(content["flags"], content["policies"], left_out)


def read_begun(folder: Path) -> Asked:
    """What was asked for in a search that is to go on.

    Raises:
        InputError: There is none.
    """
    if not (folder / SEARCH_FILE).is_file():
        raise InputError(f"--resume=true: nothing to resume, there is no search in {folder}.")
    return read_search(folder)


def trial_name(number: int, repeat: str | None = None) -> str:
    """What a trial is called in folders and tables; `repeat` is the seed of a finalist's repetition."""
    return f"{number:04d}-seed{repeat}" if repeat else f"{number:04d}"


def trial_dir(output_dir: Path, name: str) -> Path:
    return output_dir / TRIALS_DIR / name


def trial_place(search: str, name: str) -> str:
    """A trial's `--output_dir`, below that of its search: a folder or an address in a bucket."""
    return f"{search}/{TRIALS_DIR}/{name}"


ENDED = ("finished", "stopped early")  # how a run ends that was trained as far as it was to be


def validations(folder: Path, metrics: list[str]) -> list[dict]:
    """The records of a run's metrics.jsonl that have numbers for all of `metrics`."""
    return [r for r in read_metrics(folder) if all(r.get(name) is not None for name in metrics)]


def best_values(folder: Path, metrics: list[str]) -> dict:
    """The validation that a run is judged by: the one with the least action error, whose checkpoint stays; under
    another metric, the last one. `step` and the metrics, or nothing if there was no validation."""
    records = validations(folder, metrics)
    if not records:
        return {}
    best = min(records, key=lambda r: r[METRIC]) if metrics[0] == METRIC else records[-1]
    return {key: best[key] for key in ("step", *metrics)}


def ranked_checkpoint(folder: Path, metrics: list[str]) -> Path | None:
    """The checkpoint of a trial whose validation it was ranked by (see `best_values`), None if there is none."""
    links = (folder / "checkpoints" / name for name in ranked_links(metrics))
    return next((link for link in links if link.exists()), None)


def ranked_links(metrics: list[str]) -> tuple[str, ...]:
    """Links to the checkpoint that a trial is ranked by: the first that is there."""
    return ("best", "last") if metrics[0] == METRIC else ("last",)
