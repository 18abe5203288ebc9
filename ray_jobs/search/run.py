"""A search while it runs: Ray Tune's trainable, what it shows, how it is stopped, and what is written at its end.

Imported once Ray is up.
"""

import os
import queue
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ray
from optuna import Study
from ray import tune
from ray.tune import FailureConfig, RunConfig, TuneConfig
from sqlalchemy.exc import SQLAlchemyError

from ray_jobs.cli import environment
from ray_jobs.cli.progress import Progress
from ray_jobs.cluster import ray_internals, resources
from ray_jobs.cluster.channel import open_channel
from ray_jobs.cluster.driver import start_fit
from ray_jobs.cluster.faults import if_helper_dies
from ray_jobs.cluster.run_folder import check_node, mark_of, only_driver
from ray_jobs.cluster.watchdog import Watchdog
from ray_jobs.config.errors import INTERRUPTED, InputError, RunError, StorageLost, first_line
from ray_jobs.config.events import Ended, Event, Notice
from ray_jobs.search import bucket_copy, estimate, ray_tune_internals, results
from ray_jobs.search.bucket_copy import BucketCopy
from ray_jobs.search.files import DONE, SEARCH_FILE, SPACES_DIR, TIME_IS_UP, trial_name
from ray_jobs.search.options import MORE_IS_BETTER
from ray_jobs.search.plan import Plan
from ray_jobs.search.ray_tune import DEATHS, StudyScheduler, StudySearch, TrialFailureCallback
from ray_jobs.search.slot import Slot
from ray_jobs.search.start_slot import start_trial
from ray_jobs.search.study.begin import open_study
from ray_jobs.search.study.storage import StudyFile, address_of
from ray_jobs.search.study.study import finished, trials_of
from ray_jobs.storage.retry import patiently

LOOK_EVERY_S = 3  # between looks for nodes that have joined, or will be taken away


def run(plan: Plan, slot: Slot, write_report: Callable[[Path], Path]) -> int:
    """Search, write the answer, and say it.

    Args:
        write_report: Draws what is in the search's folder; returns the report's place.

    Returns:
        The exit status.

    Raises:
        RunError: The search has failed, or has found nothing.
    """
    stopped = threading.Event()  # from now on nothing is waited for that has failed
    with only_driver(plan.output_dir):
        seed = plan.recipe.lerobot.seed or 0
        new = not (plan.output_dir / SEARCH_FILE).exists()
        if new:  # before the study: what has begun can be resumed
            plan.save()
        try:
            study = open_study(plan, seed, stopped.is_set)
        except InputError:
            if new:
                (plan.output_dir / SEARCH_FILE).unlink()
                shutil.rmtree(plan.output_dir / SPACES_DIR)
            raise
        if not new:
            plan.save()
            results.reopen(plan)
        with bucket_copy.kept(plan, study, print, stopped.is_set) as copy:
            started = time.monotonic()
            with if_helper_dies("the search's helper process", "The study is intact; --resume=true goes on."):
                status, error = _search(plan, study, slot, seed, copy, stopped)
            try:
                if copy:
                    copy.gather(plan, study)
                summary = results.write(plan, study, status, time.monotonic() - started, slot.each)
            except StorageLost as failure:
                raise RunError(error or str(failure)) from failure
            except (OSError, SQLAlchemyError) as failure:  # a disk that is full, say
                more = f"what was found cannot be written: {first_line(failure)}"
                raise RunError(f"{error or more}\nThe study is intact; --resume=true goes on.") from failure
            results.last_screen(plan, summary, print)
            if plan.pushes and summary["best"]:
                print(results.upload(plan))
            try:
                print(f"report      {write_report(plan.output_dir)}")
            except Exception as failure:  # out of memory, say; what was found is whole
                again = f"python -m ray_jobs.report --output_dir={shlex.quote(str(plan.output_dir))}"
                print(f"no report   {type(failure).__name__}: {first_line(failure)}; once more: {again}")
    if status != DONE:
        print(f"continue    python -m ray_jobs.tune --output_dir={shlex.quote(plan.place)} --resume=true")
    if status == INTERRUPTED and not error:
        return 130
    if error or not summary["best"]:
        raise RunError(error or results.why_nothing(study, status))
    return 0


