"""Search hyper-parameters of a LeRobot policy unattended: Ray Tune runs the trials, Optuna steers them.

    python -m ray_jobs.tune --space=search_spaces/act.yaml --dataset.repo_id=me/set --dataset.root=datasets/set \
        --steps=2000 --output_dir=outputs/act_search --tune.num_samples=32

Every flag of `ray_jobs.train` holds for all trials; the space says what varies. `--dry-run` prints the plan,
`--help` the tuner's own flags.
"""

import contextlib
import os
import queue
import shutil
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ray_jobs.engine import cluster
from ray_jobs.engine.console import duration, no_garbage_collection, quiet, run_job
from ray_jobs.engine.errors import INTERRUPTED, InputError, RunError
from ray_jobs.engine.options import read_flags

if TYPE_CHECKING:
    from ray_jobs.search.plan import Plan

# For Ray Tune, which reads them while it is imported, or when a search begins.
TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run has files of its own
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "120",  # a stopped trial may take so long to close its W&B run
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
MAX_CPU_TRIALS = 4  # at a time, where nothing else says so: a search learns from one trial for the next
DRIVER_CPUS = 0.01  # of a trial whose workers have a group of their own


def main(argv: list[str]) -> int:
    """Check the space, search, write the answer, and say it. Returns the exit status."""
    quiet()
    os.environ.update(TUNE_ENV)
    if {"--help", "-h"} & set(argv):
        return _help()
    _start_ray(argv)
    with no_garbage_collection():
        from ray_jobs.search import answer
        from ray_jobs.search.plan import make_plan, read_command
        from ray_jobs.search.study import open_study

    typed, options, resume, notices = read_command(argv)
    plan = make_plan(typed, options, resume, notices, print)
    for notice in plan.notices:
        print(notice)
    cluster.start(plan.recipe.options.ray.address).result()
    slot = _slot(plan)
    if options.tune.dry_run:
        _print_plan(plan, slot)
        return 0
    plan.save()

    from ray_jobs.engine.workers import lock

    with lock(plan.output_dir, wait_s=5):
        seed = plan.recipe.lerobot.seed or 0
        study = open_study(options.tune, plan.space, plan.output_dir, seed, plan.grace_steps, plan.steps)
        started = time.monotonic()
        status = _search(plan, study, slot, seed)
        answer.sweep(plan, study)
        summary = answer.write(plan, study, status, time.monotonic() - started)
    answer.last_screen(plan, summary, print)
    if status == INTERRUPTED:
        print(f"continue    python -m ray_jobs.tune --output_dir={plan.output_dir} --resume=true")
    if status == "failed":
        raise RunError(
            "three trials in a row have cost three processes each; their error.log and Ray's logs tell more."
        )
    return 130 if status == INTERRUPTED else 0


def _start_ray(argv: list[str]) -> None:
    """Let Ray start while the space is checked; what is wrong with the command line is said later."""
    with contextlib.suppress(InputError):
        flags, _ = read_flags(argv)
        if flags.get("space") and "resume" not in flags:
            cluster.start(flags.get("ray.address"))


# ---------------------------------------------------------------------- what a trial reserves


@dataclass
class Slot:
    """What one trial reserves on the cluster."""

    bundle: dict[str, float]
    """Resources of the trial's own process."""
    each: cluster.Share
    """Of each worker, where a trial has several."""
    at_once: int
    """Trials that the cluster holds now."""


