"""A run as its driver sees it: Ray Train's trainer around workers of a cluster. Imported once Ray is up."""

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from ray_jobs.cli import environment
from ray_jobs.cli.terminal import Display
from ray_jobs.cluster import ray_internals, ray_train_internals
from ray_jobs.cluster.channel import ChannelHandle, open_channel
from ray_jobs.cluster.faults import FailureCallback, describe, if_helper_dies, keep_error, of_a_loss, why
from ray_jobs.cluster.resources import Resources, per_worker
from ray_jobs.cluster.run_folder import mark_of
from ray_jobs.cluster.start_worker import start
from ray_jobs.cluster.watchdog import Watchdog
from ray_jobs.config.errors import InputError, RunError, StorageFull, StorageLost
from ray_jobs.config.events import Event, Fault, Notice
from ray_jobs.config.recipe import Recipe
from ray_jobs.storage.mirror import read_file
from ray_jobs.storage.records import SUMMARY_FILE, parse_json, read_summary
from ray_jobs.storage.retry import patiently, storage_may_return

if TYPE_CHECKING:
    from ray.tune import Tuner

# Of workers for one that validates or waits for storage; who hangs is found by the `watchdog`.
LONGEST_WAIT_S = 6 * 3600
WAITED_S = 60  # before it is told that workers have not started
HANDED_ON = ("WANDB_RUN_GROUP",)  # from the process that starts the workers


def resources_of(recipe: Recipe) -> Resources:
    """What each worker of a run reserves.

    Raises:
        InputError: The cluster has no room for them.
    """
    options, streamed = recipe.options.ray, recipe.options.data.source == "stream"
    reserved = options.num_workers, options.cpus_per_worker, options.gpus_per_worker, recipe.device
    return per_worker(*reserved, decoders=streamed, at_least=options.min_workers)


def train_and_show(recipe: Recipe, each: Resources, display: Display, asked: Callable[[], str]) -> dict:
    """Train on workers of the cluster, show what they report, and what they wait for while they have not begun; returns the
    run's summary.

    Args:
        each: What each worker reserves.
        asked: The wish to stop: one of the loop's STOP_REASONS.
    """
    workers = recipe.options.ray.num_workers

    def should_stop() -> str:
        if display.waits_since and time.monotonic() - display.waits_since > WAITED_S:
            why = f"{display.why_again}; " if display.facts else ""
            free = None if ray_internals.has_room() else ray.available_resources()
            display.say(f"{why}{waiting_for(workers, each, free)}")
            display.waits_since = time.monotonic()
        return asked()

    return train_on_workers(recipe, each, display.show, should_stop)


def waiting_for(workers: int, each: Resources, free: dict[str, float] | None) -> str:
    """What a run that has not begun after a while waits for.

    Args:
        free: Resources of the cluster that nobody uses; None once the workers have theirs.
    """
    they = f"{workers} workers with {each} each" if workers > 1 else f"a worker with {each}"
    if free is None:
        return f"still waiting: {they} {'are' if workers > 1 else 'is'} starting (imports, data, models)"
    left = Resources(free.get("CPU", 0), free.get("GPU", 0))
    return f"still waiting for room for {they}: the cluster has {left} that nobody uses now"


def train_on_workers(
    recipe: Recipe, each: Resources, report: Callable[[Event], None], should_stop: Callable[[], str]
) -> dict:
    """A group of `--ray.num_workers` workers on the cluster; returns the run's summary.

    Args:
        each: What each worker reserves.
        report: Called with the run's events.
        should_stop: Asked twice a second.

    Raises:
        RunError: The run has failed for good.
    """
    channel = open_channel()
    fitting, outcome = start_fit(Training(recipe, each, channel))
    watchdog = Watchdog(channel, recipe.options.ray.hang_timeout)
    with if_helper_dies(
        "the run's helper process", "The last checkpoint is intact; --resume=true goes on from it."
    ):
        while fitting.is_alive():
            for event in ray.get(channel.hear.remote(0.5)):
                report(event)
            if hung := watchdog.look():
                report(Notice(hung))
            if reason := should_stop():
                channel.ask_to_stop.remote(reason)
        for event in ray.get(channel.hear.remote(0)):
            report(event)
        return summary_of(recipe, channel, outcome, should_stop)


