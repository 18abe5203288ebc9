"""What one trial will cost: a few steps and one validation of a configuration, timed where trials will run."""

import statistics
import tempfile
import time
from pathlib import Path

STEPS = 6  # the first ones warm up
WARM_UP = 2


def time_steps(flags: list[str]) -> dict:
    """Train a few steps in a folder that is thrown away.

    Args:
        flags: The command line of a trial, without its folder.

    Returns:
        `step_s` and `eval_s`, in seconds, and the `device`.
    """
    from ray_jobs.engine.console import quiet

    quiet()
    from ray_jobs.engine import preflight
    from ray_jobs.engine.recipe import resolve
    from ray_jobs.engine.workers import train_here

    with tempfile.TemporaryDirectory() as folder:
        more = [f"--output_dir={Path(folder) / 'run'}", "--save_checkpoint=false", "--wandb.enable=false"]
        more += [f"--steps={STEPS}", f"--eval_steps={STEPS}", "--ray.num_workers=1"]
        recipe = resolve([*flags, *more])
        preflight.check(recipe)
        at: dict[tuple, float] = {}
        summary = train_here(
            recipe,
            lambda event: at.setdefault((event["kind"], event.get("step")), time.monotonic()),
            lambda: "",
        )
    steps = [at["step", n + 1] - at["step", n] for n in range(WARM_UP, STEPS)]
    return {
        "step_s": statistics.median(steps),
        "eval_s": at["eval", STEPS] - at["log", STEPS],
        "device": summary["device"],
    }
