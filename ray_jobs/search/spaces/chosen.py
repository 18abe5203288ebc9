"""The spaces that a command names, and what was typed beside them; looked over before LeRobot is imported."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ray_jobs.cli.command_line import listed
from ray_jobs.config.errors import InputError
from ray_jobs.search.options import is_ours
from ray_jobs.search.spaces.new_space import SHIPPED
from ray_jobs.search.spaces.space import POLICY_TYPE, PRETRAINED, SearchSpace, Space
from ray_jobs.search.spaces.space_file import NOT_TYPED, PUSH, read_space
from ray_jobs.search.spaces.values import known_flags, typed

FOLDERS = {"dataset.root", "policy.path", "policy.pretrained_path", "data.cache"}


def theirs(words: dict[str, str]) -> dict[str, str]:
    """The flags among those that were typed that all trials have."""
    found = {f: v for f, v in words.items() if not is_ours(f) and f not in ("output_dir", POLICY_TYPE)}
    return _absolute(found)


def _absolute(config: dict) -> dict:
    """Slots work in folders of their own."""
    folders = {f: config[f] for f in FOLDERS & config.keys() if config[f]}
    return config | {f: str(Path(str(v)).absolute()) for f, v in folders.items() if Path(str(v)).exists()}


def read_spaces(words: dict[str, str], notices: list[str]) -> SearchSpace:
    """Read the spaces that a command names.

    Args:
        words: The command line by flag name.
        notices: Takes what the user should hear.

    Raises:
        InputError: In the flags that decide about the search, or in space files: then all that is wrong with these.
    """
    for flag, why in NOT_TYPED.items():
        if flag in words:
            raise InputError(f"--{flag}={words[flag]}: {why}.")
    files = [Path(name) for name in listed(words.get("space", ""))]
    if not files:
        raise InputError("--space is missing: which space to search, as in --space=search_spaces/act.yaml.")
    if words.get("data.source") == "stream":
        raise InputError(
            "--data.source=stream: a search would read all of it again for every trial. Give it a local copy, "
            "perhaps of some episodes (--dataset.episodes)."
        )
    push = words.get(PUSH, "false").lower()
    if push not in ("true", "false"):
        raise InputError(f"--{PUSH}={words[PUSH]}: must be true or false.")
    if push == "true" and "policy.repo_id" not in words:
        raise InputError("--policy.push_to_hub=true: where to? --policy.repo_id=USER/NAME is missing.")
    spaces = _read(files, words)
    names = [space.policy for space in spaces]
    if len(set(names)) < len(names):
        raise InputError(
            f"--space={words['space']}: two of them are for the policy {max(names, key=names.count)}."
        )
    if POLICY_TYPE in words and {words[POLICY_TYPE]} != set(names):
        raise InputError(
            f"--policy.type={words[POLICY_TYPE]}: the space is for {', '.join(names)}; leave it out."
        )
    spaces = [replace(space, baseline=_absolute(space.baseline)) for space in spaces]
    notices += [notice for space in spaces for notice in space.notices]
    mentioned = {flag for space in spaces for flag in space.lines} | {PRETRAINED}
    flags = {name: flag for policy in reversed(names) for name, flag in known_flags(policy).items()}
    fixed = {flag: _value(flags.get(flag), word) for flag, word in theirs(words).items() if flag in mentioned}
    for flag in sorted({p.flag for s in spaces for p in s.parameters if p.drawn is not None} & fixed.keys()):
        notices.append(f"--{flag}={words[flag]} was typed: it is not searched.")
    for space in spaces:
        if broken := space.violated(space.first(fixed)):
            raise InputError(
                f"with the flags that were typed, {space.file}'s baseline breaks the constraint '{broken}'."
            )
    return SearchSpace(tuple(spaces), fixed)


def _read(files: list[Path], words: dict[str, str]) -> list[Space]:
    """Raises InputError with the mistakes of all files."""
    spaces, wrong = [], []
    for file in files:
        try:
            if not file.exists():
                here = SHIPPED.parent == Path.cwd()
                known = sorted(
                    f"{SHIPPED.name if here else SHIPPED}/{p.name}" for p in SHIPPED.glob("*.yaml")
                )
                hint = f" There are {', '.join(known)}." if known else ""
                raise InputError(f"--space={file}: there is no such file.{hint}")
            spaces.append(read_space(file, words))
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("\n".join(wrong))
    return spaces


def _value(flag: Any, word: str) -> Any:
    """A typed word as its flag's own type. One that can't be is left to who reads all flags."""
    with contextlib.suppress(ValueError, yaml.YAMLError):
        return flag.read(word) if flag and flag.is_text else typed(flag, yaml.safe_load(word), word)
    return word