def _search(
    plan: Plan, study: Study, slot: Slot, seed: int, copy: BucketCopy | None, stopped: threading.Event
) -> tuple[str, str | None]:
    """Run Ray Tune until the study has all its trials; returns how it ended, and why if it failed.

    Args:
        stopped: Is set once somebody has asked to stop, or the search has failed.
    """
    options = plan.options.tune
    # As many as there is room for, counted here and below, and one that waits: its slot is warm when another trial ends,
    # and an autoscaler hears of it. None that waits for workers of its own, which would have begun without them.
    counted = options.max_concurrent is None
    waiting = int(options.workers_per_trial == 1)
    if counted:
        options.max_concurrent = slot.at_once + waiting
    # Else slots would start one after the other.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slot.at_once + waiting)
    ray_tune_internals.keep_keys_out_of_logs()
    ray_tune_internals.survive_memory_kills()
    told: queue.SimpleQueue = queue.SimpleQueue()

    def tell(event: Event) -> None:
        # In Tune's thread, which alone works with the study: Ctrl-C must not leave a transaction open.
        if isinstance(event, Ended):
            notice = lambda text: told.put(Notice(text))  # noqa: E731
            hopeless = patiently(
                partial(results.note, plan, study), "trials.csv", notice, stop=stopped.is_set
            )
            if copy:
                copy.ended(hopeless)
        told.put(event)

    file = StudyFile(address_of(plan))
    search = StudySearch(study, plan.space, options, seed, plan.steps, tell)
    channel = open_channel()
    shared = (None, "") if plan.remote else (plan.output_dir, mark_of(plan.output_dir))
    trainable = tune.with_resources(
        partial(
            start_trial,
            base=plan.base,
            search=plan.place,
            check=partial(check_node, plan.recipe.lerobot.dataset.root, *shared),
            group=plan.study_name,
            metrics=options.metrics,
            each=slot.each,
            trials=options.num_samples,
            unneeded=plan.recipe.context.unneeded,
            paths=environment.handed_on(),
            channel=channel,
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
            scheduler=StudyScheduler(search, channel),
            num_samples=10**6,  # the searcher says when it is over
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: trial.config["trial"],
        ),
        run_config=RunConfig(
            name=scratch.name,
            storage_path=str(plan.output_dir),
            failure_config=FailureConfig(max_failures=DEATHS - 1),
            callbacks=[TrialFailureCallback(tell, channel)],
            verbose=0,
        ),
    )
    done = [t for t in trials_of(study) if t.state.is_finished()]
    best = finished(study)[:1]
    progress = Progress(
        num_samples=options.num_samples,
        steps=plan.steps,
        metric=options.metrics[0],
        higher=options.metrics[0] in MORE_IS_BETTER,
        done=len(done),
        best=(best[0].values[0], trial_name(best[0].number)) if best else None,
        slots=slot.at_once,
    )
    progress.say(estimate.intro(plan, slot))
    # Trials with several workers look after these themselves.
    watchdog = Watchdog(
        channel, plan.recipe.options.ray.hang_timeout if options.workers_per_trial == 1 else 0
    )
    fitting, outcome = start_fit(tuner)
    status, started = DONE, time.monotonic()
    looked, failure = started, None

    def stop(reason: str) -> None:
        nonlocal status
        search.stopping, status = True, reason
        if reason != TIME_IS_UP:
            stopped.set()
        channel.ask_to_stop.remote(INTERRUPTED)

    try:
        while fitting.is_alive():
            try:
                for event in ray.get(channel.hear.remote(0.3)):
                    progress.show(event)
                while not told.empty():
                    progress.show(told.get())
                progress.refresh()
                if copy and copy.failure and status == DONE:  # told when the copy is closed
                    stop(INTERRUPTED)
                if status == DONE and (failure := search.failure or ray.get(channel.why_failed.remote())):
                    stop("failed")  # what has failed for one trial would for all
                for hung in watchdog.look_at_trials():
                    progress.say(hung)
                if time.monotonic() - looked > LOOK_EVERY_S:
                    looked = time.monotonic()
                    if status == DONE and file.is_gone():  # who trains for hours does not ask the study
                        search.failure = search.failure or file.loss()
                        progress.say(f"{file.path} is gone: trials save a checkpoint and end.")
                    for node in ray_internals.draining_nodes():
                        channel.leave.remote(node)
                    if counted:
                        room = resources.room_for(slot.each) // options.workers_per_trial
                        options.max_concurrent = max(1, room) + waiting
                if (
                    options.time_budget_s
                    and status == DONE
                    and time.monotonic() - started > options.time_budget_s
                ):
                    progress.say("the time is up: trials save a checkpoint and end.")
                    stop(TIME_IS_UP)
            except KeyboardInterrupt:
                if status == INTERRUPTED:
                    raise
                progress.say("stopping: running trials save a checkpoint first; Ctrl-C again stops at once.")
                stop(INTERRUPTED)
        while not told.empty():
            progress.show(told.get())
        failure = failure or search.failure or ray.get(channel.why_failed.remote())
    finally:
        progress.close()
        ray.kill(channel)  # Tune's registry would keep it as long as this process lives
    shutil.rmtree(scratch, ignore_errors=True)
    if failure:
        why = str(failure)
        if not isinstance(failure, RunError | InputError):
            why = (
                f"the search's own files: {first_line(failure)}\n"
                "The last checkpoints are intact; --resume=true goes on from them."
            )
        return "failed", why
    if "error" in outcome:
        return "failed", f"the search was given up: {outcome['error']}"
    if search.given_up:
        return "failed", f"{DEATHS} trials in a row have cost {DEATHS} processes each; Ray's logs tell why."
    return status, None
