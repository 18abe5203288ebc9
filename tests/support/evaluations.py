"""Trained policies and their evaluations."""

import json
from pathlib import Path

from ray_jobs import evaluate
from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.evaluation.results import RESULTS
from ray_jobs.training import loop
from ray_jobs.training.tracking import save_options

PLUGIN = "--discover_packages_path=colour_follower"


def evaluated(target: Path, *flags: str) -> dict:
    """Run the job in this process; returns its results by name."""
    assert evaluate.main([*flags, f"--output_dir={target}"]) == 0
    return json.loads((target / RESULTS).read_text())["results"]


def trained(flags: list[str]) -> None:
    recipe = resolve(flags)
    recipe = preflight.check(recipe)
    save_options(recipe)  # as Ray's workers do
    loop.train(recipe, device="cpu")


IN_PARTS = ("--env.type=part_sorting", "--env.image_size=64", "--env.episode_length=45")
