"""Every flag of LeRobot's command line, with its type, choices and default, without importing LeRobot.

LeRobot's dataclasses say what its flags are, but importing them takes 11 s (torch, torchvision, transformers, diffusers).
`lerobot_flags.json` is what they say for the pinned version, so that a typo is told at once; a test compares the two.
Another version of LeRobot, or a policy out of a plugin package, is asked itself. After an update:

    python -m ray_jobs.config.flag_table
"""

import dataclasses
import enum
import functools
import importlib.metadata
import json
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draccus.cfgparsing import parse_string

FILE = Path(__file__).with_name("lerobot_flags.json")
REQUIRED = "required"  # stands in the file for the default of a flag that has none
KINDS = (
    "policy",
    "env",
    "optimizer",
    "scheduler",
    "reward_model",
)  # groups with a type, each with flags of its own
# Flags beside those of the dataclasses.
MORE = {
    name: "str | None" for name in ("config_path", *(f"{kind}.path" for kind in ("policy", "reward_model")))
}
# LeRobot's that name a file or folder, beside those whose type says so. They may also be names on the Hub.
PATHS = ("config_path", "dataset.root", "policy.path", "policy.pretrained_path", "reward_model.path")
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "path": "a path",
    "list": "a list, as in '[1,2]'",
    "tuple": "a list, as in '[1,2]'",
    "dict": """a mapping, as in '{"a": "b"}'""",
}


@dataclass(frozen=True)
class Flag:
    """One flag: `type` is int, float, bool, str or path, or what Python calls it, as in `list[int]`."""

    name: str
    type: str
    optional: bool = False
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] | None = None

    @property
    def is_text(self) -> bool:
        """Whether the flag takes its value as typed, letter by letter: `a #2` and `2026_11_30` are texts."""
        return self.type in ("str", "path")

    @property
    def expected(self) -> str:
        """What a value must be, for people."""
        if self.choices:
            return f"one of {', '.join(sorted(self.choices))}"
        items = re.fullmatch(r"tuple\[(.*)\]", self.type)
        if items and "..." not in items[1]:
            return f"a list of {items[1].count(',') + 1}, as in '[{items[1].replace('int', '1').replace('float', '0.5')}]'"
        return EXPECTED.get(self.type.partition("[")[0], f"a {self.type}")

    def read(self, typed: str) -> Any:
        """The value of a typed text.

        Raises:
            ValueError: It is no such value.
        """
        if typed == "null" and self.optional:
            return None
        if self.is_text:
            return self.convert(_unquoted(typed))
        try:
            value = parse_string(typed)
        except Exception:  # of the YAML library's own kinds
            raise ValueError(typed) from None
        return self.convert(value)

    def convert(self, value: Any) -> Any:
        """A value as the flag's own type: 1 is a number, and so is YAML's text 1e-4.

        Raises:
            ValueError: It can't be.
        """
        if value is None and self.optional:
            return None
        if self.choices and str(value) not in self.choices:
            raise ValueError(value)
        return _convert(self.type, value)


def _convert(type_: str, value: Any) -> Any:
    """Raises ValueError for what is no such value; of types that are not known here, all is let through."""
    first, *others = re.split(r" \| (?![^\[]*\])", type_)  # the last of several is the one to complain
    if others:
        try:
            return _convert(first, value)
        except ValueError:
            return _convert(" | ".join(others), value)
    container, _, items = type_.removesuffix("]").partition("[")
    match container:
        case "bool":
            if value in ("true", "false"):
                return value == "true"
            if isinstance(value, bool):
                return value
        case "int":
            if isinstance(value, int | str) and not isinstance(value, bool):
                return int(value)
        case "float":
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                number = float(value)
                if number == number:  # NaN passes every check of what is too small
                    return number
        case "str" | "path":
            if isinstance(value, str | int | float | bool):
                return str(value)
        case "list" | "tuple":
            if not isinstance(value, list | tuple):
                raise ValueError(value)
            kinds = [kind.strip() for kind in items.split(",")] if "[" not in items and items else []
            if "..." in kinds or container == "list":
                kinds = kinds[:1] * len(value)
            if kinds and len(kinds) != len(value):
                raise ValueError(value)
            return (
                [_convert(kind, item) for kind, item in zip(kinds, value, strict=True)]
                if kinds
                else list(value)
            )
        case "dict":
            if isinstance(value, dict):
                return value
        case _:
            return value
    raise ValueError(value)


def _unquoted(typed: str) -> str:
    """A text as typed; in quotes of its own, as LeRobot's YAML wants a text with ` #` in it, without them."""
    if len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\"":
        try:
            value: Any = parse_string(typed)  # which draccus thinks is always a mapping
        except Exception:
            return typed
        return value if isinstance(value, str) else typed
    return typed


@dataclass(frozen=True)
class FlagTable:
    """LeRobot's flags: those that all trainings have, and those of each type of policy, environment and so on."""

    general: dict[str, Flag]
    kinds: dict[str, dict[str, dict[str, Flag]]]
    """Group -> type -> flags."""

    def flags(self, policy: str | None = None) -> dict[str, Flag]:
        """The flags by name, those of one policy or, where that is not known, of all."""
        found = dict(self.general)
        for kind, of_types in self.kinds.items():
            for type_, flags in of_types.items():
                if kind != "policy" or policy in (None, type_) or policy not in of_types:
                    found |= {name: flag for name, flag in flags.items() if name not in found}
        return found

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(self.kinds["policy"])


