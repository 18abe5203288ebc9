"""What a search will do and what it will cost, before it does it."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import ray

from ray_jobs.engine.console import duration, quiet
from ray_jobs.search.begin import make_sampler
from ray_jobs.search.plan import Plan
from ray_jobs.search.slot import Slot
from ray_jobs.search.space import flags

TIMED_STEPS, WARM_UP = 6, 2
FIRST = 3  # drawn configurations that are shown


def intro(plan: Plan, slot: Slot) -> str:
    """Data, objective, and how many trials of what size, in two lines."""
    recipe, tune = plan.recipe.lerobot, plan.options.tune
    held_out = plan.recipe.options.data.eval_episodes
    held_out = (
        f"episodes {held_out}"
        if held_out
        else f"{len(plan.recipe.held_out)} episode(s), the last of each task,"
    )
    each = slot.each if tune.workers_per_trial == 1 else f"{tune.workers_per_trial} workers with {slot.each}"
    return (
        f"{recipe.dataset.repo_id}: {held_out} held out; {tune.metric} over {plan.horizon} actions, every "
        f"{plan.recipe.eval_steps} steps\n"
        f"{tune.num_samples} trials of {plan.steps} steps, {tune.sampler} + {plan.scheduler}; "
        f"{at_once(plan, slot)} at a time, each {each}"
    )


def at_once(plan: Plan, slot: Slot) -> int:
    return min(slot.at_once, plan.options.tune.max_concurrent or slot.at_once)


def show(plan: Plan, slot: Slot, say: Callable[[str], None]) -> None:
    """Parameters, the first configurations, and the cost, from a few timed steps of the published recipe."""
    tune, spaces = plan.options.tune, plan.space.spaces
    say(intro(plan, slot) + "\n\nparameters")
    for name, text in plan.space.describe().items():
        say(f"  {name:38} {text}")
    study = optuna.create_study(
        sampler=make_sampler(tune, plan.recipe.lerobot.seed or 0), directions=tune.directions
    )
    for params in plan.space.baselines():
        study.enqueue_trial(params)
    say("\nfirst configurations")
    for number in range(min(tune.num_samples, len(spaces) + FIRST)):
        space, config = plan.space.suggest(study.ask())
        searched = {p.flag for p in space.parameters}
        name = f"{number} (baseline)" if number < len(spaces) else str(number)
        say(
            f"  {name}  "
            + "  ".join(w[2:] for w in flags({k: v for k, v in config.items() if k in searched}))
        )
    from ray_jobs.engine.faults import if_helper_dies

    run = ray.remote(num_cpus=slot.each.cpus, num_gpus=slot.each.gpus)(time_steps)
    with if_helper_dies("the process that timed a few steps", "No search was begun."):
        costs = [ray.get(run.remote([*plan.base, *flags(s.first(plan.space.fixed))])) for s in spaces]
    step_s, eval_s = (statistics.mean(cost[name] for cost in costs) for name in ("step_s", "eval_s"))
    trial_s = step_s * plan.steps + eval_s * plan.steps / plan.recipe.eval_steps
    share = expected_share(plan)
    repeats = (tune.seeds - 1) * (tune.finalists + len(spaces))
    trials = len(spaces) + max(0, tune.num_samples - len(spaces)) * share + repeats
    search_s = trial_s * trials / at_once(plan, slot)
    stopped = {
        "none": "",
        "asha": f" ({share:.0%} of the steps; asha stops fewer where one trial after the other is the best so far)",
    }.get(plan.scheduler, f" at most: {plan.scheduler} will stop some of its trials")
    say(
        f"\ncost, timed on {costs[0]['device']}: {step_s:.3g} s per step of the baseline"
        f"{' (their mean)' if len(spaces) > 1 else ''}, {eval_s:.3g} s per validation;\n"
        f"a whole trial {duration(trial_s)}, the search about {duration(search_s)}{stopped}"
    )


def expected_share(plan: Plan) -> float:
    """Share of a whole trial's steps that the average trial gets: with asha one in `reduction_factor` passes each rung;
    what others stop depends on the values, and all is reckoned with."""
    if plan.scheduler != "asha":
        return 1.0
    spent, alive, before, rung = 0.0, 1.0, 0, plan.grace_steps
    while rung < plan.steps:
        spent += alive * (rung - before)
        before, rung = rung, rung * plan.options.tune.reduction_factor
        alive /= plan.options.tune.reduction_factor
    return (spent + alive * (plan.steps - before)) / plan.steps


def time_steps(flags: list[str]) -> dict:
    """Train a few steps in a folder that is thrown away.

    Args:
        flags: The command line of a trial, without its folder.

    Returns:
        `step_s` (without waiting for data: what is timed here may have no frame cache yet) and `eval_s`, in seconds, and
        the `device`.
    """
    quiet()
    from ray_jobs.engine import preflight
    from ray_jobs.engine.driver import train_here
    from ray_jobs.engine.recipe import resolve

    with tempfile.TemporaryDirectory() as folder:
        more = [f"--output_dir={Path(folder) / 'run'}", "--save_checkpoint=false", "--wandb.enable=false"]
        more += [
            f"--steps={TIMED_STEPS}",
            f"--eval_steps={TIMED_STEPS}",
            "--log_freq=1",
            "--ray.num_workers=1",
        ]
        recipe = resolve([*flags, *more])
        preflight.check(recipe)
        told: list[tuple[float, dict]] = []
        summary = train_here(recipe, lambda event: told.append((time.monotonic(), event)), lambda: "")
    logs = [event for _, event in told if event["kind"] == "log"]
    at = {event["kind"]: when for when, event in told}  # the last of each kind
    return {
        "step_s": statistics.median(log["train/step_s"] - log["train/data_s"] for log in logs[WARM_UP:]),
        "eval_s": at["eval"] - at["log"],
        "device": summary["device"],
    }
