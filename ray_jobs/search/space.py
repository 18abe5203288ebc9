"""Declared search spaces: a short YAML file per policy, turned into Optuna's distributions.

    policy: act
    baseline:                       # the published recipe: trial 0; what is not searched holds for every trial
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

Every key below `baseline` and `search` is a flag without its dashes. Mistakes are told with file and line.
"""

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from ray_jobs.engine.errors import InputError
from ray_jobs.search import constraints

POLICY_TYPE, PRETRAINED = "policy.type", "policy.path"  # a pretrained policy brings its type along
SECTIONS = ("policy", "baseline", "search", "constraints")
KINDS = {  # the keys of an entry below `search`, by the first one that makes its kind
    "low": {"low", "high", "log", "step", "when"},
    "choices": {"choices", "when"},
    "same_as": {"same_as", "when"},
    "scale": {"scale", "of", "when"},
}
Config = dict[str, Any]  # flag -> value


@dataclass(frozen=True)
class Parameter:
    """One entry below `search`: drawn from a distribution, or derived from another flag."""

    flag: str
    line: int
    distribution: BaseDistribution | None = None
    source: str | None = None
    """The flag it is derived from."""
    factor: float | None = None
    """What the source is multiplied by; None takes it as it is. A whole number stays one."""
    when: dict[str, list] = field(default_factory=dict)
    """Values that other flags must have for the parameter to exist."""


@dataclass(frozen=True)
class Space:
    """The search space of one policy."""

    file: Path
    policy: str
    baseline: Config
    parameters: tuple[Parameter, ...]
    constraints: tuple[tuple[int, str], ...]  # (line, expression)
    lines: dict[str, int]  # flag -> line, for messages

    def configure(self, choose: Callable[[Parameter], Any], fixed: Config) -> Config:
        """A configuration: `fixed` flags (typed by the user), else what `choose` says, else the baseline's.

        Args:
            choose: Gives the value of a parameter that has a distribution; only called for those that exist
                under the values chosen before.
        """
        values = {**self.kind(fixed), **self.baseline, **fixed}
        searched = [parameter for parameter in self.parameters if parameter.flag not in fixed]
        for parameter in searched:
            values.pop(parameter.flag, None)
        for parameter in searched:
            if any(values.get(flag) not in allowed for flag, allowed in parameter.when.items()):
                continue
            if parameter.distribution is not None:
                values[parameter.flag] = choose(parameter)
            elif parameter.source in values:
                value = values[parameter.source]
                if parameter.factor is not None:
                    scaled = value * parameter.factor
                    value = round(scaled) if isinstance(value, int) else scaled
                values[parameter.flag] = value
        return values

    def kind(self, fixed: Config) -> Config:
        """The flag that says which policy this is, where --policy.path does not."""
        return {} if PRETRAINED in fixed else {POLICY_TYPE: self.policy}

    def published(self, fixed: Config) -> Config:
        """The baseline: the published recipe."""
        return self.configure(lambda parameter: self.baseline[parameter.flag], fixed)

    def violated(self, config: Config) -> str | None:
        """The constraint that a configuration breaks, if there is one."""
        return next((text for _, text in self.constraints if not constraints.holds(text, config)), None)

    def corners(self, fixed: Config) -> Iterator[tuple[str, Config]]:
        """Configurations at the ends of every range and at every choice, the rest as in the baseline; then all
        lows and all highs. Each with the flag (or the section) that is to blame if it will not do."""
        drawn = [p for p in self.parameters if p.distribution is not None and p.flag not in fixed]
        ends = {p.flag: _ends(p.distribution) for p in drawn}
        for parameter in drawn:
            for value in ends[parameter.flag]:
                changed = {**self.baseline, parameter.flag: value}
                # A condition of the parameter's own is met, or it would not be there to be tried.
                changed |= {flag: allowed[0] for flag, allowed in parameter.when.items() if flag not in fixed}
                yield parameter.flag, self.configure(_from(changed, ends), fixed)
        for end in (0, -1):
            yield "search", self.configure(lambda p, end=end: ends[p.flag][end], fixed)

    def error(self, flag: str, text: str) -> InputError:
        """An error that stands in the file at a flag or section."""
        return _error(self.file, self.lines.get(flag, 1), text)


