"""What a search will do and what it will cost, before it does it. Imported once Ray is up."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import optuna
import ray

from ray_jobs.cli.terminal import doing
from ray_jobs.cluster import resources
from ray_jobs.cluster.faults import if_helper_dies
from ray_jobs.config.units import duration
from ray_jobs.search.plan import Plan
from ray_jobs.search.slot import Slot
from ray_jobs.search.spaces.space import flags
from ray_jobs.search.start_slot import start_timing
from ray_jobs.search.study.samplers import make_sampler

MOST_TIMED = 8  # slots at once
NUMBERS = ("step_s", "eval_s", "trial_s", "decode_s")
FIRST = 3  # drawn configurations that are shown


def intro(plan: Plan, slot: Slot) -> str:
    """Data, objective, and how many trials of what size, in two lines."""
    recipe, tune = plan.recipe.lerobot, plan.options.tune
    episodes = plan.recipe.options.data.eval_episodes
    held_out = (
        f"episodes {episodes}"
        if episodes
        else f"{len(plan.recipe.context.held_out)} episode(s), the last of each task,"
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
    """Parameters, the first configurations, and the cost, from slots that train the baseline for a few steps."""
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
    doing("timing a slot's start and a few steps")
    cost = estimate(plan, slot)
    doing("")
    several = " (the mean of their baselines)" if len(spaces) > 1 else ""
    stopped = {
        "none": "",
        "asha": f" ({expected_share(plan):.0%} of the steps; asha stops fewer where one trial after the other is the best so far)",
    }.get(plan.scheduler, f" at most: {plan.scheduler} will stop some of its trials")
    hours, rate = cost.search_s / 3600, tune.cost_per_hour
    price = "" if rate is None else f"; at {rate:g} an hour it costs {rate * hours:.2f}"
    say(
        f"\ncost, timed on {cost.device}: {cost.step_s:.3g} s per step of the baseline{several}, {cost.eval_s:.3g} s per "
        f"validation, {duration(cost.start_s)} until the first trials train;\n"
        f"a whole trial {duration(cost.whole_s)}, the search about {duration(cost.search_s)} or {hours:.2g} h{price}{stopped}"
    )


@dataclass
class Estimate:
    """Seconds, with as many slots at work as the search will have."""

    device: str
    step_s: float
    eval_s: float
    start_s: float
    """Until the first trials train: slots start, and frames are decoded."""
    whole_s: float
    """Of a trial that is not stopped."""
    search_s: float


def estimate(plan: Plan, slot: Slot) -> Estimate:
    """Time slots, all at once, with the baselines."""
    tune, spaces = plan.options.tune, plan.space.spaces
    slots = min(at_once(plan, slot), tune.num_samples)
    copies = max(1, min(MOST_TIMED, slots, resources.room_for(slot.each, now=True)))
    run = ray.remote(num_cpus=slot.each.cpus, num_gpus=slot.each.gpus, max_calls=1)(start_timing)
    costs, starts = [], []
    for space in spaces:
        words = [*plan.base, *flags(space.first(plan.space.fixed))]
        begin = time.monotonic()
        with if_helper_dies("a process that timed a few steps", "No search was begun."):
            timed = ray.get(
                [run.remote(words, tune.num_samples, plan.recipe.context.unneeded) for _ in range(copies)]
            )
        costs += timed
        starts.append(time.monotonic() - begin - statistics.mean(cost.inside_s for cost in timed))
    mean = {name: statistics.mean(getattr(cost, name) for cost in costs) for name in NUMBERS}
    beside = max(Counter(cost.node for cost in costs).values()) / len(spaces)  # of the copies, on one node
    start_s = max(0.0, statistics.mean(starts)) + mean["decode_s"] / beside
    validations = math.ceil(plan.steps / plan.recipe.eval_steps)
    training_s = mean["step_s"] * plan.steps + mean["eval_s"] * validations
    repeats = (tune.seeds - 1) * (tune.finalists + len(spaces))
    drawn = max(0, tune.num_samples - len(spaces))
    trials = len(spaces) + drawn + repeats
    whole = len(spaces) + drawn * expected_share(plan) + repeats  # trials' steps, as whole trials
    work_s = trials * mean["trial_s"] + whole * training_s
    whole_s = mean["trial_s"] + training_s
    search_s = start_s + max(whole_s, work_s / slots)
    return Estimate(costs[0].device, mean["step_s"], mean["eval_s"], start_s, whole_s, search_s)


def expected_share(plan: Plan) -> float:
    """Resources of a whole trial's steps that the average trial gets: with asha one in `reduction_factor` passes each rung;
    what others stop depends on the values, and all is reckoned with."""
    if plan.scheduler != "asha":
        return 1.0
    spent, alive, before, rung = 0.0, 1.0, 0, plan.grace_steps
    while rung < plan.steps:
        spent += alive * (rung - before)
        before, rung = rung, rung * plan.options.tune.reduction_factor
        alive /= plan.options.tune.reduction_factor
    return (spent + alive * (plan.steps - before)) / plan.steps
