"""`python -m ray_jobs` names the jobs; each is a module of its own, as in `python -m ray_jobs.train --help`."""

import ast
import sys
from pathlib import Path

JOBS = ("demo", "doctor", "train", "tune", "evaluate", "report", "list", "cache", "export")


def main() -> int:
    """Print a line for each job, from its module's docstring. Returns the exit status of a command that is none."""
    for job in JOBS:
        text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{job}.py").read_text()))
        assert text, job
        print(f"python -m ray_jobs.{job:10}{text.splitlines()[0]}")
    print("Each has --help; README.md and docs/ say more.")
    return 2


if __name__ == "__main__":
    sys.exit(main())