@dataclass(frozen=True)
class SearchSpace:
    """One or several spaces: with several, the policy itself is a choice, and each has parameters of its own.

    Args:
        fixed: Flags typed by the user: they hold for every trial, also where a space would search them.
    """

    spaces: tuple[Space, ...]
    fixed: Config

    def suggest(self, trial: BaseTrial) -> tuple[Space, Config]:
        """Draw a configuration through an Optuna trial."""
        names = [space.policy for space in self.spaces]
        number = names.index(trial.suggest_categorical(POLICY_TYPE, names)) if len(names) > 1 else 0
        space = self.spaces[number]

        def choose(parameter: Parameter) -> Any:
            name, d = self.parameter_name(space, parameter.flag), parameter.distribution
            if isinstance(d, CategoricalDistribution):
                return _decoded(trial.suggest_categorical(name, d.choices))
            suggest = trial.suggest_int if isinstance(d, IntDistribution) else trial.suggest_float
            return suggest(name, d.low, d.high, log=d.log, **({} if d.log else {"step": d.step}))

        return space, space.configure(choose, self.fixed)

    def baselines(self) -> list[dict[str, Any]]:
        """Optuna parameters of the published recipes, to be enqueued as the first trials."""
        return [
            {self.parameter_name(space, p.flag): _encoded(space.baseline[p.flag]) for p in space.parameters
             if p.distribution is not None and p.flag in space.baseline and p.flag not in self.fixed}
            | ({POLICY_TYPE: space.policy} if len(self.spaces) > 1 else {})
            for space in self.spaces
        ]  # fmt: skip

    def parameter_name(self, space: Space, flag: str) -> str:
        """A flag's name in the study: policies do not share their parameters."""
        return f"{space.policy}/{flag}" if len(self.spaces) > 1 else flag

    def describe(self) -> dict[str, str]:
        """Every searched parameter with its range, in a few words."""
        return {
            self.parameter_name(space, p.flag): _words(p)
            for space in self.spaces
            for p in space.parameters
            if p.flag not in self.fixed
        }

    def fingerprint(self) -> str:
        """Equal for spaces that draw the same: a stored study must not go on in another space."""
        content = [
            [s.policy, {k: str(v) for k, v in sorted({**s.baseline, **self.fixed}.items())},
             [f"{p.flag} {p.distribution} {p.source} {p.factor} {p.when}" for p in s.parameters],
             [text for _, text in s.constraints]]
            for s in self.spaces
        ]  # fmt: skip
        return json.dumps(content)


# ---------------------------------------------------------------------- reading a file