class Training:
    """Ray Train's trainer, and another one when its controller dies, since Ray Train 2.60 starts workers again, but not the
    process that does so; when a worker was lost while they started (see `ray_train_internals.end_at_lost_start`); or when it has given up a run
    that had got on: `--ray.max_failures` is for one that does not, and not for a week on spot nodes."""

    def __init__(self, recipe: Recipe, each: Resources, channel: ChannelHandle):
        self.recipe, self.each, self.channel = recipe, each, channel

    def fit(self) -> None:
        most, losses = self.recipe.options.ray.max_failures, 0
        while True:
            ray_internals.give_back_orphaned_room()
            try:
                make_trainer(self.recipe, self.each, self.channel, max(most - losses, -1)).fit()
                return
            except (RayActorError, OutOfMemoryError, WorkerGroupError, ControllerError) as error:
                fault = Fault(f"the run's controller was lost ({why(error)})")
                if isinstance(error, ControllerError):
                    if not of_a_loss(error.controller_failure):
                        raise
                    fault = Fault(
                        f"a worker was lost while they started ({why(error)})",
                        announced=getattr(error.controller_failure, "preempted", False),
                        starting=True,
                    )
                if not isinstance(error, WorkerGroupError):  # which the `faults.FailureCallback` has told
                    ray.get(self.channel.tell.remote(fault))
                    self.channel.forget_heartbeats.remote()
                losses = ray.get(self.channel.losses.remote())
                if losses > most >= 0 or ray.get(self.channel.why_failed.remote()):
                    raise
            threading.Thread(target=_give_back_later, daemon=True).start()


def _give_back_later() -> None:
    """A controller that could not end its workers is known to be dead only when the next one waits for their room."""
    with contextlib.suppress(Exception):  # the run may be over, and its connection to Ray
        for seconds in (2, 8, 20, 60):
            time.sleep(seconds)
            ray_internals.give_back_orphaned_room()


def make_trainer(recipe: Recipe, each: Resources, channel: ChannelHandle, max_failures: int) -> TorchTrainer:
    """A `TorchTrainer` that runs the recipe on `--ray.num_workers` workers.

    Args:
        each: What each worker reserves.
        channel: Handle of a `channel.Channel`, which will carry the run's events and the wish to stop it.
        max_failures: How often workers are replaced, -1 for ever.
    """
    options = recipe.options.ray
    if not recipe.remote:
        recipe = recipe.knowing(mark=mark_of(recipe.output_dir))
    datasets = {}
    if recipe.options.data.source == "stream":
        from ray_jobs.cluster import stream_reader  # Ray Data, 2 s

        datasets["train"] = stream_reader.source_of(recipe)
    callbacks: list[Any] = [
        FailureCallback(channel),
        ray_train_internals.end_at_lost_start(),
        ray_train_internals.exit_quickly(),
    ]
    return ray_train_internals.torch_trainer(
        train_loop_per_worker=start,
        datasets=datasets,
        # As bytes: Ray's controller would import LeRobot to hold the recipe itself.
        train_loop_config={
            "recipe": pickle.dumps(recipe),
            "channel": channel,
            "unneeded": recipe.context.unneeded,
            "paths": environment.handed_on(),
        },
        torch_config=TorchConfig(timeout_s=LONGEST_WAIT_S),
        scaling_config=ScalingConfig(
            num_workers=(options.min_workers, options.num_workers)  # type: ignore[arg-type]  # mypy sees Ray Train's first version
            if options.min_workers
            else options.num_workers,
            use_gpu=each.gpus > 0,
            resources_per_worker=each.resources,
            placement_strategy=options.placement.upper(),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy sees Ray Train's first version
            name=".ray",
            storage_path=str(recipe.output_dir),
            # A node that is taken away is no failure: Ray Train counts those apart, and takes up the run for ever.
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=callbacks,
            worker_runtime_env={
                "env_vars": each.env | {k: os.environ[k] for k in HANDED_ON if k in os.environ}
            },
        ),
    )


def start_fit(trainer: "Training | Tuner") -> tuple[threading.Thread, dict]:
    """Run `trainer.fit()` in a thread, so that Ctrl-C comes to us and not to Ray Train, which would kill the
    workers. The dict will hold the `error`, if there is one."""
    outcome: dict = {}

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    return thread, outcome


def summary_of(recipe: Recipe, channel: ChannelHandle, outcome: dict, should_stop: Callable[[], str]) -> dict:
    """The summary of a run whose `fit` is over (see `start_fit`).

    Raises:
        RunError: Why it failed.
    """
    if error := ray.get(channel.why_failed.remote()):
        if isinstance(error, RunError):
            raise error
        raise (StorageLost if isinstance(error, StorageFull) else RunError)(str(error))
    if isinstance(outcome.get("error"), InputError | RunError):
        raise outcome["error"]
    if "error" in outcome:
        raise RunError(_explain(outcome["error"], recipe))
    if recipe.remote:
        read = partial(read_file, recipe.remote, SUMMARY_FILE)
        quietly = lambda text: None  # noqa: E731
        text = patiently(
            read, recipe.remote, quietly, doing="read", passing=storage_may_return, stop=should_stop
        )
        return parse_json(text)
    return read_summary(recipe.output_dir)


def _explain(error: Exception, recipe: Recipe) -> str:
    """Why Ray Train gave up, in two lines; the whole story goes into the run's error.log."""
    if failures := getattr(error, "worker_failures", None):
        told, (_, error) = describe(failures), min(failures.items())
    else:
        starting = of_a_loss(getattr(error, "controller_failure", None))  # of the workers, that is
        told = f"{'a worker was lost' if starting else "the run's controller has failed"} ({why(error)})"
    log = keep_error(recipe.output_dir, recipe.remote, error)
    return f"{told}, and that for good.\nThe full error is in {log}."
