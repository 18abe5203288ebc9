"""Reads a search space: a short YAML file for one policy.

    policy: act
    baseline:                       # trial 0; what is not searched holds for every trial
      policy.chunk_size: 50
    search:
      policy.optimizer_lr: {low: 1.0e-6, high: 3.0e-4, log: true}
      policy.chunk_size: {low: 10, high: 100, step: 10}
      policy.n_action_steps: {same_as: policy.chunk_size}
      policy.optimizer_lr_backbone: {scale: 0.1, of: policy.optimizer_lr}
      policy.use_vae: {choices: [true, false]}
      policy.kl_weight: {low: 1.0, high: 100.0, log: true, when: {policy.use_vae: true}}
    constraints:
      - policy.dim_model % policy.n_heads == 0

Every key below `baseline` and `search` is a flag without its dashes, and its values have that flag's type, however they are
spelled. Where the baseline is silent, LeRobot's default is the baseline. Mistakes are told all at once, with file and line,
and without importing LeRobot.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ray_jobs.cli.flags import PLUGINS
from ray_jobs.config import flag_table
from ray_jobs.config.errors import InputError
from ray_jobs.search.spaces import constraints
from ray_jobs.search.spaces.space import (
    POLICY_TYPE,
    PRETRAINED,
    Config,
    Parameter,
    Range,
    Space,
    error_at,
    flag_text,
    words,
)
from ray_jobs.search.spaces.values import (
    as_number,
    default,
    known_flags,
    meant,
    read_number,
    read_range,
    takes_no_number,
    typed,
)

# Equal for all trials: what a search cannot vary.
NOT_SEARCHED = (
    "seed", "steps", "output_dir", "resume", "eval_steps", "max_eval_samples", "dataset.root", "dataset.repo_id",
    "dataset.episodes", "dataset.eval_split", "data.source", "data.eval_episodes", "data.eval_horizon", "ray.address",
)  # fmt: skip
# Flags that are decided for each trial, and why nobody else can.
NOT_TYPED = {
    "config_path": "a search begins from a recipe's flags, not from a checkpoint's config",
    "ray.num_workers": "--tune.workers_per_trial says how many workers each trial has",
    "ray.gpus_per_worker": "--tune.gpus_per_trial says what each trial reserves",
    "job_name": "trials are named after --output_dir",
    "wandb.run_id": "every trial is a run of its own",
}
PUSH = "policy.push_to_hub"
PRESET = "use_policy_training_preset"
OVERRULED = ("optimizer.", "scheduler.")  # groups that the policy's preset overrules
MOST, MOST_LETTERS = 20, 400  # mistakes that are told, and letters of each
MOST_NODES = 10_000  # of a file whose aliases are written out
SECTIONS = ("policy", "baseline", "search", "constraints")
KINDS = {  # the keys of an entry below `search`, by the first one that makes its kind
    "low": {"low", "high", "log", "step", "when"},
    "choices": {"choices", "when"},
    "same_as": {"same_as", "when"},
    "scale": {"scale", "of", "when"},
}


def read_space(file: Path, beside: Mapping[str, str] | None = None) -> Space:
    """Read a space file.

    Args:
        beside: The flags that were typed beside it.

    Raises:
        InputError: It cannot be read, or something in it makes no sense by itself: all that is wrong, a line each. What
            LeRobot thinks of the values is not looked at.
    """
    return _Reader(file, beside or {}).space()


class _Reader:
    """One reading of a file, which gathers what is wrong."""

    def __init__(self, file: Path, beside: Mapping[str, str]):
        self.file, self.beside = file, beside
        self.wrong: list[tuple[int, str]] = []
        self.content, self.texts, self.lines = _load(file, self.wrong)

    def note(self, key: str, text: str) -> None:
        """Note a mistake at a section, or at a flag in it."""
        self.wrong.append((self.lines.get(key, 1), text))

    def space(self) -> Space:
        for section in self.content:
            if section not in SECTIONS:
                self.note(section, f"unknown section '{section}'; {meant(section, SECTIONS)}")
        policy = self.content.get("policy")
        self.flags = known_flags(str(policy))
        self.foreign = not any(flag.startswith("policy.") for flag in self.flags)  # a plugin's policy
        table = flag_table.load()
        if not isinstance(policy, str):
            self.note("policy", "'policy: act' (or diffusion, pi0 ...) must say whose space this is.")
        elif self.foreign and table and not any(flag.endswith(PLUGINS) for flag in self.beside):
            self.note("policy", f"there is no policy {policy}; {meant(policy, table.policies)}")
        baseline, search = self.section("baseline"), self.section("search")
        if search == {}:
            self.note("search", "'search' is missing: what shall be varied?")
        search = search or {}
        self.baseline = {
            flag: self.value("baseline", flag, flag, value) for flag, value in (baseline or {}).items()
        }
        self.pretrained = self.beside.get(PRETRAINED) or self.baseline.get(PRETRAINED)
        self.filled: Config = {}
        known = {POLICY_TYPE, *self.baseline, *search}
        parameters = [p for flag, entry in search.items() if (p := self.parameter(flag, entry, known))]
        rules = self.constraints(known)
        lines = dict(self.lines)
        for section in ("baseline.", "search."):
            lines |= {k.removeprefix(section): n for k, n in self.lines.items() if k.startswith(section)}
        parts = tuple(self.ordered(parameters)), tuple(rules)
        space = Space(self.file, str(policy), self.baseline, *parts, lines)
        if not self.wrong:
            self.check_baseline(space)
        if self.wrong:
            told = [f"{self.file}:{line}: {text[:MOST_LETTERS]}" for line, text in sorted(set(self.wrong))]
            more = [f"{self.file}: and {len(told) - MOST} more."] if len(told) > MOST else []
            raise InputError("\n".join([*told[:MOST], *more]))
        if not self.filled:
            return space
        values = ", ".join(f"{flag}={flag_text(value)}" for flag, value in self.filled.items())
        whose = f"--{PRETRAINED}'s own values hold" if self.pretrained else "LeRobot's defaults hold"
        notice = f"{self.file}: {whose} where 'baseline' is silent: {values}."
        return replace(space, notices=(notice,), lines={**dict.fromkeys(self.filled, 1), **lines})

    def section(self, name: str) -> dict | None:
        """A mapping of flags; None if it is something else."""
        section = self.content.get(name) or {}
        if not isinstance(section, dict):
            self.note(name, f"'{name}' must be a mapping of flags, as in 'policy.chunk_size: ...'.")
            return None
        for flag in section:
            self.check_flag(name, flag)
        return {flag: entry for flag, entry in section.items() if isinstance(flag, str)}

    def check_flag(self, section: str, flag: Any) -> None:
        """Note a flag that there is not, or that is none of a space's business."""
        key, where = f"{section}.{flag}", f"{flag}:"
        if not isinstance(flag, str):
            self.note(key, f"{where} no such flag.")
        elif flag.endswith(PLUGINS):  # a file must not say which code is run
            self.note(key, f"{where} only on the command line.")
        elif flag in NOT_TYPED:
            self.note(key, f"{where} {NOT_TYPED[flag]}.")
        elif flag == PUSH:
            self.note(key, f"the best policy alone is uploaded: type --{PUSH}=true instead.")
        elif flag in NOT_SEARCHED and section == "search":
            self.note(key, f"{flag} cannot be searched: it must be the same for all trials.")
        elif flag in NOT_SEARCHED:
            self.note(key, f"{where} only on the command line, it must be the same for all trials.")
        elif flag not in self.flags and not self.may_be(flag):
            self.note(key, f"{where} no such flag; {meant(flag, self.flags)}")
        elif section == "search" and flag.startswith(OVERRULED) and self.preset():
            self.note(
                key,
                f"{flag} would have no effect: LeRobot overwrites it with the policy's own, policy.optimizer_lr and the "
                f"like. Search those, or let the baseline say '{PRESET}: false'.",
            )

    def may_be(self, flag: str) -> bool:
        """Whether a plugin's policy may have it."""
        return self.foreign and flag.startswith("policy.")

    def preset(self) -> bool:
        """Whether the policy's own optimizer is used."""
        baseline = self.content.get("baseline")
        said = baseline.get(PRESET, True) if isinstance(baseline, dict) else True
        return str(self.beside.get(PRESET, said)).lower() != "false"

    def value(self, section: str, owner: str, flag: str, value: Any, *path: Any, role: str = "") -> Any:
        """A flag's value, of the flag's own type.

        Args:
            owner: The flag in whose entry it stands, `path` the way to it from there.
        """
        known, text = self.flags.get(flag), self.texts.get(section)
        for part in (owner, *path):
            text = (
                text.get(part) if isinstance(text, dict) else text[part] if isinstance(text, list) else None
            )
        try:
            found = typed(known, value, text)
            json.dumps(found)  # neither bytes nor a set
            return found
        except (ValueError, TypeError):
            expected = known.expected if known else "true or false, a number, a text, a list or a mapping"
            given = str(text if isinstance(text, str) else value)[:80]
            of = f"{role}{flag} " if flag != owner else role
            self.note(f"{section}.{owner}", f"{owner}: {of}{given} must be {expected}.")
        return None

    # ---------------------------------------------------------------------- what is searched

    def parameter(self, flag: str, entry: Any, known: set[str]) -> Parameter | None:
        """An entry below `search`; None if something is wrong with it."""
        key, before = f"search.{flag}", len(self.wrong)

        def wrong(text: str) -> None:
            self.note(key, f"{flag}: {text}")

        if not isinstance(entry, dict):
            wrong(
                "must be a range {low: 1, high: 9}, {choices: [...]}, {same_as: ...} or {scale: 0.1, of: ...}."
            )
            return None
        kind = next((kind for kind in KINDS if kind in entry), None)
        if kind is None:
            has = ", ".join(map(str, entry)) or "none of them"
            wrong(f"needs 'low' and 'high', 'choices', 'same_as', or 'scale' and 'of'; it has {has}.")
            return None
        for name in entry:
            if name not in KINDS[kind]:
                wrong(f"unknown key '{name}'; {meant(name, KINDS[kind])}")
        flag_type, source, factor = self.flags.get(flag), None, None
        drawn: Range | tuple | None = None
        if kind == "low":
            drawn = read_range(flag_type, entry, wrong)
        elif kind == "choices":
            drawn = self.choices(flag, entry["choices"], wrong)
        elif kind == "same_as":
            source = entry["same_as"]
        elif "of" in entry:
            source, factor = entry["of"], read_number(entry["scale"], "scale", wrong)
        else:
            wrong("'of' is missing: scaled from which flag?")
        if source is not None and not isinstance(source, str):
            wrong(f"{'of' if kind == 'scale' else kind}: {source} must be the name of a flag.")
            source = None
        if factor is not None and source in self.flags and takes_no_number(self.flags[source]):
            wrong(f"{source} cannot be scaled: it takes {self.flags[source].expected}.")
        when = self.when(flag, entry.get("when"), wrong)
        for other in (*([source] if source else []), *when):
            self.need(other, known, key, f"{flag}: ")
        if len(self.wrong) > before:
            return None
        whole = None if flag_type is None else flag_type.type == "int"
        return Parameter(flag, self.lines[key], drawn, source, factor, whole, when)

    def choices(self, flag: str, choices: Any, wrong: Callable[[str], None]) -> tuple | None:
        if not isinstance(choices, list) or len(choices) < 2:
            wrong("'choices' must be a list of at least two values.")
            return None
        values = [
            self.value("search", flag, flag, c, "choices", n, role="choice ") for n, c in enumerate(choices)
        ]
        if len({json.dumps(as_number(value)) for value in values}) < len(values):
            wrong("a choice stands there twice.")
        return tuple(values)

    def when(self, flag: str, when: Any, wrong: Callable[[str], None]) -> dict[str, list]:
        if when is not None and not isinstance(when, dict):
            wrong("'when' must be a mapping, as in {policy.use_vae: true}.")
            return {}
        found = {}
        for other, allowed in (when or {}).items():
            if isinstance(allowed, list):
                found[other] = [
                    self.value("search", flag, other, value, "when", other, n, role="when ")
                    for n, value in enumerate(allowed)
                ]
            else:
                found[other] = [self.value("search", flag, other, allowed, "when", other, role="when ")]
        return found

    def constraints(self, known: set[str]) -> list[tuple[int, str]]:
        rules, texts = [], self.content.get("constraints") or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            self.note("constraints", "'constraints' must be a list, as in '- policy.a <= 2 * policy.b'.")
            return []
        for place, text in enumerate(texts):
            key, told = f"constraints.{place}", f"constraint '{text[:80]}': "
            try:
                names = constraints.names(text)
            except (SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError, MemoryError):
                self.note(key, f"{told}must be a comparison of flags, as 'policy.a <= 2 * policy.b'.")
                continue
            for name in sorted(names):
                self.need(name, known, key, told)
            rules.append((self.lines[key], text))
        return rules

    def need(self, flag: str, known: set[str], key: str, told: str) -> None:
        """A flag that something depends on: where the space does not have it, its default is its baseline."""
        if flag in known:
            return
        if flag not in self.flags:
            names = known if self.may_be(flag) else self.flags
            self.note(key, f"{told}no such flag as {flag}; {meant(flag, names)}")
        elif (why := self.fill(flag)) is not None:
            self.note(key, f"{told}{why}")

    def fill(self, flag: str, allowed: Callable[[Any], bool] = lambda value: True) -> str | None:
        """Let a flag's default be its baseline; returns why that can't be."""
        known = self.flags.get(flag)
        if known is None:
            return "'baseline' has no value for it; trial 0 needs one."
        value, whose = default(known), "LeRobot's default"
        if self.pretrained and flag.startswith("policy."):
            value, whose = (
                _config_of(self.pretrained).get(flag.removeprefix("policy.")),
                "the pretrained policy's",
            )
        if value is None and (self.pretrained or not known.optional or not allowed(None)):
            why = "is not known here" if self.pretrained else "is none"
            return f"{whose} for {flag} {why}: 'baseline' must say where to begin."
        if not allowed(value):
            return f"{whose}, {flag_text(value)}, is outside: 'baseline' must say where to begin."
        self.baseline[flag] = self.filled[flag] = value
        return None

    def ordered(self, parameters: list[Parameter]) -> list[Parameter]:
        """Each after those that it depends on, else as they stand in the file."""
        placed, left = [], {p.flag: p for p in parameters}
        while left:
            ready = next((p for p in left.values() if not left.keys() & set(p.sources)), None)
            if ready is None:  # go round the circle
                way = [next(iter(left))]
                while way.count(way[-1]) < 2:
                    way.append(next(flag for flag in left[way[-1]].sources if flag in left))
                circle = way[way.index(way[-1]) :]
                first = min(circle, key=lambda flag: left[flag].line)
                circle = circle[circle.index(first) : -1] + circle[: circle.index(first) + 1]
                self.note(f"search.{first}", f"{first}: stands in a circle: {' needs '.join(circle)}.")
                ready = left[first]
            placed.append(left.pop(ready.flag))
        return placed

    # ---------------------------------------------------------------------- where it begins

    def check_baseline(self, space: Space) -> None:
        """Note what is wrong with trial 0, and complete it with defaults."""
        for p in space.parameters:
            if p.drawn is not None and p.flag in self.baseline and not p.allows(self.baseline[p.flag]):
                self.note(
                    f"baseline.{p.flag}",
                    f"the baseline's {p.flag} is {flag_text(self.baseline[p.flag])}, "
                    f"but 'search' allows {words(p)}.",
                )

        def choose(p: Parameter) -> Any:
            if p.flag not in self.baseline and (why := self.fill(p.flag, p.allows)) is not None:
                self.note(f"search.{p.flag}", f"{p.flag}: {why}")
            return self.baseline.get(p.flag)

        first = space.configure(choose, {})
        if self.wrong:
            return
        for p in space.parameters:
            if (
                p.source
                and p.flag in self.baseline
                and first.get(p.flag, self.baseline[p.flag]) != self.baseline[p.flag]
            ):
                self.note(
                    f"baseline.{p.flag}",
                    f"the baseline's {p.flag} is {flag_text(self.baseline[p.flag])}, but 'search' makes it "
                    f"{flag_text(first[p.flag])}: trial 0 would not be the baseline.",
                )
        if broken := space.violated(first):
            self.note("baseline", f"the baseline breaks the constraint '{broken}'.")


