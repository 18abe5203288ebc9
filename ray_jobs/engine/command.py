"""What can be said of a training's command line before torch, LeRobot or Ray are imported, which takes 15 s: every mistake
in its flags, paths, types and choices, and its help."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from ray_jobs.engine import flag_table
from ray_jobs.engine.errors import InputError
from ray_jobs.engine.flag_table import Flag, flags_of
from ray_jobs.engine.flags import check_flags, check_sources
from ray_jobs.engine.options import Options, all_mistakes, asks_to_resume, help_text, parse_options
from ray_jobs.engine.output_dir import RUN, check_output_dir

SCHEME = "://"  # of a bucket's address


def check_command(
    flags: Mapping[str, str],
    more: Mapping[str, Flag] | None = None,
    *,
    resumable: tuple[str, ...] = RUN,
    needs_policy: bool = True,
) -> None:
    """Look over the flags of a training, or of a search's trainings.

    Args:
        more: Flags of the job beside those of a training.
        resumable: Patterns of the files by which the job knows what it could continue.
        needs_policy: Whether flags must say which policy it is; a search's spaces do.

    Raises:
        InputError: All mistakes that show without importing anything.
    """
    resume = asks_to_resume(flags)
    with all_mistakes() as mistakes:

        def collect(check: Callable[[], object]) -> bool:
            try:
                check()
            except InputError as error:
                mistakes.append(str(error))
                return False
            return True

        if collect(lambda: check_flags(flags, more)):
            known = flags_of(Options, "")
            collect(lambda: parse_options({name: flags[name] for name in flags if name in known}))
        if not resume:
            collect(lambda: check_sources(flags, needs_policy=needs_policy))
            output_dir = flags.get("output_dir")
            if output_dir and SCHEME not in output_dir:
                collect(lambda: check_output_dir(Path(output_dir), resumable))
        root = flags.get("dataset.root")
        if root and root != "null" and SCHEME not in root:
            collect(lambda: _data_set(root))


def _data_set(root: str) -> None:
    if not Path(root).is_dir():
        raise InputError(f"--dataset.root={root}: there is no such folder.")
    if not (Path(root) / "meta" / "info.json").is_file():
        raise InputError(f"--dataset.root={root}: not a LeRobot data set, it has no meta/info.json.")


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
