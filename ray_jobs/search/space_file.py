"""Reads a search space: a short YAML file for one policy.

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
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from ray_jobs.engine.errors import InputError
from ray_jobs.search import constraints
from ray_jobs.search.space import (
    POLICY_TYPE,
    Parameter,
    Space,
    encoded,
    error_at,
    flag_text,
    inside,
    plain,
    words,
)

# Equal for all trials, or decided for each: what a search cannot vary.
NOT_SEARCHED = (
    "seed", "steps", "output_dir", "resume", "job_name", "eval_steps", "max_eval_samples", "dataset.root",
    "dataset.repo_id", "dataset.episodes", "dataset.eval_split", "data.source", "data.eval_episodes", "data.eval_horizon",
)  # fmt: skip
SECTIONS = ("policy", "baseline", "search", "constraints")
KINDS = {  # the keys of an entry below `search`, by the first one that makes its kind
    "low": {"low", "high", "log", "step", "when"},
    "choices": {"choices", "when"},
    "same_as": {"same_as", "when"},
    "scale": {"scale", "of", "when"},
}


def read_space(file: Path) -> Space:
    """Read a space file.

    Raises:
        InputError: It cannot be read, or something in it makes no sense by itself. What LeRobot thinks of its
            flags is not looked at.
    """
    content, lines = _load(file)

    def fail(key: str, text: str):
        raise error_at(file, lines.get(key, 1), text)

    for section in content:
        if section not in SECTIONS:
            fail(section, f"unknown section '{section}'; {_meant(section, SECTIONS)}")
    policy = content.get("policy")
    if not isinstance(policy, str):
        fail("policy", "'policy: act' (or diffusion, pi0 ...) must say whose space this is.")
    baseline, search = content.get("baseline") or {}, content.get("search") or {}
    if isinstance(baseline, dict):
        baseline = {flag: plain(value) for flag, value in baseline.items()}
    for name, section in (("baseline", baseline), ("search", search)):
        if not isinstance(section, dict):
            fail(name, f"'{name}' must be a mapping of flags, as in 'policy.chunk_size: ...'.")
    for flag in baseline.keys() & set(NOT_SEARCHED):
        fail(f"baseline.{flag}", f"{flag}: only on the command line, it must be the same for all trials.")
    for flag in (*baseline, *search):
        if str(flag).endswith("discover_packages_path"):  # a file must not say which code is run
            fail(
                f"search.{flag}" if flag in search else f"baseline.{flag}",
                f"{flag}: only on the command line.",
            )
    if not search:
        fail("search", "'search' is missing: what shall be varied?")
    parameters, known = [], {POLICY_TYPE, *baseline}
    for flag, entry in search.items():
        if flag in NOT_SEARCHED:
            fail(f"search.{flag}", f"{flag} cannot be searched: it must be the same for all trials.")
        if flag.startswith(("optimizer.", "scheduler.")) and baseline.get("use_policy_training_preset", True):
            fail(
                f"search.{flag}",
                f"{flag} would have no effect: LeRobot overwrites it with the policy's own, policy.optimizer_lr and the "
                "like. Search those, or let the baseline say 'use_policy_training_preset: false'.",
            )
        parameter = _parameter(file, flag, entry, lines)
        for other in (parameter.source, *parameter.when):
            if other is not None and other not in known:
                below = "; it must stand above this line" if other in search else ""
                fail(f"search.{flag}", f"{flag}: knows no {other}{below or '; ' + _meant(other, known)}")
        known.add(flag)
        parameters.append(parameter)
        if parameter.distribution is not None:
            if flag in baseline and not inside(parameter.distribution, baseline[flag]):
                fail(
                    f"baseline.{flag}",
                    f"the baseline's {flag} is {flag_text(baseline[flag])}, "
                    f"but 'search' allows {words(parameter)}.",
                )
    rules = []
    texts = content.get("constraints") or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        fail("constraints", "'constraints' must be a list, as in '- policy.a <= 2 * policy.b'.")
    for number, text in enumerate(texts):
        key = f"constraints.{number}"
        try:
            names = constraints.names(text)
        except (SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError, MemoryError):
            fail(
                key,
                f"constraint '{text[:80]}': must be a comparison of flags, as 'policy.a <= 2 * policy.b'.",
            )
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
    for p in parameters:
        if p.source and p.flag in baseline and published.get(p.flag, baseline[p.flag]) != baseline[p.flag]:
            fail(
                f"baseline.{p.flag}",
                f"the baseline's {p.flag} is {flag_text(baseline[p.flag])}, but 'search' makes it "
                f"{flag_text(published[p.flag])}: trial 0 would not be the published recipe.",
            )
    if broken := space.violated(published):
        raise space.error("baseline", f"the baseline breaks the constraint '{broken}'.")
    return space


def _load(file: Path) -> tuple[dict, dict[str, int]]:
    """A YAML file's content, and the line of every key, as `section.key`."""
    if file.exists() and not file.is_file():
        raise InputError(f"--space={file}: is not a file.")
    try:
        text = file.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
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
    lines = {}

    def note(prefix: str, node: yaml.Node) -> None:
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                lines[f"{prefix}{number}"] = item.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{prefix}{key.value}"
                if name in lines:
                    raise error_at(file, key.start_mark.line + 1, f"'{key.value}' stands here twice.")
                lines[name] = key.start_mark.line + 1
                if prefix == "":
                    note(f"{name}.", value)

    note("", node)
    return content, lines


def _parameter(file: Path, flag: str, entry: Any, lines: dict[str, int]) -> Parameter:
    line = lines[f"search.{flag}"]

    def fail(text: str):
        raise error_at(file, line, f"{flag}: {text}")

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
    for key in ("same_as", "of"):
        if not isinstance(entry.get(key, ""), str):
            fail(f"{key}: {entry[key]} must be the name of a flag.")
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
        values = [encoded(plain(choice)) for choice in choices]
        if len({json.dumps(value) for value in values}) < len(values):
            fail("a choice stands there twice.")
        return Parameter(flag, line, CategoricalDistribution(values), when=when)
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


def _number(value: Any, key: str, fail: Callable[[str], None]) -> int | float:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        fail(f"{key}: {value} must be a number.")
    return value


def _meant(name: str, known) -> str:
    guess = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"did you mean {guess[0]}?" if guess else f"there are {', '.join(sorted(map(str, known)))}."
