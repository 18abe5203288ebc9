"""What the words of a space file mean: which flags there are, and values and ranges of their types."""

import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

from ray_jobs.cli.flags import nearest
from ray_jobs.config import flag_table
from ray_jobs.config.flag_table import Flag
from ray_jobs.config.options import Options
from ray_jobs.search.spaces.space import Range, encoded, plain

NO_NUMBERS = ("bool", "str", "path", "list", "tuple", "dict")  # types that no range can have
FEW = 10  # names that can be told


def known_flags(policy: str) -> dict[str, Flag]:
    """All flags of a training, ours and LeRobot's. Of a policy out of a plugin those that every policy has not are missing."""
    table = flag_table.load() or flag_table.of_lerobot()
    flags = {**table.flags(policy), **flag_table.flags_of(Options, "")}
    if policy not in table.policies:
        flags = {name: flag for name, flag in flags.items() if not name.startswith("policy.")}
    return flags


def typed(flag: Flag | None, value: Any, text: Any) -> Any:
    """A value that YAML has read, as its flag's own type; numbers stay as they are spelled where that is the same.

    Args:
        flag: None if nothing is known about it: then the spelling decides.
        text: The value as it is spelled, if it is a single word.

    Raises:
        ValueError: It is no such value.
    """
    if flag is None or (value is None and flag.optional):
        return plain(value)
    if flag.is_text:
        return flag.convert(text if isinstance(text, str) else value)
    value = plain(value)
    if flag.type == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    converted = flag.convert(value)
    # A search that was begun with `10` for a number must know its space again.
    return value if flag.type == "float" and converted == value else converted


def default(flag: Flag) -> Any:
    """LeRobot's default. It has a `False` among its whole numbers."""
    return int(flag.default) if flag.type == "int" and flag.default is not None else flag.default


def meant(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name."""
    if guess := nearest(str(name), map(str, known)):
        return f"did you mean {guess}?"
    known = sorted(map(str, known))
    return f"there are {', '.join(known)}." if len(known) < FEW else "--help lists them."


def read_range(flag: Flag | None, entry: dict, wrong: Callable[[str], None]) -> Range | None:
    """An entry with 'low' and 'high'; what is wrong with it is told to `wrong`."""
    if flag is not None and takes_no_number(flag):
        wrong(f"no range, for it takes {flag.expected}; {{choices: [...]}} searches it.")
        return None
    if "high" not in entry:
        wrong("'high' is missing.")
        return None
    log = entry.get("log", False)
    given = [key for key in ("low", "high", "step") if entry.get(key) is not None]
    numbers = {key: read_number(entry[key], key, wrong, flag) for key in given}
    if not isinstance(log, bool):
        wrong(f"log: {log} must be true or false.")
    low, high, step = (numbers.get(key) for key in ("low", "high", "step"))
    if low is None or high is None:
        return None
    if low >= high:
        wrong(f"low {low} must be less than high {high}.")
    if log and low <= 0:
        wrong(f"a logarithmic range must begin above 0, not at {low}.")
    if log and step is not None:
        wrong("'log' and 'step' exclude each other.")
    if step is not None and low < high and (step <= 0 or step > high - low):
        wrong(f"step {step} must be above 0 and at most {high - low}.")
        return None
    by_spelling = all(isinstance(found, int) for found in numbers.values())
    kind = int if (flag.type == "int" if flag else by_spelling) else float
    if step is not None and step > 0:  # the last that can be reached
        begin, end, each = (Decimal(str(value)) for value in (low, high, step))
        high, step = kind(begin + (end - begin) // each * each), kind(step)
    return Range(kind(low), kind(high), bool(log), step)


def read_number(
    value: Any, key: str, wrong: Callable[[str], None], flag: Flag | None = None
) -> int | float | None:
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < math.inf:
        wrong(f"{key}: {value} must be a number.")
        return None
    if flag is not None and flag.type == "int" and found != int(found):
        wrong(f"{key}: {value} must be a whole number, as the flag is.")
        return None
    return found


def takes_no_number(flag: Flag) -> bool:
    return flag.type.partition("[")[0] in NO_NUMBERS


def as_number(value: Any) -> Any:
    """1 and 1.0 are the same."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else encoded(value)
