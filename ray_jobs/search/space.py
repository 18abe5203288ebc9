"""Declared search spaces as Optuna knows them: parameters, what follows from them, and configurations.

`space_file` reads one from YAML.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from ray_jobs.engine.errors import InputError
from ray_jobs.search import constraints

POLICY_TYPE, PRETRAINED = "policy.type", "policy.path"  # a pretrained policy brings its type along
CHUNK = ("policy.chunk_size", "policy.horizon", "policy.n_obs_steps")  # what the length of a chunk depends on
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
                    if isinstance(value, bool) or not isinstance(value, int | float):
                        raise self.error(
                            parameter.flag, f"{parameter.flag}: {parameter.source}={value} cannot be scaled."
                        )
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
        for _, text in self.constraints:
            try:
                if not constraints.holds(text, config):
                    return text
            except (TypeError, ArithmeticError) as error:
                raise self.error("constraints", f"constraint '{text}': {error}, with {config}.") from None
        return None

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

    def chunk_corners(self, fixed: Config) -> Iterator[Config]:
        """Configurations at all combinations of the ends of what the length of a policy's chunk depends on, the rest as
        in the baseline. Some may break a constraint, or be none."""
        ends = {p.flag: _ends(p.distribution) for p in self.parameters if p.distribution is not None}
        drawn = [flag for flag in CHUNK if flag in ends and flag not in fixed]
        for values in itertools.product(*(ends[flag] for flag in drawn)):
            changed = {**self.baseline, **dict(zip(drawn, values, strict=True))}
            yield self.configure(_from(changed, ends), fixed)

    def error(self, flag: str, text: str) -> InputError:
        """An error that stands in the file at a flag or section."""
        return error_at(self.file, self.lines.get(flag, 1), text)


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
            {self.parameter_name(space, p.flag): encoded(space.baseline[p.flag]) for p in space.parameters
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
            self.parameter_name(space, p.flag): words(p)
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


# ---------------------------------------------------------------------- values


def flags(config: Config) -> list[str]:
    """A configuration as command-line arguments."""
    return [f"--{flag}={flag_text(value)}" for flag, value in config.items()]


def flag_text(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def plain(value: Any) -> Any:
    """YAML 1.1 reads 1e-5, without a point, as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def encoded(value: Any) -> Any:
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


def inside(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return encoded(value) in distribution.choices
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(distribution, IntDistribution) and value != int(value):
        return False
    # Not Optuna's `_contains`: a value off the grid can be enqueued, and will be tried as it is.
    return distribution.low <= value <= distribution.high


def words(parameter: Parameter) -> str:
    d = parameter.distribution
    if isinstance(d, CategoricalDistribution):
        text = " | ".join(flag_text(choice) for choice in d.choices)
    elif d is not None:
        step = f" step {d.step:g}" if d.step not in (None, 1) else ""
        text = f"{d.low:g} to {d.high:g}{' log' if d.log else ''}{step}"
    else:
        text = parameter.source if parameter.factor is None else f"{parameter.factor:g} x {parameter.source}"
    for flag, allowed in parameter.when.items():
        text += f", when {flag} is {' or '.join(flag_text(value) for value in allowed)}"
    return text


def error_at(file: Path, line: int, text: str) -> InputError:
    return InputError(f"{file}:{line}: {text}")
