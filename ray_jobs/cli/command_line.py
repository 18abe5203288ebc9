"""The command line as typed: words to flags, flags to our dataclasses. Imports neither torch nor LeRobot: a
job knows what it asks of Ray while those are still being imported.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draccus.wrappers.docstring import get_attribute_docstring

from ray_jobs.cli.translations import translate
from ray_jobs.config.errors import InputError, all_mistakes
from ray_jobs.config.flag_table import PATHS, Flag, flags_of
from ray_jobs.config.options import Options

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Flags that name files or folders here, some of them several with commas.
OUR_PATHS = ("output_dir", "data.cache", "assets.dir", "checkpoint", "space")
FOLDERS = ("data.cache", "assets.dir")  # of them those that are in no bucket
LONGEST_NAME = 255  # bytes, of a file or a folder on Linux


def not_an_address(name: str, value: str) -> list[str]:
    """What is wrong with an address where only a folder will do: one mistake, or none. As a path it would be a folder
    called `s3:` here."""
    return [f"--{name}={_shown(value)}: must be a folder, no address."] if "://" in value else []


def _shown(address: str) -> str:
    """An address without the keys that may be in it."""
    return re.sub(r"(:/+).*@", r"\1...@", address)


def read_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Flags by name, as typed, those of older recipes translated, and notices. The last of a repeated flag counts, as
    it does for argparse (LeRobot's own look-ups would take the first).

    Raises:
        InputError: A word is no flag, or a flag's old name takes no such value.
    """
    flags: dict[str, str] = {}
    words = list(argv)
    with all_mistakes() as mistakes:
        while words:
            word = words.pop(0)
            if not word.startswith("--"):
                mistakes.append(_no_flag(word))
                continue
            name, equals, value = word[2:].partition("=")
            followed = bool(words) and not words[0].startswith("--")
            if equals and not value and followed or not equals and followed and words[0][:1] == "=":
                first = words.pop(0)
                if first == "=" and words and not words[0].startswith("--"):
                    first = words.pop(0)
                mistakes.append(f"--{name}: no spaces around the =, as in --{name}={first.lstrip('=')}")
                continue
            if not equals and followed:
                value = words.pop(0)
            flags.pop(name, None)
            if name == "ray.num_workers" and ":" in value:
                if not re.fullmatch(r"-?\d+:-?\d+", value):
                    mistakes.append(
                        f"--{name}={value}: must be a whole number, or the fewest and the most, as in 2:8."
                    )
                    continue
                flags["ray.min_workers"], _, value = value.partition(":")
            if name in (*PATHS, *OUR_PATHS):  # no shell does it behind a `=`
                value = ",".join(str(Path(p).expanduser()) if p[:1] == "~" else p for p in value.split(","))
                mistakes += _no_path(name, value)
            flags[name] = value
    return translate(flags)


def listed(text: str) -> list[str]:
    """Files and folders, with commas in between; a comma may also be part of the name of one that is there."""
    found, parts = [], text.split(",")
    while parts:
        names = {n: ",".join(parts[:n]).strip() for n in range(len(parts), 0, -1)}
        first = next((n for n, name in names.items() if name and os.path.exists(name)), 1)
        found.append(names[first])
        parts = parts[first:]
    return [name for name in found if name]


def _no_flag(word: str) -> str:
    """What to say of a word that does not begin with two hyphens."""
    bare = word.strip().lstrip("-\u2010\u2011\u2012\u2013\u2014\u2015\u2212")  # what editors make of them
    if re.match(r"[A-Za-z_.]+=", bare) or bare and bare != word and not bare[0].isdigit():
        return (
            f"'{word}' is not a flag, which begins with two hyphens like --steps=1000; did you mean --{bare}?"
        )
    if Path(word).is_dir():
        flag = "dataset.root" if (Path(word) / "meta").is_dir() else "output_dir"
        return f"'{word}' is not a flag, but a folder; did you mean --{flag}={shlex.quote(word)}?"
    return f"'{word}' is not a flag. They look like --steps=1000; a value with spaces needs quotes."


