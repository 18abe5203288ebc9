"""One trial, as it runs in a slot: a process that Ray Tune keeps for many trials (`reuse_actors`).

Imports, CUDA's context and the data are paid for once. A trial with one worker runs the training loop right here,
in Ray Train's local mode; one with several gets a worker group of its own. Either way it is an ordinary run in an
ordinary folder, which goes on from its last checkpoint if the slot has died.
"""

import ctypes
import gc
import os
import platform
import shutil
import time
import traceback
from pathlib import Path

from ray_jobs.engine.cluster import Share
from ray_jobs.engine.console import no_garbage_collection, quiet
from ray_jobs.engine.errors import PRUNED, InputError, RunError
from ray_jobs.engine.meters import METRIC
from ray_jobs.engine.options import OPTIONS_FILE
from ray_jobs.engine.workers import ERROR_LOG

TRIALS_DIR = "trials"
ENDED = ("finished", "stopped early")  # how a run ends that was trained as far as it was to be


def trial_dir(output_dir: Path, name: str) -> Path:
    return output_dir / TRIALS_DIR / name


def trial_flags(base: list[str], config: dict, output_dir: Path) -> list[str]:
    """The command line of one trial: what all trials share, its own configuration, its folder.

    Args:
        config: From `StudySearch.suggest`: `trial` (name), `flags`, `seed`, `repeat`.
    """
    folder = trial_dir(output_dir, config["trial"])
    more = [
        f"--output_dir={folder}",
        f"--job_name={output_dir.name}-{config['trial']}",
        f"--seed={config['seed']}",
    ]
    if config["repeat"]:
        more.append("--save_checkpoint=false")  # its value is wanted, and that of its first seed has one
    if (folder / OPTIONS_FILE).exists():
        more.append("--resume=true")
    elif folder.exists():
        shutil.rmtree(folder)  # its slot was killed before it had begun
    return [*base, *config["flags"], *more]


def run_trial(
    config: dict,
    *,
    base: list[str],
    output_dir: Path,
    group: str,
    metrics: list[str],
    each: Share,
    trials: int,
    line,
) -> None:
    """Train one configuration; reports to Ray Tune at every validation, and how it ended.

    Args:
        config: From `StudySearch.suggest`.
        base: Command-line arguments that all trials share.
        group: The study's name, for W&B.
        metrics: What the search optimizes.
        each: What each worker of a trial with several reserves.
        trials: How many will read the data: whether to keep its frames depends on it.
        line: Handle of the search's `cluster.Line`.
    """
    quiet()
    os.environ["WANDB_RUN_GROUP"] = group
    with no_garbage_collection():
        import ray
        import torch
        from ray import tune

        from ray_jobs.engine import preflight
        from ray_jobs.engine.recipe import resolve
        from ray_jobs.engine.workers import listen_for_stop, teller, train_here

    folder, pruned, values = trial_dir(output_dir, config["trial"]), False, {}
    asked_to_stop, tell = listen_for_stop(line), teller(line)
    tell({"kind": "begun", "trial": config["trial"]})
    times = {"slot": f"{platform.node()}:{os.getpid()}", "begun": time.time()}

    def report(event: dict) -> None:
        nonlocal pruned
        if event["kind"] in ("start", "step"):
            times.setdefault(event["kind"], time.time())
        tell({**event, "trial": config["trial"]})
        if event["kind"] == "eval" and not pruned and all(name in event for name in metrics):
            values.update((key, event[key]) for key in ("step", *metrics))
            tune.report({**values, "times": {**times, "end": time.time()}})  # returns once it was judged
            pruned = ray.get(line.why_stopped.remote(config["trial"])) == PRUNED

    try:
        # Drawn before the search was told to end, or given up when its slot died.
        if reason := ray.get(line.why_stopped.remote(config["trial"])):
            return tune.report({"status": reason})
        if ended := _ended(folder):  # its slot died before it could tell
            return tune.report({**ended, **best_values(folder, metrics)})
        recipe = resolve(trial_flags(base, config, output_dir))
        recipe.trainings, recipe.gpu_share = trials, min(1.0, each.gpus)
        preflight.check(recipe)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        if recipe.options.ray.num_workers > 1:
            summary = _train_on_workers(recipe, each, report, lambda: PRUNED if pruned else asked_to_stop())
        else:
            summary = train_here(recipe, report, lambda: PRUNED if pruned else asked_to_stop())
        result = {**_outcome(summary), **(values if pruned else best_values(folder, metrics))}
    except (InputError, RunError) as error:
        result = {"status": "failed", "reason": str(error)}
    except Exception as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR_LOG).write_text(traceback.format_exc())
        result = {"status": "failed", "reason": f"{type(error).__name__}, see {folder / ERROR_LOG}"}
    _free()
    tune.report({**result, "times": {**times, "end": time.time()}})


def best_values(folder: Path, metrics: list[str]) -> dict:
    """The validation that a run is judged by: the one with the least action error, whose checkpoint stays; under
    another metric, the last one. `step` and the metrics, or nothing if there was no validation."""
    from ray_jobs.engine.tracking import read_metrics

    records = [record for record in read_metrics(folder) if all(name in record for name in metrics)]
    if not records:
        return {}
    best = min(records, key=lambda r: r[METRIC]) if metrics[0] == METRIC else records[-1]
    return {key: best[key] for key in ("step", *metrics)}


def ranked_checkpoint(folder: Path, metrics: list[str]) -> Path | None:
    """The checkpoint of a trial whose validation it was ranked by (see `best_values`), None if there is none."""
    names = ("best", "last") if metrics[0] == METRIC else ("last",)
    return next((path for name in names if (path := folder / "checkpoints" / name).exists()), None)


def _ended(folder: Path) -> dict | None:
    """How a run has ended, if it has been trained to its end."""
    from ray_jobs.engine.tracking import SUMMARY_FILE, read_json

    if not (folder / SUMMARY_FILE).is_file():
        return None
    summary = read_json(folder / SUMMARY_FILE)
    return _outcome(summary) if summary["status"] in ENDED else None


def _outcome(summary: dict) -> dict:
    return {"status": summary["status"], "wall_s": summary["wall_s"], "trained": summary["step"]}


def _train_on_workers(recipe, each: Share, report, should_stop) -> dict:
    """A worker group of the trial's own; this process hands its validations on, and the wish to stop."""
    import ray

    from ray_jobs.engine import cluster, workers
    from ray_jobs.engine.watchdog import Watchdog

    line = cluster.open_line()
    fitting, outcome = workers.start_fit(workers.make_trainer(recipe, each, line))
    watchdog = Watchdog(line, recipe.options.ray.hang_timeout)
    while fitting.is_alive():
        for event in ray.get(line.hear.remote(0.5)):
            report(event)
        if hung := watchdog.look():
            report({"kind": "notice", "text": hung})
        if reason := should_stop():
            line.ask_to_stop.remote(reason)
    for event in ray.get(line.hear.remote(0)):
        report(event)
    return workers.summary_of(recipe, line, outcome)


def _free() -> None:
    """Leave nothing of a trial's model in the slot. glibc keeps free memory in holes that models of other sizes do not
    fit into: 2 GB after 40 trials."""
    import torch

    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
