"""What can be said of a training's command line before torch, LeRobot or Ray are imported, which takes 15 s: every mistake
in its flags, paths, types and choices, and its help."""

import json
from collections.abc import Mapping
from pathlib import Path

from ray_jobs.engine import flag_table
from ray_jobs.engine.dataset_files import metadata_faults, missing_files, refuse
from ray_jobs.engine.flag_table import Flag, flags_of
from ray_jobs.engine.flags import check_flags, check_sources
from ray_jobs.engine.options import Options, all_mistakes, asks_to_resume, help_text, parse_options
from ray_jobs.engine.output_dir import RUN, check_output_dir

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
        if not resume:
            mistakes.of(lambda: check_sources(flags, needs_policy=needs_policy))
            output_dir = flags.get("output_dir")
            if output_dir and SCHEME not in output_dir:
                mistakes.of(lambda: check_output_dir(Path(output_dir), resumable))
        if looks_into_data and (root := folder_of_data(flags)):
            name, data_set = f"--dataset.root={root}", flags.get("dataset.repo_id", "")
            if mistakes.of(lambda: refuse(name, metadata_faults(root, data_set))) and readable:
                mistakes.of(lambda: refuse(name, missing_files(root, episodes_read(flags), LOOKED_INTO)))


def folder_of_data(flags: Mapping[str, str]) -> Path | None:
    """The data set's folder, if flags say where it lies here."""
    root = flags.get("dataset.root")
    return Path(root) if root and root != "null" and SCHEME not in root else None


def episodes_read(flags: Mapping[str, str]) -> list[int] | None:
    """The episodes that will be read; None is all of them."""
    chosen, held_out = (
        Flag(name, "list[int]", optional=True).read(flags.get(name, "null"))
        for name in ("dataset.episodes", "data.eval_episodes")
    )
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
