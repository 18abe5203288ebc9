"""Declared search spaces: parameters, what follows from them, and configurations.

`space_file` reads one from YAML. Optuna, whose import takes 0.4 s, is not needed to check one.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.config.errors import InputError
from ray_jobs.policies.facts import facts_of
from ray_jobs.search.spaces import constraints

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial

POLICY_TYPE, PRETRAINED = "policy.type", "policy.path"  # a pretrained policy brings its type along
Config = dict[str, Any]  # flag -> value


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole numbers alone where all of it is `int`."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if isinstance(self.low, int) and value != int(value):
            return False
        # Nor must it lie on the grid: a value off it can be enqueued, and will be tried as it is.
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Parameter:
    """One entry below `search`: drawn from a range or from choices, or derived from another flag."""

    flag: str
    line: int
    drawn: Range | tuple | None = None
    source: str | None = None
    """The flag it is derived from."""
    factor: float | None = None
    """What the source is multiplied by; None takes it as it is."""
    whole: bool | None = None
    """Whether a multiple is rounded. None: as its source is."""
    when: dict[str, list] = field(default_factory=dict)
    """Values that other flags must have for the parameter to exist."""

    @property
    def sources(self) -> list[str]:
        """The flags that it depends on."""
        return [*([self.source] if self.source else []), *self.when]

    @property
    def ends(self) -> list:
        """The ends of its range, or all of its choices."""
        if isinstance(self.drawn, Range):
            return [self.drawn.low, self.drawn.high]
        assert self.drawn is not None
        return list(self.drawn)

    def allows(self, value: Any) -> bool:
        """Whether it can be drawn."""
        if isinstance(self.drawn, Range):
            return value in self.drawn
        assert self.drawn is not None
        return encoded(value) in [encoded(choice) for choice in self.drawn]

    @property
    def distribution(self) -> "BaseDistribution | None":
        """As Optuna knows it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.drawn is None:
            return None
        if not isinstance(self.drawn, Range):
            return CategoricalDistribution([encoded(choice) for choice in self.drawn])
        low, high, log, step = (getattr(self.drawn, name) for name in ("low", "high", "log", "step"))
        if isinstance(low, int):
            return IntDistribution(low, high, log=log, step=step or 1)
        return FloatDistribution(low, high, log=log, step=step)

    def suggest(self, trial: "BaseTrial", name: str) -> Any:
        """Draw a value through an Optuna trial."""
        if not isinstance(self.drawn, Range):
            assert self.drawn is not None
            # Found by its place: a list goes in as JSON, but not all that looks like JSON is a list.
            choices = [encoded(choice) for choice in self.drawn]
            return self.drawn[choices.index(trial.suggest_categorical(name, choices))]
        d = self.drawn
        suggest: Any = trial.suggest_int if isinstance(d.low, int) else trial.suggest_float
        return suggest(name, d.low, d.high, log=d.log, **({"step": d.step} if d.step else {}))

    def derived(self, value: Any) -> Any:
        """Its value where its source has this one.

        Raises:
            TypeError: That can't be multiplied.
        """
        if self.factor is None:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(value)
        whole = isinstance(value, int) if self.whole is None else self.whole
        return round(value * self.factor) if whole else value * self.factor


@dataclass(frozen=True)
class Space:
    """The search space of one policy."""

    file: Path
    policy: str
    baseline: Config
    parameters: tuple[Parameter, ...]
    constraints: tuple[tuple[int, str], ...]  # (line, expression)
    lines: dict[str, int]  # flag -> line, for messages
    notices: tuple[str, ...] = ()

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
            if parameter.drawn is not None:
                values[parameter.flag] = choose(parameter)
            elif parameter.source in values:
                value = values[parameter.source]
                try:
                    values[parameter.flag] = parameter.derived(value)
                except TypeError:
                    told = f"{parameter.flag}: {parameter.source}={value} cannot be scaled."
                    raise self.error(parameter.flag, told) from None
        return values

    def kind(self, fixed: Config) -> Config:
        """The flag that says which policy this is, where --policy.path does not."""
        return {} if PRETRAINED in fixed or PRETRAINED in self.baseline else {POLICY_TYPE: self.policy}

    def first(self, fixed: Config) -> Config:
        """The baseline, which is tried first."""
        return self.configure(lambda parameter: self.baseline[parameter.flag], fixed)

    def without(self, flags: set[str]) -> "Space":
        """The space in which some flags are not searched: they are what the baseline says."""
        return replace(self, parameters=tuple(p for p in self.parameters if p.flag not in flags))

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
        drawn = [p for p in self.parameters if p.drawn is not None and p.flag not in fixed]
        ends = {p.flag: p.ends for p in drawn}
        for parameter in drawn:
            for value in ends[parameter.flag]:
                changed = {**self.baseline, parameter.flag: value}
                # A condition of the parameter's own is met, or it would not be there to be tried.
                changed |= {flag: allowed[0] for flag, allowed in parameter.when.items() if flag not in fixed}
                yield parameter.flag, self.configure(_from(changed, ends), fixed)
        for end in (0, -1):
            all_there = {flag: values[end] for flag, values in ends.items()}
            yield "search", self.configure(_from(all_there, ends), fixed)

    def chunk_corners(self, fixed: Config) -> Iterator[Config]:
        """Configurations at all combinations of the ends of what the length of a policy's chunk depends on, the rest as
        in the baseline. Some may break a constraint, or be none."""
        ends = {p.flag: p.ends for p in self.parameters if p.drawn is not None}
        flags = [f"policy.{name}" for name in facts_of(self.policy).chunk_fields]
        drawn = [flag for flag in flags if flag in ends and flag not in fixed]
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

    def suggest(self, trial: "BaseTrial") -> tuple[Space, Config]:
        """Draw a configuration through an Optuna trial."""
        names = [space.policy for space in self.spaces]
        number = names.index(trial.suggest_categorical(POLICY_TYPE, names)) if len(names) > 1 else 0
        space = self.spaces[number]
        choose = lambda p: p.suggest(trial, self.parameter_name(space, p.flag))  # noqa: E731
        return space, space.configure(choose, self.fixed)

    def baselines(self) -> list[dict[str, Any]]:
        """Optuna parameters of the baselines, to be enqueued as the first trials."""
        return [
            {self.parameter_name(space, p.flag): encoded(space.baseline[p.flag]) for p in space.parameters
             if p.drawn is not None and p.flag in space.baseline and p.flag not in self.fixed}
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


def _from(values: Config, ends: dict[str, list]) -> Callable[[Parameter], Any]:
    return lambda p: values[p.flag] if p.flag in values else ends.get(p.flag, p.ends)[0]


def words(parameter: Parameter) -> str:
    drawn = parameter.drawn
    if isinstance(drawn, Range):
        step = f" step {drawn.step:g}" if drawn.step not in (None, 1) else ""
        text = f"{drawn.low:g} to {drawn.high:g}{' log' if drawn.log else ''}{step}"
    elif drawn is not None:
        text = " | ".join(flag_text(choice) for choice in drawn)
    else:
        text = "" if parameter.factor is None else f"{parameter.factor:g} x "
        text += f"{parameter.source}"
    for flag, allowed in parameter.when.items():
        text += f", when {flag} is {' or '.join(flag_text(value) for value in allowed)}"
    return text


def error_at(file: Path, line: int, text: str) -> InputError:
    return InputError(f"{file}:{line}: {text}")
