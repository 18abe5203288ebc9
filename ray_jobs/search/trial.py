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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ray
import torch
from ray import tune

from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.cluster import watchdog
from ray_jobs.cluster.channel import ChannelHandle, listen_for_stop, teller
from ray_jobs.cluster.driver import train_on_workers
from ray_jobs.cluster.faults import ERROR_LOG, Preempted, comes_again, keep_error
from ray_jobs.cluster.resources import Resources
from ray_jobs.cluster.worker import train_here
from ray_jobs.config.busy import busy
from ray_jobs.config.errors import (
    INTERRUPTED,
    PREEMPTED,
    PRUNED,
    InputError,
    RunError,
    StorageFull,
    StorageLost,
    first_line,
    no_room,
)
from ray_jobs.config.events import Begun, Event, Notice, Start, Step, Validated
from ray_jobs.config.options import OPTIONS_FILE
from ray_jobs.config.recipe import Recipe
from ray_jobs.search.files import ENDED, best_values, trial_place, validations
from ray_jobs.storage import mirror
from ray_jobs.storage.bucket import is_uri
from ray_jobs.storage.records import read_summary
from ray_jobs.storage.retry import may_pass, patiently, storage_may_return


def trial_flags(base: list[str], config: dict, search: str, begun: bool) -> list[str]:
    """The command line of one trial: what all trials share, its own configuration, its place.

    Args:
        config: From `StudySearch.suggest`: `trial` (name), `flags`, `seed`, `repeat`.
        search: The search's `--output_dir`.
        begun: Whether it was begun before, and goes on.
    """
    more = [
        f"--output_dir={trial_place(search, config['trial'])}",
        f"--job_name={search.rpartition('/')[2]}-{config['trial']}",
        f"--seed={config['seed']}",
    ]
    if config["repeat"]:
        more.append("--save_checkpoint=false")  # its value is wanted, and that of its first seed has one
    if begun:
        more.append("--resume=true")
    return [*base, *config["flags"], *more]