@functools.cache
def load() -> FlagTable | None:
    """The pinned LeRobot's flags; None where another version is installed."""
    content = json.loads(FILE.read_text())
    if importlib.metadata.version("lerobot") != content["lerobot"]:
        return None
    return _table(content)


def of_lerobot() -> FlagTable:
    """The flags of the LeRobot that is installed, with the policies that plugins have registered so far. Imports it."""
    return _table(_content())


def _table(content: dict) -> FlagTable:
    kinds = {
        kind: {type_: _flags(flags) for type_, flags in of_types.items()}
        for kind, of_types in content["kinds"].items()
    }
    return FlagTable(_flags(content["flags"]), kinds)


def _flags(entries: dict[str, list]) -> dict[str, Flag]:
    return {name: _flag(name, *entry) for name, entry in entries.items()}


def _flag(name: str, type_: str, default: Any = None, choices: list[str] | None = None) -> Flag:
    required = default == REQUIRED
    return Flag(
        name,
        type_.removesuffix(" | None"),
        type_.endswith(" | None"),
        None if required else default,
        required,
        tuple(choices) if choices else None,
    )


@functools.cache  # a space has them looked up for each of its corners
def flags_of(config: type, prefix: str) -> dict[str, Flag]:
    """The flags of one of our own dataclasses."""
    entries = _entries(config, prefix, {})
    groups = {name.rpartition(".")[0] for name in entries}  # ours take no config file
    return _flags({name: entry for name, entry in entries.items() if name not in groups})


# ---------------------------------------------------------------------- from the dataclasses


def _content() -> dict:
    """What the file holds: `[type, default, choices]` by name, as far as they are not None."""
    import lerobot.policies  # noqa: F401  (registers every --policy.type)
    from lerobot.configs.train import TrainPipelineConfig

    import ray_jobs.part_sorting  # noqa: F401  (registers --env.type=part_sorting)

    kinds: dict[str, dict] = {}
    flags = _entries(TrainPipelineConfig, "", kinds) | {name: [type_] for name, type_ in MORE.items()}
    return {"lerobot": importlib.metadata.version("lerobot"), "flags": flags, "kinds": kinds}


def _entries(config: type, prefix: str, kinds: dict[str, dict]) -> dict[str, list]:
    """The flags of a dataclass and of those inside it; of classes with several types, those of each go into `kinds`."""
    hints, found = typing.get_type_hints(config), {}
    inner: Any
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        name, type_ = f"{prefix}{field.name}", hints[field.name]
        inner = next(
            (part for part in (type_, *typing.get_args(type_)) if dataclasses.is_dataclass(part)), None
        )
        if inner is None or typing.get_origin(type_) in (dict, list, tuple):
            default = (
                field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            )
            found[name] = _entry(type_, REQUIRED if default is dataclasses.MISSING else default)
            continue
        found[name] = ["path | None"]  # a config file for all of the group
        if hasattr(inner, "get_known_choices"):
            choices = inner.get_known_choices()
            found[f"{name}.type"] = ["str | None", None, sorted(choices)]
            if name in KINDS:
                kinds[name] = {type_: _entries(c, f"{name}.", kinds) for type_, c in sorted(choices.items())}
        else:
            found |= _entries(inner, f"{name}.", kinds)
    return found


def _entry(type_: Any, default: Any) -> list:
    choices = next((part for part in (type_, *typing.get_args(type_)) if _is_enum(part)), None)
    entry = [
        "str" if _is_enum(type_) else _name(type_),
        _plain(default),
        [member.value for member in choices] if choices and not typing.get_origin(type_) else None,
    ]
    while entry[-1] is None:
        entry.pop()
    return entry


def _is_enum(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, enum.Enum)


def _name(type_: Any) -> str:
    """A type as Python spells it, without modules: `list[int] | None`."""
    if isinstance(type_, types.UnionType) or typing.get_origin(type_) is typing.Union:
        parts = [part for part in typing.get_args(type_) if part is not type(None)]
        names = " | ".join(_name(part) for part in parts)
        return f"{names} | None" if len(parts) < len(typing.get_args(type_)) else names
    if type_ is Path:
        return "path"
    if arguments := typing.get_args(type_):
        origin = typing.get_origin(type_).__name__
        return f"{origin}[{', '.join('...' if a is ... else _name(a) for a in arguments)}]"
    return getattr(type_, "__name__", str(type_).rpartition(".")[2])


def _plain(value: Any) -> Any:
    """A default as JSON."""
    match value:
        case enum.Enum():
            return value.value
        case Path():
            return str(value)
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return str(value)


def write() -> None:
    """Write the file: a flag a line."""
    content = _content()

    def lines(flags: dict[str, list], indent: str) -> str:
        return ",\n".join(f"{indent}{json.dumps(name)}: {json.dumps(entry)}" for name, entry in flags.items())

    groups = []
    for kind, of_types in content["kinds"].items():
        inner = ",\n".join(
            f"  {json.dumps(type_)}: {{\n{lines(flags, '   ')}\n  }}" for type_, flags in of_types.items()
        )
        groups.append(f" {json.dumps(kind)}: {{\n{inner}\n }}")
    FILE.write_text(
        f'{{\n"lerobot": {json.dumps(content["lerobot"])},\n"flags": {{\n{lines(content["flags"], " ")}\n}},\n'
        f'"kinds": {{\n{",\n".join(groups)}\n}}\n}}\n'
    )


if __name__ == "__main__":
    import logging

    logging.disable(logging.ERROR)  # LeRobot's about FFmpeg
    write()