def _slot(plan: "Plan") -> Slot:
    """Decide what each trial reserves, and refuse what no node has.

    Raises:
        InputError: Not even an empty cluster has room for one trial.
    """
    import ray

    tune, options = plan.options.tune, plan.recipe.options.ray
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total_cpus, total_gpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("CPU", "GPU"))
    gpus, cpus = tune.gpus_per_trial, options.cpus_per_worker
    workers = tune.workers_per_trial
    if gpus is None and workers == 1 and total_gpus and (plan.recipe.device or "cuda").startswith("cuda"):
        gpus = 1.0
    most = max(node.get("GPU", 0) for node in nodes)
    if gpus and gpus > most and workers == 1:
        raise InputError(
            f"--tune.gpus_per_trial={gpus:g}: no node of this cluster has more than {most:g} GPUs."
        )
    if workers > 1:
        each = cluster.share(workers, cpus, None if gpus is None else gpus / workers, plan.recipe.device)
        room = min(total_cpus // each.cpus, total_gpus // each.gpus if each.gpus else total_cpus) // workers
        return Slot({"CPU": DRIVER_CPUS}, each, max(1, int(room)))
    if cpus is None:
        at_once = int(total_gpus / gpus) if gpus else min(MAX_CPU_TRIALS, tune.num_samples)
        cpus = max(1, total_cpus // max(1, at_once))
        if gpus:
            cpus = min(cpus, 8)
    each = cluster.share(1, cpus, gpus or 0.0, plan.recipe.device)
    room = min(total_cpus // each.cpus, total_gpus / each.gpus if each.gpus else total_cpus)
    return Slot(each.resources, each, max(1, int(room)))


# ---------------------------------------------------------------------- the search


def _search(plan: "Plan", study, slot: Slot, seed: int) -> str:
    """Run Ray Tune until the study has all its trials; returns how it ended."""
    import ray
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig

    from ray_jobs.engine.workers import start_fit
    from ray_jobs.search import answer
    from ray_jobs.search.progress import Progress
    from ray_jobs.search.study import DEATHS, StudyScheduler, StudySearch, finished, trial_name, trials_of
    from ray_jobs.search.trial import run_trial

    options = plan.options.tune
    if options.workers_per_trial > 1 and options.max_concurrent is None:
        options.max_concurrent = slot.at_once  # else trials would start whose workers find no room
    told: queue.SimpleQueue = queue.SimpleQueue()
    search = StudySearch(study, plan.space, options, seed, plan.steps, told.put)
    line = cluster.open_line()
    trainable = tune.with_resources(
        partial(
            run_trial,
            base=plan.base,
            output_dir=plan.output_dir,
            metrics=options.metrics,
            each=slot.each,
            line=line,
        ),
        tune.PlacementGroupFactory([slot.bundle]),
    )
    scratch = plan.output_dir / ".ray"
    shutil.rmtree(
        scratch, ignore_errors=True
    )  # Tune's own notes of an earlier session; ours are in the study
    tuner = tune.Tuner(
        trainable,
        tune_config=TuneConfig(
            search_alg=search,
            scheduler=StudyScheduler(search),
            num_samples=10**6,  # the searcher says when it is over
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: trial.config["trial"],
        ),
        run_config=RunConfig(
            name=scratch.name,
            storage_path=str(plan.output_dir),
            failure_config=FailureConfig(max_failures=DEATHS - 1),
            verbose=0,
        ),
    )
    done = [t for t in trials_of(study) if t.state.is_finished()]
    best = finished(study)[:1]
    progress = Progress(
        num_samples=options.num_samples,
        steps=plan.steps,
        metric=options.metrics[0],
        done=len(done),
        best=(best[0].values[0], trial_name(best[0].number)) if best else None,
    )
    progress.say(_intro(plan, slot))
    fitting, outcome = start_fit(tuner)
    status, started = "done", time.monotonic()

    def stop(reason: str) -> None:
        nonlocal status
        search.stopping, status = True, reason
        line.ask_to_stop.remote(INTERRUPTED)

    try:
        while fitting.is_alive():
            try:
                for event in ray.get(line.hear.remote(0.3)):
                    progress.show(event)
                while not told.empty():
                    progress.show(event := told.get())
                    if event["kind"] == "ended":
                        answer.sweep(plan, study)
                progress.refresh()
                if (
                    options.time_budget_s
                    and status == "done"
                    and time.monotonic() - started > options.time_budget_s
                ):
                    progress.say("the time is up: trials save a checkpoint and end.")
                    stop("time is up")
            except KeyboardInterrupt:
                if status == INTERRUPTED:
                    raise
                progress.say("stopping: running trials save a checkpoint first; Ctrl-C again stops at once.")
                stop(INTERRUPTED)
        while not told.empty():
            progress.show(told.get())
    finally:
        progress.close()
    shutil.rmtree(scratch, ignore_errors=True)
    if "error" in outcome:
        raise RunError(f"Ray Tune gave up: {outcome['error']}")
    return "failed" if search.deaths_in_a_row >= DEATHS else status


# ---------------------------------------------------------------------- what the user sees


def _intro(plan: "Plan", slot: Slot) -> str:
    recipe, tune = plan.recipe.lerobot, plan.options.tune
    held_out = plan.recipe.options.data.eval_episodes or f"{recipe.dataset.eval_split:.0%} of each task"
    each = slot.each if tune.workers_per_trial == 1 else f"{tune.workers_per_trial} workers of {slot.each}"
    return (
        f"{recipe.dataset.repo_id}: held out {held_out}; {tune.metric} over {plan.horizon} actions, every "
        f"{plan.recipe.eval_steps} steps\n"
        f"{tune.num_samples} trials of {plan.steps} steps, {tune.sampler} + {tune.scheduler}; "
        f"{min(slot.at_once, tune.max_concurrent or slot.at_once)} at a time, each {each}"
    )


def _print_plan(plan: "Plan", slot: Slot) -> None:
    """Parameters, the first configurations, and what it will cost, from a few timed steps of the baseline."""
    import optuna
    import ray

    from ray_jobs.search.space import flags
    from ray_jobs.search.study import make_sampler
    from ray_jobs.search.timing import time_steps

    tune = plan.options.tune
    print(_intro(plan, slot))
    print("\nparameters")
    for name, text in plan.space.describe().items():
        print(f"  {name:38} {text}")
    study = optuna.create_study(
        sampler=make_sampler(tune, plan.recipe.lerobot.seed or 0), directions=["minimize"] * len(tune.metrics)
    )
    for params in plan.space.baselines():
        study.enqueue_trial(params)
    print("\nfirst configurations")
    for number in range(min(tune.num_samples, len(plan.space.spaces) + 3)):
        space, config = plan.space.suggest(study.ask())
        searched = {p.flag for p in space.parameters}
        name = " (published)" if number < len(plan.space.spaces) else ""
        print(
            f"  {number}{name}  "
            + "  ".join(w[2:] for w in flags({k: v for k, v in config.items() if k in searched}))
        )
    run = ray.remote(num_cpus=slot.each.cpus, num_gpus=slot.each.gpus)(time_steps)
    base = [
        *plan.base,
        *flags(plan.space.spaces[0].published(plan.space.fixed)),
    ]
    cost = ray.get(run.remote(base))
    trial_s = cost["step_s"] * plan.steps + cost["eval_s"] * plan.steps / plan.recipe.eval_steps
    share = _expected_share(plan)
    total = (
        trial_s
        * (1 + (tune.num_samples - 1) * share)
        / min(slot.at_once, tune.max_concurrent or slot.at_once)
    )
    print(
        f"\ncost, timed on {cost['device']}: {cost['step_s']:.3g} s per step of the published recipe, {cost['eval_s']:.3g} s per "
        f"validation;\na whole trial {duration(trial_s)}, the search about {duration(total)}"
        + (
            f" ({share:.0%} of the steps, if {tune.scheduler} stops as many as it usually does)"
            if share < 1
            else ""
        )
    )


def _expected_share(plan: "Plan") -> float:
    """Share of a full trial's steps that an average trial gets under successive halving."""
    tune = plan.options.tune
    if tune.scheduler == "none" or len(tune.metrics) > 1:
        return 1.0
    share, alive, rung = 0.0, 1.0, plan.grace_steps
    before = 0
    while rung < plan.steps:
        share += alive * (rung - before) / plan.steps
        before, alive, rung = rung, alive / tune.reduction_factor, rung * tune.reduction_factor
    return share + alive * (plan.steps - before) / plan.steps


def _help() -> int:
    from ray_jobs.engine.options import help_for
    from ray_jobs.search.options import TuneOptions

    print(__doc__)
    print("  --space=FILE[,FILE]\n        Search spaces, one for each policy (see search_spaces/).")
    print("\n".join(help_for("tune", TuneOptions)))
    print("\nThe flags of one training:  python -m ray_jobs.train --help")
    return 0


if __name__ == "__main__":
    run_job(main, at_end=cluster.leave)
