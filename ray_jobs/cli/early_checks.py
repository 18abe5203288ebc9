"""What can be said of a training's command line before torch, LeRobot or Ray are imported, which takes 15 s: every mistake
in its flags, paths, types and choices, and its help."""

import json
from collections.abc import Mapping
from pathlib import Path

from ray_jobs.checks.dataset_files import (
    count_episodes,
    metadata_faults,
    missing_files,
    refuse,
    wrong_episodes,
)
from ray_jobs.checks.output_dir import RUN, check_output_dir, check_to_resume
from ray_jobs.cli.command_line import asks_to_resume, help_text, parse_options
from ray_jobs.cli.flags import check_flags, check_sources
from ray_jobs.config import flag_table
from ray_jobs.config.errors import all_mistakes
from ray_jobs.config.flag_table import Flag, flags_of
from ray_jobs.config.options import Options

EPISODES = ("dataset.episodes", "data.eval_episodes")  # the flags that list some
SCHEME = "://"  # of a bucket's address
LOOKED_INTO = 300  # files of a data set, within a second; the others once it has been said what goes on


def check_command(
    flags: Mapping[str, str],
    more: Mapping[str, Flag] | None = None,
    *,
    resumable: tuple[str, ...] = RUN,
    needs_policy: bool = True,
    looks_into_data: bool = True,
) -> None:
    """Look over the flags of a training, or of a search's trainings.

    Args:
        more: Flags of the job beside those of a training.
        resumable: Patterns of the files by which the job knows what it could continue.
        needs_policy: Whether flags must say which policy it is; a search's spaces do.
        looks_into_data: Whether faults of the data set's files are mistakes, too.

    Raises:
        InputError: All mistakes that show without importing anything.
    """
    resume = asks_to_resume(flags)
    with all_mistakes() as mistakes:
        readable = mistakes.of(lambda: check_flags(flags, more))
        if readable:
            known = flags_of(Options, "")
            mistakes.of(lambda: parse_options({name: flags[name] for name in flags if name in known}))
        output_dir = flags.get("output_dir")
        here = Path(output_dir) if output_dir and SCHEME not in output_dir else None
        if resume and here and "config_path" not in flags:
            mistakes.of(lambda: check_to_resume(here, resumable))
        if not resume:
            mistakes.of(lambda: check_sources(flags, needs_policy=needs_policy))
            if here:
                mistakes.of(lambda: check_output_dir(here, resumable))
        if looks_into_data:
            mistakes.of(lambda: check_data(flags, episodes=readable))


def check_data(flags: Mapping[str, str], *, episodes: bool = True) -> None:
    """See that a data set that lies here is whole, as far as that shows without LeRobot.

    Args:
        episodes: Whether the flags can be read that say which.

    Raises:
        InputError: It is not.
    """
    if root := folder_of_data(flags):
        name = f"--dataset.root={root}"
        refuse(name, metadata_faults(root, flags.get("dataset.repo_id", "")))
        if episodes:
            refuse(name, missing_files(root, check_episodes_of(root, flags), LOOKED_INTO))


def folder_of_data(flags: Mapping[str, str]) -> Path | None:
    """The data set's folder, if flags say where it lies here."""
    root = flags.get("dataset.root")
    return Path(root) if root and root != "null" and SCHEME not in root else None


def check_episodes_of(root: Path, flags: Mapping[str, str]) -> list[int] | None:
    """The episodes that will be read of a data set whose metadata can be; None is all of them.

    Raises:
        InputError: They are not its.
    """
    as_list, total = Flag("", "list[int]", optional=True), count_episodes(root)
    chosen, held_out = (as_list.read(flags.get(name, "null")) for name in EPISODES)
    with all_mistakes() as mistakes:
        for name, episodes in zip(EPISODES, (chosen, held_out), strict=True):
            if episodes is not None:
                mistakes += wrong_episodes(name, episodes, total)
    return None if chosen is None else [*chosen, *(held_out or ())]


def help_of_training(policy: str | None) -> str:
    """Our flags; with a policy, LeRobot's as well, in the order of its classes."""
    lines = [help_text()]
    table = flag_table.load()
    if policy is None or table is None:
        return lines[0]
    if policy not in table.policies:
        check_flags({"policy.type": policy})
    lines += [
        "",
        f"LeRobot's flags for {policy}; lerobot-train --policy.type={policy} --help describes them:",
    ]
    for flag in (*table.kinds["policy"][policy].values(), *table.general.values()):
        choices = f" of {', '.join(flag.choices)}" if flag.choices else ""
        default = (
            " (required)"
            if flag.required
            else ""
            if flag.default is None
            else f" [{json.dumps(flag.default)}]"
        )
        lines.append(f"    --{flag.name}={flag.type}{choices}{default}")
    return "\n".join(lines)