def read_space(file: Path) -> Space:
    """Read a space file.

    Raises:
        InputError: It cannot be read, or something in it makes no sense by itself. What LeRobot thinks of its
            flags is not looked at.
    """
    content, lines = _load(file)

    def fail(key: str, text: str):
        raise _error(file, lines.get(key, 1), text)

    for section in content:
        if section not in SECTIONS:
            fail(section, f"unknown section '{section}'; {_meant(section, SECTIONS)}")
    policy = content.get("policy")
    if not isinstance(policy, str):
        fail("policy", "'policy: act' (or diffusion, pi0 ...) must say whose space this is.")
    baseline, search = content.get("baseline") or {}, content.get("search") or {}
    if isinstance(baseline, dict):
        baseline = {flag: _plain(value) for flag, value in baseline.items()}
    for name, section in (("baseline", baseline), ("search", search)):
        if not isinstance(section, dict):
            fail(name, f"'{name}' must be a mapping of flags, as in 'policy.chunk_size: ...'.")
    if not search:
        fail("search", "'search' is missing: what shall be varied?")
    parameters, known = [], {POLICY_TYPE, *baseline}
    for flag, entry in search.items():
        parameter = _parameter(file, flag, entry, lines)
        for other in (parameter.source, *parameter.when):
            if other is not None and other not in known:
                below = "; it must stand above this line" if other in search else ""
                fail(f"search.{flag}", f"{flag}: knows no {other}{below or '; ' + _meant(other, known)}")
        known.add(flag)
        parameters.append(parameter)
        if parameter.distribution is not None:
            if flag in baseline and not _inside(parameter.distribution, baseline[flag]):
                fail(
                    f"baseline.{flag}",
                    f"the baseline's {flag} is {_flag_text(baseline[flag])}, "
                    f"but 'search' allows {_words(parameter)}.",
                )
    rules = []
    for number, text in enumerate(content.get("constraints") or ()):
        key = f"constraints.{number}"
        try:
            names = constraints.names(text)
        except (SyntaxError, TypeError, ValueError, ArithmeticError):
            fail(key, f"constraint '{text}': must be a comparison of flags, as 'policy.a <= 2 * policy.b'.")
        for name in names:
            if name not in known:
                fail(key, f"constraint '{text}': knows no {name}; {_meant(name, known)}")
        rules.append((lines[key], text))
    flags = {f.partition(".")[2]: n for f, n in lines.items() if f.startswith("baseline.")}
    flags |= {f.partition(".")[2]: n for f, n in lines.items() if f.startswith("search.")}
    lines = {**lines, **flags}
    space = Space(file, policy, baseline, tuple(parameters), tuple(rules), lines)
    try:
        published = space.published({})
    except KeyError as missing:
        (flag,) = missing.args
        fail(f"search.{flag}", f"{flag}: 'baseline' has no value for it; trial 0 needs one.")
    if broken := space.violated(published):
        raise space.error("baseline", f"the baseline breaks the constraint '{broken}'.")
    return space


def _load(file: Path) -> tuple[dict, dict[str, int]]:
    """A YAML file's content, and the line of every key, as `section.key`."""
    try:
        text = file.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"--space={file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InputError(f"--space={file}: is not a text file.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "cannot be read"
        raise _error(file, mark.line + 1 if mark else 1, f"not YAML: {problem}.") from None
    if not isinstance(content, dict):
        raise _error(file, 1, "must be a mapping with 'policy', 'baseline' and 'search'.")
    lines = {}

    def note(prefix: str, node: yaml.Node) -> None:
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                lines[f"{prefix}{number}"] = item.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{prefix}{key.value}"
                if name in lines:
                    raise _error(file, key.start_mark.line + 1, f"'{key.value}' stands here twice.")
                lines[name] = key.start_mark.line + 1
                if prefix == "":
                    note(f"{name}.", value)

    note("", node)
    return content, lines