def _load(file: Path, wrong: list[tuple[int, str]]) -> tuple[dict, dict, dict[str, int]]:
    """A YAML file's content, the same with every word as it is spelled, and the line of every key, as `section.key`."""
    if file.exists() and not file.is_file():
        raise InputError(f"--space={file}: is not a file.")
    try:
        text = file.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _nodes(node, {}) > MOST_NODES:
            raise error_at(file, 1, "not a search space: its aliases unfold to too much.")
        content, texts = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise InputError(f"--space={file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InputError(f"--space={file}: is not a text file.") from None
    except RecursionError:
        raise error_at(file, 1, "not a search space: it is nested too deeply.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "cannot be read"
        raise error_at(file, mark.line + 1 if mark else 1, f"not YAML: {problem}.") from None
    if not isinstance(content, dict):
        raise error_at(file, 1, "must be a mapping with 'policy', 'baseline' and 'search'.")
    lines: dict[str, int] = {}

    def note(node: yaml.Node, *path: str) -> None:
        if isinstance(node, yaml.SequenceNode) and len(path) == 1:
            lines.update({f"{path[0]}.{n}": item.start_mark.line + 1 for n, item in enumerate(node.value)})
        if not isinstance(node, yaml.MappingNode) or len(path) > 2:
            return
        here = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if str(key.value) in here:
                wrong.append((line, f"'{key.value}' stands here twice."))
            here.add(str(key.value))
            if len(path) < 2:
                lines.setdefault(".".join((*path, str(key.value))), line)
            note(value, *path, str(key.value))

    assert node is not None  # it has content
    note(node)
    return content, texts, lines


def _nodes(node: yaml.Node | None, known: dict[int, float]) -> float:
    """How many nodes there are below one, each alias written out."""
    if id(node) not in known:
        known[id(node)] = math.inf  # while it is counted: it may be inside itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in parts)
    return known[id(node)]


def _config_of(pretrained: Any) -> dict:
    """What a pretrained policy here says of itself; of one on the Hub nothing is known yet."""
    file = Path(str(pretrained)) / "config.json"
    try:
        config = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError):  # LeRobot will say what is wrong with it
        return {}
    return config if isinstance(config, dict) else {}
