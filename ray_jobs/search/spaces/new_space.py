"""A space to begin with, for `--new-space`: what LeRobot does by default is its baseline, and around that it searches the
ranges of the space that comes with this project, or of none general ones. Imports nothing large.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_jobs.config import flag_table
from ray_jobs.config.errors import InputError
from ray_jobs.policies.facts import why_unscored
from ray_jobs.search.spaces.space import Config, Space
from ray_jobs.search.spaces.space_file import read_space
from ray_jobs.search.spaces.values import default, known_flags, meant

WORD = "--new-space"
SHIPPED = Path(__file__).parents[3] / "search_spaces"
START = "policy.pretrained_path"  # which weights it begins with
BATCHES = [4, 8, 16]  # 8 is LeRobot's
MOST_DROPOUT = 0.3


def asked(argv: Sequence[str]) -> tuple[str, Path | None] | None:
    """The policy and the file of `--new-space=POLICY [FILE]`; None if that is not what is asked.

    Raises:
        InputError: There is more on the command line.
    """
    words = [
        word for part in argv for word in (part.split("=", 1) if part.startswith(f"{WORD}=") else [part])
    ]
    if WORD not in words:
        return None
    place = words.index(WORD)
    rest = words[:place] + words[place + 2 :]
    policy = words[place + 1] if len(words) > place + 1 else ""
    if not policy or len(rest) > 1 or any(word.startswith("-") for word in rest):
        raise InputError(
            f"{WORD}=act FILE writes a space for the policy act into FILE, and takes nothing else."
        )
    return policy, Path(rest[0]) if rest else None


def write(policy: str, file: Path | None) -> str:
    """Write a space for a policy; returns what to print: the space itself, if there is no file.

    Raises:
        InputError: There is no such policy, or the file cannot be written.
    """
    text = space_for(policy, str(file or "FILE"))
    if file is None:
        return text.rstrip()
    try:
        with file.open("x") as new:  # nothing that is there is overwritten
            new.write(text)
    except FileExistsError:
        raise InputError(
            f"{file} is there already, and nothing in it is overwritten. Give another file."
        ) from None
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}.") from None
    typed = shlex.quote(str(file))
    return f"a space for {policy} is in {file}; --space={typed} --dry-run, with your data set and --steps, shows what it does"


def space_for(policy: str, name: str) -> str:
    """The text of a space; `name` is what its file will be called."""
    table = flag_table.load() or flag_table.of_lerobot()
    if policy not in table.policies:
        raise InputError(f"{WORD}={policy}: there is no such policy; {meant(policy, table.policies)}")
    if why := why_unscored(policy):
        raise InputError(f"{WORD}={policy}: {why} A search has nothing to go by.")
    defaults = {name: default(flag) for name, flag in known_flags(policy).items()}
    file = SHIPPED / f"{policy}.yaml"
    baseline, search = _as_shipped(file, defaults) if file.is_file() else _in_general(defaults)
    others = {
        flag: value
        for flag, value in defaults.items()
        if flag.startswith("policy.")
        and isinstance(value, bool | int | float)
        and f" {flag}:" not in "\n".join((*baseline, *search))
    }
    others.pop("policy.push_to_hub", None)
    lines = [
        f"# A search space for {policy}. Trial 0 is the baseline, with LeRobot's defaults where it is silent; the other trials vary what",
        "# stands below 'search'. Take out what you know, and set ranges to what you would try.",
        f"policy: {policy}",
        "",
        "baseline:",
        *baseline,
        "",
        *search,
        "",
        "# What else can be searched, or said in the baseline, with LeRobot's defaults:",
        *(f"#  {flag}: {_yaml(value)}" for flag, value in others.items()),
    ]
    return "\n".join(lines) + "\n"


def _as_shipped(file: Path, defaults: Config) -> tuple[list[str], list[str]]:
    """The lines below 'baseline', and those from 'search' on, with the ranges of a space that comes with this project."""
    shipped = read_space(file)
    lines = file.read_text().splitlines()
    return _baseline(shipped, defaults), lines[lines.index("search:") :]


def _baseline(shipped: Space, defaults: Config) -> list[str]:
    drawn = {p.flag: p for p in shipped.parameters if p.drawn is not None}
    derived = {p.flag for p in shipped.parameters} - drawn.keys()
    lines = []
    for flag, recipe in shipped.baseline.items():
        ours = defaults[flag]
        if flag == START:
            lines.append(
                f"  {flag}: {_yaml(recipe)}  # the weights to begin with; without it, training is from scratch"
            )
        elif flag in drawn and not drawn[flag].allows(ours):
            lines.append(
                f"  {flag}: {_yaml(recipe)}  # LeRobot's default, {_yaml(ours)}, is outside the range below"
            )
        elif flag in drawn:
            lines.append(f"  {flag}: {_yaml(ours)}")
        elif flag not in derived and recipe != ours:
            lines.append(
                f"  # {flag}: {_yaml(recipe)}  # so in {shipped.file.name}'s recipe; LeRobot's default is {_yaml(ours)}"
            )
    return lines


def _in_general(defaults: Config) -> tuple[list[str], list[str]]:
    """The same for a policy that no space comes with."""
    found: dict[str, str] = {}
    rate = defaults.get("policy.optimizer_lr")
    if rate:
        found["policy.optimizer_lr"] = _range(rate / 5, rate * 10)
    end = defaults.get("policy.scheduler_decay_lr")
    if rate and end:
        found["policy.scheduler_decay_lr"] = (
            f"{{scale: {_yaml(_short(end / rate))}, of: policy.optimizer_lr}}"
        )
    if decay := defaults.get("policy.optimizer_weight_decay"):
        found["policy.optimizer_weight_decay"] = _range(decay / 100, min(decay * 100, 1.0))
    if warmup := defaults.get("policy.scheduler_warmup_steps"):
        choices = sorted({max(1, warmup // 10), max(1, warmup // 2), warmup})
        if len(choices) > 1:
            found["policy.scheduler_warmup_steps"] = f"{{choices: {choices}}}"
    if (dropout := defaults.get("policy.dropout")) is not None and dropout <= MOST_DROPOUT:
        found["policy.dropout"] = f"{{low: 0.0, high: {MOST_DROPOUT}}}"
    found["batch_size"] = f"{{choices: {BATCHES}}}"
    baseline = [f"  {flag}: {_yaml(defaults[flag])}" for flag in found if "scale" not in found[flag]]
    search = [
        "search:",
        "  # General ranges around LeRobot's defaults (a fifth to ten times its learning rate), tried on no data set: no space for",
        "  # this policy comes with the project.",
        *(f"  {flag}: {entry}" for flag, entry in found.items()),
    ]
    return baseline, search


def _range(low: float, high: float) -> str:
    return f"{{low: {_yaml(_short(low))}, high: {_yaml(_short(high))}, log: true}}"


def _short(number: float) -> float:
    return float(f"{number:.2g}")


def _yaml(value: Any) -> str:
    """A value in one line. YAML takes 1e-05 for a text, 1.0e-05 for a number."""
    if isinstance(value, float) and "e" in (text := repr(value)) and "." not in text:
        return text.replace("e", ".0e")
    return value if isinstance(value, str) else json.dumps(value)
