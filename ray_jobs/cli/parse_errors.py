"""What parsers and the Hub mean by their errors, in terms of the flags that were typed."""

import contextlib
import functools
import io
import re
from collections.abc import Callable

from draccus.utils import DecodingError, DraccusException, ParsingError
from draccus.wrappers import docstring

from ray_jobs.config.errors import InputError, causes
from ray_jobs.storage.hub import HUB_ERRORS, hub_answer

# draccus 0.11 reads a config class's source again for the help text of each of its flags, in every parse: two thirds of
# its time, in a search's every trial. There is no option that leaves it out.
docstring.get_attribute_docstring = functools.cache(docstring.get_attribute_docstring)  # type: ignore[assignment]  # a cached function is one


def parse[T](parser: Callable[[], T], flags: dict[str, str], from_hub: str | None = None) -> T:
    """Call a draccus parser; what it raises becomes one or two readable lines.

    Args:
        flags: What the user typed, to be named in the message.
        from_hub: The flag whose value is looked for on the Hub, if there is one.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            return parser()
    except InputError:
        raise
    except SystemExit as stop:  # argparse, or LeRobot's wrapper around a DecodingError
        if stop.__context__ is None:
            message = printed.getvalue().strip().splitlines()[-1].partition("error: ")[2]
            # The overrides of a --policy.path are parsed without their prefix.
            unknown = "the policy of --policy.path knows no --policy."
            raise InputError(message.replace("unrecognized arguments: --", unknown)) from None
        raise InputError(_explain(stop.__context__, flags)) from None
    except Exception as error:
        if from_hub and any(isinstance(link, HUB_ERRORS) for link in causes(error)):
            raise InputError(f"{from_hub}: there is no such folder here, and {hub_answer(error)}") from None
        raise InputError(_explain(error, flags)) from None


# What a value must be, by what draccus says about one that it cannot decode (its own text taken out).
EXPECTED = {
    r"Expected \d+ items": "a list with as many entries as its default has",
    r"\bdict\b|attribute": """a mapping, as in '{"a": "b"}'""",
    r"\blist\b|\btuple\b": "a list, as in '[1,2]'",
    r"\bint\b": "a whole number",
    r"\bfloat\b": "a number",
    r"\bbool\b": "true or false",
}

# LeRobot's messages that leave one guessing, and what is said instead.
CLEARER = {
    r"'repo_id' argument missing.*": "policies are pushed to the Hub unless told otherwise: "
    "add --policy.push_to_hub=false, or --policy.repo_id=user/name.",
    r".*Got (\d+) for `n_action_steps` and (\d+) for `chunk_size`.*": r"--policy.n_action_steps=\1 must not exceed "
    r"--policy.chunk_size=\2: only what is predicted can be executed.",
    r".*Got self.horizon=(\d+) and self.down_dims=(.*)": r"--policy.horizon=\1 must be a multiple of "
    r"2 ** (number of --policy.down_dims), and these are \2.",
    r"`rename_map` requires.*": "--rename_map needs --policy.path: a new policy takes its names from the data set.",
    r"Optimizer and Scheduler must be set.*": "--use_policy_training_preset=false needs --optimizer.type and "
    "--scheduler.type.",
    r"eval_split must be in .* got (.*)": r"--dataset.eval_split=\1 must be at least 0 and less than 1.",
    r"Episode indices (.*)": r"--dataset.episodes \1.",
}


def _explain(error: BaseException, flags: dict[str, str]) -> str:
    """What a parser means, on one line and in terms of the flags that were typed."""
    chain = causes(error)
    ours = next((link for link in chain if isinstance(link, InputError)), None)
    if ours:
        return str(ours)
    decoding = [link for link in chain if isinstance(link, DecodingError) and link.key_path]
    for link in decoding:
        path = ".".join(link.key_path)
        for name, value in flags.items():
            found = re.fullmatch(rf"(policy\.)?{re.escape(name.removeprefix('policy.'))}(\.\d+)?", path)
            if found:
                text = "list" if found[2] else link.message.replace(f"'{value}'", "")
                what = next((what for pattern, what in EXPECTED.items() if re.search(pattern, text)), None)
                return f"--{name}={value}: " + (f"must be {what}." if what else " ".join(text.split()))
    # A value of a config file is named here; a class that refuses its values has its reason behind it.
    named = decoding and not decoding[-1].message.startswith("Could not decode")
    if named and not any(type(link) is ParsingError for link in chain):
        message = f"--{'.'.join(decoding[-1].key_path)}: {decoding[-1].message}"
    else:
        message = str(next((e for e in chain if not isinstance(e, DraccusException | SystemExit)), error))
    message = " ".join(message.split())
    for pattern, clearer in CLEARER.items():
        message = re.sub(f"^{pattern}$", clearer, message)
    typed = {name.rpartition(".")[2]: f"--{name}" for name in flags}
    message = re.sub(r"(?<![.\w-])\w+_\w+", lambda word: typed.get(word[0], word[0]), message).replace(
        "`", ""
    )
    return message if "--" in message or not decoding else f"--{'.'.join(decoding[-1].key_path)}: {message}"
