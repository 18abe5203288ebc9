"""Search hyper-parameters of a LeRobot policy unattended: Ray Tune runs the trials, Optuna steers them.

    python -m ray_jobs.tune --space=search_spaces/act.yaml --dataset.repo_id=me/set --dataset.root=datasets/set --steps=2000

Every flag of `ray_jobs.train` holds for all trials; the space says what varies. `--dry-run` prints the plan,
`--help` the tuner's own flags.
"""

import os
from pathlib import Path

from ray_jobs.cli.command_line import asks_to_resume, help_for, read_flags
from ray_jobs.cli.terminal import doing, no_garbage_collection, quiet
from ray_jobs.cluster import connect
from ray_jobs.cluster.job import run_job
from ray_jobs.cluster.run_folder import refuse_busy
from ray_jobs.interface import callable_as_job
from ray_jobs.policies.lean_imports import without
from ray_jobs.search.early_checks import check_search
from ray_jobs.search.files import read_begun
from ray_jobs.search.options import TuneOptions, in_full
from ray_jobs.search.spaces import new_space
from ray_jobs.storage.records import SUMMARY_FILE

# For Ray Tune, which reads them while it is imported, or when a search begins.
TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run has files of its own
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def main(argv: list[str]) -> int:
    """Check the space, search, write the answer, and say it. Returns the exit status."""
    quiet()
    os.environ.update(TUNE_ENV)
    if {"--help", "-h"} & set(argv):
        return _help()
    if (wanted := new_space.asked(argv)) is not None:
        print(new_space.write(*wanted))
        return 0
    flags, _ = read_flags(in_full(argv))
    place = flags.get("output_dir", "outputs/search")
    refuse_busy({**flags, "output_dir": place})
    not_needed = check_search(flags)
    on_ray = not asks_to_resume(flags)
    if on_ray:
        connect.start(flags.get("ray.address"))
    elif "://" not in place:
        read_begun(Path(place))
    doing(f"importing LeRobot{' while Ray starts' if on_ray else ''}")
    with no_garbage_collection(), without(not_needed):
        from ray_jobs.reports.search import write_search
        from ray_jobs.search.plan import make_plan, read_command
        from ray_jobs.search.spaces.chosen import read_spaces

    doing("looking over the spaces and the data set")
    typed, options, resume, notices = read_command(argv)
    plan = make_plan(typed, options, read_spaces(typed, notices), resume, notices, print)
    plan.recipe = plan.recipe.knowing(unneeded=not_needed)
    for notice in plan.notices:
        print(notice)
    connect.start(plan.recipe.options.ray.address).result()
    # Not while Ray starts: two threads that import its parts trip each other.
    from ray_jobs.search import estimate
    from ray_jobs.search.run import run
    from ray_jobs.search.slot import decide

    slot = decide(plan)
    doing("")
    if options.tune.dry_run:
        estimate.show(plan, slot, print)
        return 0
    return run(plan, slot, write_search)


# ---------------------------------------------------------------------- what the user sees


def _help() -> int:
    print(__doc__)
    print("  --space=FILE[,FILE]\n        Search spaces, one for each policy (see search_spaces/).")
    print(f"  {new_space.WORD}=POLICY [FILE]\n        Write one to begin with, and stop.")
    print("\n".join(help_for("tune", TuneOptions)))
    print("\nThe flags of one training:  python -m ray_jobs.train --help")
    return 0


callable_as_job(__name__, SUMMARY_FILE)

if __name__ == "__main__":
    run_job(main, at_end=connect.leave)