def _parameter(file: Path, flag: str, entry: Any, lines: dict[str, int]) -> Parameter:
    line = lines[f"search.{flag}"]

    def fail(text: str):
        raise _error(file, line, f"{flag}: {text}")

    if not isinstance(entry, dict):
        fail("must be a range {low: 1, high: 9}, {choices: [...]}, {same_as: ...} or {scale: 0.1, of: ...}.")
    kind = next((kind for kind in KINDS if kind in entry), None)
    if kind is None:
        fail(f"needs 'low' and 'high', 'choices', 'same_as', or 'scale' and 'of'; it has {', '.join(entry)}.")
    for key in entry:
        if key not in KINDS[kind]:
            fail(f"unknown key '{key}'; {_meant(key, KINDS[kind])}")
    when = entry.get("when") or {}
    if not isinstance(when, dict):
        fail("'when' must be a mapping, as in {policy.use_vae: true}.")
    when = {other: allowed if isinstance(allowed, list) else [allowed] for other, allowed in when.items()}
    if kind == "same_as":
        return Parameter(flag, line, source=entry["same_as"], when=when)
    if kind == "scale":
        if "of" not in entry:
            fail("'of' is missing: scaled from which flag?")
        return Parameter(
            flag, line, source=entry["of"], factor=_number(entry["scale"], "scale", fail), when=when
        )
    if kind == "choices":
        choices = entry["choices"]
        if not isinstance(choices, list) or len(choices) < 2:
            fail("'choices' must be a list of at least two values.")
        encoded = [_encoded(_plain(choice)) for choice in choices]
        if len({json.dumps(choice) for choice in encoded}) < len(encoded):
            fail("a choice stands there twice.")
        return Parameter(flag, line, CategoricalDistribution(encoded), when=when)
    if "high" not in entry:
        fail("'high' is missing.")
    low, high = (_number(entry[key], key, fail) for key in ("low", "high"))
    log, step = entry.get("log", False), entry.get("step")
    if not isinstance(log, bool):
        fail(f"log: {log} must be true or false.")
    if low >= high:
        fail(f"low {low} must be less than high {high}.")
    if log and low <= 0:
        fail(f"a logarithmic range must begin above 0, not at {low}.")
    if log and step is not None:
        fail("'log' and 'step' exclude each other.")
    step = None if step is None else _number(step, "step", fail)
    if step is not None and (step <= 0 or step > high - low):
        fail(f"step {step} must be above 0 and at most {high - low}.")
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int | None):
        distribution = IntDistribution(low, high - (high - low) % (step or 1), log=log, step=step or 1)
    else:
        distribution = FloatDistribution(float(low), float(high), log=log, step=step and float(step))
    return Parameter(flag, line, distribution, when=when)


def _plain(value: Any) -> Any:
    """YAML 1.1 reads 1e-5, without a point, as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _number(value: Any, key: str, fail: Callable[[str], None]) -> int | float:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(f"{key}: {value} must be a number.")
    return value


# ---------------------------------------------------------------------- small things


def flags(config: Config) -> list[str]:
    """A configuration as command-line arguments."""
    return [f"--{flag}={_flag_text(value)}" for flag, value in config.items()]


def _flag_text(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def _encoded(value: Any) -> Any:
    """Lists are no values for Optuna: they go in as JSON, which is what the flag takes anyway."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value[:1] in "[{" else value


def _from(values: Config, ends: dict[str, list]) -> Callable[[Parameter], Any]:
    return lambda p: values[p.flag] if p.flag in values else ends.get(p.flag, _ends(p.distribution))[0]


def _ends(distribution: BaseDistribution) -> list:
    if isinstance(distribution, CategoricalDistribution):
        return [_decoded(choice) for choice in distribution.choices]
    return [distribution.low, distribution.high]


def _inside(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return _encoded(value) in distribution.choices
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(distribution, IntDistribution) and value != int(value):
        return False
    # Not Optuna's `_contains`: a value off the grid can be enqueued, and will be tried as it is.
    return distribution.low <= value <= distribution.high


def _words(parameter: Parameter) -> str:
    d = parameter.distribution
    if isinstance(d, CategoricalDistribution):
        text = " | ".join(_flag_text(choice) for choice in d.choices)
    elif d is not None:
        step = f" step {d.step:g}" if d.step not in (None, 1) else ""
        text = f"{d.low:g} to {d.high:g}{' log' if d.log else ''}{step}"
    else:
        text = parameter.source if parameter.factor is None else f"{parameter.factor:g} x {parameter.source}"
    for flag, allowed in parameter.when.items():
        text += f", when {flag} is {' or '.join(_flag_text(value) for value in allowed)}"
    return text


def _meant(name: str, known) -> str:
    guess = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"did you mean {guess[0]}?" if guess else f"there are {', '.join(sorted(map(str, known)))}."


def _error(file: Path, line: int, text: str) -> InputError:
    return InputError(f"{file}:{line}: {text}")
