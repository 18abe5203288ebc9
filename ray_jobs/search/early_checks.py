"""What can be said of a search's command line, and of its spaces, before torch, LeRobot or Ray are imported."""

from collections.abc import Mapping

from ray_jobs.cli.command_line import asks_to_resume
from ray_jobs.cli.early_checks import check_command
from ray_jobs.config.errors import InputError, all_mistakes
from ray_jobs.config.flag_table import flags_of
from ray_jobs.policies.facts import why_unscored
from ray_jobs.policies.lean_imports import unneeded
from ray_jobs.search.files import SEARCH_FILE
from ray_jobs.search.options import SearchFlags, parse_search_flags
from ray_jobs.search.spaces.chosen import read_spaces
from ray_jobs.search.spaces.space import Space


def check_search(flags: Mapping[str, str]) -> tuple[str, ...]:
    """Look over the flags of a search, and the spaces that they name.

    Returns:
        Packages that its trials do without (see `lean_imports`).

    Raises:
        InputError: All mistakes that show without importing anything.
    """
    spaces: list[Space] = []
    ours = flags_of(SearchFlags, "")
    with all_mistakes() as mistakes:
        given = {"output_dir": "outputs/search", **flags}
        mistakes.of(lambda: check_command(given, ours, resumable=(SEARCH_FILE,), needs_policy=False))
        # What is unknown or has no value has been told.
        mistakes.of(lambda: parse_search_flags({k: v for k, v in flags.items() if v and k in ours}))
        if not asks_to_resume(flags):
            mistakes.of(lambda: check_steps(flags))
            mistakes.of(lambda: spaces.extend(read_spaces(dict(flags), []).spaces))
        mistakes += [f"{space.file}: {why}" for space in spaces if (why := why_unscored(space.policy))]
    named = {flag: "" for space in spaces for flag in space.lines}
    return unneeded([space.policy for space in spaces] or [""], {**named, **flags})


def check_steps(flags: Mapping[str, str]) -> None:
    """See that it is said how long a trial is; what is no number is told with the other flags.

    Raises:
        InputError: It is not, or it is too short to be validated.
    """
    steps = flags.get("steps")
    if steps is None:
        raise InputError(
            "--steps is missing: how long is a trial? With asha most trials get a part of it: a sixth, say."
        )
    if steps == "1":
        raise InputError(f"--steps={steps}: must be at least 2.")
