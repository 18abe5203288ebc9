"""flags.md: every flag with its type, default and meaning, out of the dataclasses that the command lines are read with.

python docs/make_flags.py           # `--check` compares instead, as tests/docs/test_pages.py does
"""

import ast
import dataclasses
import json
import sys
from pathlib import Path

from draccus.wrappers.docstring import get_attribute_docstring

from ray_jobs.__main__ import JOBS
from ray_jobs.config import flag_table
from ray_jobs.config.flag_table import Flag, flags_of
from ray_jobs.config.options import Options
from ray_jobs.search.options import TuneOptions

PAGE = Path(__file__).with_name("flags.md")
ROOT = Path(__file__).parent.parent


def cell(text: str) -> str:
    """Text as it may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


def type_of(flag: Flag) -> str:
    return cell(" or ".join(flag.choices) if flag.choices else flag.type)


def default_of(flag: Flag) -> str:
    if flag.required:
        return "required"
    return "" if flag.default is None else f"`{cell(json.dumps(flag.default))}`"


def ours(group: str, options: type) -> list[str]:
    flags = flags_of(options, f"{group}.")
    lines = [
        f"### `--{group}.*`",
        "",
        options.__doc__,
        "",
        "| flag | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for option in dataclasses.fields(options):
        flag = flags[f"{group}.{option.name}"]
        text = get_attribute_docstring(options, option.name).docstring_below
        lines.append(f"| `--{flag.name}` | {type_of(flag)} | {default_of(flag)} | {cell(text)} |")
    return [*lines, ""]


def lerobots(flags: dict[str, Flag]) -> list[str]:
    rows = [f"| `--{flag.name}` | {type_of(flag)} | {default_of(flag)} |" for flag in flags.values()]
    return ["| flag | type | default |", "|---|---|---|", *rows, ""]


def page() -> str:
    table = flag_table.load()
    lines = [
        "# Flags",
        "",
        "    python -m ray_jobs.train --policy.type=act --help",
        "",
        "Made by `docs/make_flags.py`. What is not typed has the default; where there is none, the help of LeRobot or the text here",
        "says what happens.",
        "",
        "## Ours, of a training",
        "",
    ]
    for group in dataclasses.fields(Options):
        lines += ours(group.name, group.default_factory)
    lines += ["## Ours, of a search", "", "All of a training's, `--space=FILE[,FILE]`, and:", ""]
    lines += ours("tune", TuneOptions)
    lines += ["## Of the other jobs", ""]
    for job in JOBS:
        if job not in ("train", "tune"):
            text = ast.get_docstring(ast.parse((ROOT / "ray_jobs" / f"{job}.py").read_text()))
            lines += [f"### `python -m ray_jobs.{job}`", "", text, ""]
    lines += ["## LeRobot's, of every training", "", *lerobots(table.general)]
    lines += ["## LeRobot's, by group", ""]
    for group, kinds in table.kinds.items():
        lines += [f"### By `--{group}.type`", ""]
        for kind, flags in kinds.items():
            opened = f"<details><summary>{kind}</summary>"
            lines += [opened, "", *lerobots(flags), "</details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str]) -> int:
    if argv == ["--check"]:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