def run_trial(
    config: dict,
    *,
    base: list[str],
    search: str,
    check: Callable[[], None],
    metrics: list[str],
    each: Resources,
    trials: int,
    unneeded: tuple[str, ...],
    channel: ChannelHandle,
) -> None:
    """Train one configuration; reports to Ray Tune at every validation, and how it ended.

    Args:
        config: From `StudySearch.suggest`.
        base: Command-line arguments that all trials share.
        search: The search's `--output_dir`, an absolute path or an address in a bucket.
        check: Raises RunError where a node has not the folders that the driver's has (see `worker.check_node`).
        metrics: What the search optimizes.
        each: What each worker of a trial with several reserves.
        trials: How many will read the data: whether to keep its frames depends on it.
        unneeded: Packages that the trials do without (see `lean_imports`).
        channel: Handle of the search's `channel.Channel`.
    """
    tell_tune = busy("waiting for Ray Tune")(tune.report)  # which decides what comes next
    place, pruned, values, reached = trial_place(search, config["trial"]), False, {}, None
    folder = mirror.folder_of(place) if is_uri(place) else Path(place)
    node = ray.get_runtime_context().get_node_id()
    asked_to_stop, tell, hear = listen_for_stop(channel, node), teller(channel), lambda event: None
    tell(Begun(trial=config["trial"]))
    times = {"slot": f"{platform.node()}:{os.getpid()}", "begun": time.time()}

    def report(event: Event) -> None:
        nonlocal pruned, reached
        reached = getattr(event, "step", reached)
        hear(event)
        if isinstance(event, Start | Step):
            times.setdefault("start" if isinstance(event, Start) else "step", time.time())
        tell(replace(event, trial=config["trial"]))
        if isinstance(event, Validated) and not pruned and all(name in event.values for name in metrics):
            values.update({"step": event.step} | {name: event.values[name] for name in metrics})
            tell_tune({**values, "times": {**times, "end": time.time()}})  # returns once it was judged
            pruned = ray.get(channel.why_stopped.remote(config["trial"])) == PRUNED

    def patient[Result](use: Callable[[], Result]) -> Result:
        passing = lambda error: storage_may_return(error) or may_pass(error)  # noqa: E731
        tell_of_storage = lambda text: tell(Notice(text))  # noqa: E731
        return patiently(use, place, tell_of_storage, doing="used", passing=passing, stop=asked_to_stop)

    try:
        # Drawn before the search was told to end, or given up when its slot died.
        if reason := ray.get(channel.why_stopped.remote(config["trial"])):
            return tell_tune({"status": reason})
        if asked_to_stop() == PREEMPTED:  # the slot is one that had waited there for a trial
            raise Preempted()
        try:
            patient(check)
        except RunError as error:  # other trials would fail here one after the other
            ray.get(channel.fail.remote(error))
            return tell_tune({"status": INTERRUPTED})
        recipe = patient(lambda: _prepare(base, config, search, folder))
        for record in validations(folder, metrics):  # of a copy, the study may know less than this
            tell_tune({key: record[key] for key in ("step", *metrics)})
        if recipe is None:  # its slot died before it could tell
            return tell_tune({**(_ended(folder) or {}), **best_values(folder, metrics)})
        if reason := ray.get(channel.why_stopped.remote(config["trial"])):  # by what it has just told, say
            return tell_tune({"status": reason, **best_values(folder, metrics)})
        found = {"trainings": trials, "gpu_share": min(1.0, each.gpus), "unneeded": unneeded}
        # Not of another run: who may search there is decided by the search's own lock.
        recipe = recipe.knowing(**found, run=place)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        should_stop = lambda: PRUNED if pruned else asked_to_stop()  # noqa: E731
        if recipe.options.ray.num_workers > 1:
            summary = train_on_workers(recipe, each, report, should_stop)
            if recipe.remote:  # they ran on other nodes
                patient(lambda: mirror.pull_result(place, folder))
        else:
            hear = watchdog.heartbeat(channel, config["trial"])
            summary = train_here(recipe, report, should_stop)
            if summary["status"] == PREEMPTED:
                raise Preempted()  # Ray Tune has it go on elsewhere, and does not count it as a failure
        result = {**_outcome(summary), **(values if pruned else best_values(folder, metrics))}
    except (StorageFull, StorageLost) as error:
        # Nothing is wrong with the trial; it goes on when the search does.
        ray.get(channel.fail.remote(error))
        return tell_tune({"status": INTERRUPTED})
    except (InputError, RunError) as error:
        result = {"status": "failed", "reason": str(error)}
    except Preempted:
        raise
    except Exception as error:
        if no_room(error):
            ray.get(channel.fail.remote(StorageFull(f"{place}: {first_line(error)}")))
            return tell_tune({"status": INTERRUPTED})
        keep_error(folder, place if is_uri(place) else None, error)
        again = comes_again(error, reached, config["trial"], channel)
        # After an error of its GPU a process can't use it any more, and storage may be back: Ray Tune tries another process.
        if not again and (isinstance(error, torch.AcceleratorError) or may_pass(error)):
            raise
        result = {"status": "failed", "reason": f"{type(error).__name__}, see {place}/{ERROR_LOG}"}
    if is_uri(place) and result["status"] != "failed":
        shutil.rmtree(folder, ignore_errors=True)  # all of it is in the bucket
    _free()
    tell_tune({**result, "times": {**times, "end": time.time()}})


def _prepare(base: list[str], config: dict, search: str, folder: Path) -> Recipe | None:
    """A trial's checked recipe, from the beginning or from where a slot that has died since has left it; None if it was
    trained to its end. What cannot be gone on with is removed.

    Args:
        folder: Of this node, where the trial's run lives.
    """
    place = trial_place(search, config["trial"])
    if is_uri(place):
        begun = mirror.take_up(place, folder)
    elif not (begun := (folder / OPTIONS_FILE).exists()) and folder.exists():
        shutil.rmtree(folder)
    if _ended(folder):
        return None
    return preflight.check(resolve(trial_flags(base, config, search, begun)))


def _ended(folder: Path) -> dict | None:
    """How a run has ended, if it has been trained to its end."""
    summary = read_summary(folder)
    return _outcome(summary) if summary.get("status") in ENDED else None


def _outcome(summary: dict) -> dict:
    return {
        "status": summary["status"],
        "wall_s": summary["wall_s"],
        "trained": summary["step"],
        "lost_steps": summary.get("lost_steps", 0),
    }


def _free() -> None:
    """Leave nothing of a trial's model in the slot. glibc keeps free memory in holes that models of other sizes do not
    fit into: 2 GB after 40 trials."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
