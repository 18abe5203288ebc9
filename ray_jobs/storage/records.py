"""What a run and a search write down as JSON: whole and valid, and read with a look at what it is. Imports nothing large."""

import json
import math
from pathlib import Path
from typing import Any

from ray_jobs.config.errors import InputError

METRICS_FILE, SUMMARY_FILE = "metrics.jsonl", "summary.json"  # of a run; the second of a search, too
METRIC = "val/action_error"  # what "best" means
SUCCESS = "env/success_rate"  # of the episodes in a simulator


class Damaged(InputError, ValueError):
    """A file does not hold what it is read for."""

    def __init__(self, file: Path | str, why: object):
        super().__init__(f"{file} is damaged: {why}")


def json_text(content: Any, indent: int | None = None) -> str:
    """As JSON, which knows neither NaN nor infinity: they become null."""
    return json.dumps(_valid(content), indent=indent, default=str, allow_nan=False)


def _valid(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _valid(value) for key, value in content.items()}
    return [_valid(value) for value in content] if isinstance(content, list | tuple) else content


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json_text(content, indent=2) + "\n")
    scratch.replace(path)


def parse_json(text: str | bytes, kind: type[Any] = dict, **members: Any) -> Any:
    """A JSON text's content.

    Args:
        kind: What it must be.
        members: Of an object, by name, the type of those that are needed; with `| None` they may be missing.

    Raises:
        ValueError: It is not JSON, or something else.
    """
    try:
        content = json.loads(text, parse_constant=lambda name: None)  # NaN, in files of older versions
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, kind):
        raise ValueError(f"holds a {type(content).__name__}, not a {kind.__name__}")
    for name, type_ in members.items():
        if not isinstance(content.get(name), type_):
            raise ValueError(f"its {name} is {json.dumps(content.get(name))[:60]}")
    return content


def read_json(file: Path, kind: type = dict, **members: Any) -> Any:
    """A JSON file's content (see `parse_json`).

    Raises:
        Damaged: It is not JSON, or something else.
    """
    try:
        return parse_json(file.read_bytes(), kind, **members)
    except ValueError as error:
        raise Damaged(file, error) from None


def read_metrics(output_dir: Path) -> list[dict]:
    """All records of a run's metrics.jsonl; a torn last line (a kill while writing) is left out.

    Raises:
        Damaged: Another line is none.
    """
    path = output_dir / METRICS_FILE
    lines = path.read_bytes().splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(parse_json(line, step=int))
        except ValueError as error:
            if number < len(lines):
                raise Damaged(path, f"line {number} is no record ({error})") from None
    return records


def read_summary(folder: Path, **members: Any) -> dict:
    """A run's or a search's summary.json; {} if there is none.

    Args:
        members: What it must hold beside how it has ended (see `parse_json`).

    Raises:
        Damaged: It is none.
    """
    if not (folder / SUMMARY_FILE).is_file():
        return {}
    summary = read_json(folder / SUMMARY_FILE, status=str, best=dict | None, **members)
    return {"best": None, **summary}