def _no_path(name: str, value: str) -> list[str]:
    """What is wrong with a path before it is looked for: one mistake, or none."""
    if (slip := re.match(r"(?i)(s3|gs|gcs|az|abfss?):/+", value)) and not re.match(r"[a-z0-9]+://", value):
        kind = slip[1].lower()
        meant = f"{kind}://{value[slip.end() :]}"
        return [f"--{name}={_shown(value)}: did you mean {_shown(meant)}?"]
    if name in FOLDERS and (mistakes := not_an_address(name, value)):
        return mistakes
    for part in value.replace(",", "/").split("/"):
        if len(os.fsencode(part)) > LONGEST_NAME:
            return [
                f"--{name}={value[:40]}...: a name of {len(os.fsencode(part))} bytes; {LONGEST_NAME} is the most."
            ]
    return []


def split_flags(flags: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Our flags and LeRobot's."""
    prefixes = tuple(f"{group.name}." for group in dataclasses.fields(Options))
    ours = {name: value for name, value in flags.items() if name.startswith(prefixes)}
    return ours, {name: value for name, value in flags.items() if name not in ours}


def parse_options(flags: dict[str, str], saved: dict | None = None) -> Options:
    """Our options among `flags`, on top of those `saved` by the run that is resumed (see `tracking.save_options`)."""
    ours, _ = split_flags(flags)
    before = {
        f"{group}.{name}": value
        for group, options in (saved or {}).items()
        for name, value in options.items()
        if not (name == "min_workers" and "ray.num_workers" in flags)  # a saved 2:8 is no part of a typed 4
    }
    return build(Options, ours, before)


def build[T: DataclassInstance](
    config: type[T], typed: dict[str, str], saved: dict | None = None, prefix: str = ""
) -> T:
    """One of our dataclasses, of values as they were typed.

    Args:
        saved: Values, by flag as well, for what was not typed.

    Raises:
        InputError: A flag is unknown, or its value is none: all mistakes, a line each.
    """
    known = flags_of(config, prefix)
    values = {}
    with all_mistakes() as mistakes:
        for name, value in (saved or {}).items():
            if name in known and name not in typed:
                try:
                    values[name] = known[name].convert(value)
                except (TypeError, ValueError):
                    mistakes.append(f"--{name}={value}: must be {known[name].expected}.")
        for name, value in typed.items():
            if name not in known:
                mistakes.append(f"unknown flag --{name}.")
                continue
            try:
                values[name] = known[name].read(value)
            except (TypeError, ValueError):
                mistakes.append(f"--{name}={value}: must be {known[name].expected}.")
    return _made(config, values, prefix)


def _made[T: DataclassInstance](config: type[T], values: dict, prefix: str) -> T:
    given: dict[str, Any] = {}
    with all_mistakes() as mistakes:
        for part in dataclasses.fields(config):
            name, kind = f"{prefix}{part.name}", part.type
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                mistakes.of(lambda: given.update({part.name: _made(kind, values, f"{name}.")}))  # noqa: B023
            elif name in values:
                given[part.name] = Path(values[name]) if kind is Path else values[name]
    return config(**given)


def asked_device(flags: dict[str, str]) -> str | None:
    """`--policy.device` as typed. The parsed one cannot tell: LeRobot rewrites it on a driver without a GPU."""
    return None if flags.get("policy.device") == "null" else flags.get("policy.device")


def is_on(flags: Mapping[str, str], name: str, default: str = "false") -> bool:
    """Whether a switch is on, for all that YAML, and so LeRobot, takes for true or false.

    Raises:
        InputError: It is neither.
    """
    value = flags.get(name, default)
    try:
        return Flag(name, "bool").read(value)
    except ValueError:
        raise InputError(f"--{name}={value}: must be true or false.") from None


def asks_to_resume(flags: Mapping[str, str]) -> bool:
    with contextlib.suppress(InputError):  # which the look over all flags tells
        return is_on(flags, "resume")
    return False


def help_text() -> str:
    """Our options with their defaults, and where LeRobot's are shown."""
    lines = ["Every flag of lerobot-train, and:", ""]
    for group in dataclasses.fields(Options):
        options: Any = group.default_factory  # the dataclass itself
        lines += [*help_for(group.name, options), ""]
    lines.append("LeRobot's flags for one policy:  python -m ray_jobs.train --policy.type=act --help")
    return "\n".join(lines)


def help_for(group: str, options: type) -> list[str]:
    """The lines of help about one group of options: a dataclass with a text below each field."""
    lines = [f"  {options.__doc__}"]
    for option in dataclasses.fields(options):
        default = "" if option.default is None else f" [{json.dumps(option.default, default=str)}]"
        text = get_attribute_docstring(options, option.name).docstring_below
        lines.append(f"    --{group}.{option.name}{default}\n        {text}")
    return lines
