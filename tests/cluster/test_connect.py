"""Ray starts in a thread of its own while a job imports LeRobot."""

import subprocess
import sys

MEANWHILE = (  # of train, tune and evaluate
    "ray_jobs.checks.preflight",
    "ray_jobs.cli.resolve",
    "ray_jobs.reports.search",
    "ray_jobs.search.plan",
    "ray_jobs.search.spaces.chosen",
    "ray_jobs.evaluation.run",
)


def test_what_is_imported_meanwhile_is_not_ray():
    """Two threads that import its parts trip each other."""
    looks = [f"import {module}; print('{module}' if 'ray' in sys.modules else '')" for module in MEANWHILE]
    program = "\n".join(["import sys", *looks])
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not told.stdout.split()
