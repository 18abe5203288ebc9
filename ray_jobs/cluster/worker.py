"""What a worker of a run does around the training loop: see that its node is fit, hold the run's folder, listen, report.

In a process of its own on the cluster (`work`), or in this one (`train_here`).
"""

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ray
import ray.train.collective
import torch
import torch.distributed
from lerobot.configs.parser import load_plugin
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from ray_jobs.cluster import ray_train_internals, watchdog
from ray_jobs.cluster.channel import listen_for_stop, teller
from ray_jobs.cluster.faults import Preempted, comes_again, in_plain_words, keep_error
from ray_jobs.cluster.run_folder import check_node, lock
from ray_jobs.config.errors import PREEMPTED, InputError, RunError
from ray_jobs.config.events import Event, Notice, Saved, Validated
from ray_jobs.config.recipe import Recipe
from ray_jobs.storage.mirror import mirrored, pull
from ray_jobs.storage.retry import patiently, storage_may_return
from ray_jobs.training import loop
from ray_jobs.training.tracking import save_options


def work(config: dict) -> None:
    """One training worker of a group: unpack the recipe, run the loop, report to the driver and to Ray Train."""
    channel = config["channel"]
    recipe = pickle.loads(config["recipe"])
    context = ray.train.get_context()
    try:
        check_node(
            recipe.lerobot.dataset.root, None if recipe.remote else recipe.output_dir, recipe.context.mark
        )
    except RunError as error:
        ray.get(channel.fail.remote(error))
        raise
    main = context.get_world_rank() == 0
    if context.get_world_size() == 1:
        os.environ.pop("LOCAL_RANK", None)  # else accelerate wraps the policy for a group of one
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    tell = teller(channel) if main else lambda event: None
    hear = watchdog.heartbeat(channel, context.get_world_rank())

    reached = None

    def report(event: Event) -> None:
        nonlocal reached
        reached = getattr(event, "step", reached)
        hear(event)
        tell(event)
        if isinstance(event, Validated):
            numbers = {k: v for k, v in event.values.items() if isinstance(v, int | float)}
            ray.train.report({"step": event.step, **numbers})

    asked_to_stop = listen_for_stop(channel)

    def should_stop() -> str:
        return asked_to_stop() or (PREEMPTED if ray_train_internals.node_will_be_taken() else "")

    how = {"device": str(get_device()), "report": report, "should_stop": should_stop}
    try:
        stream = None
        if recipe.options.data.source == "stream":
            from ray_jobs.cluster import stream_reader  # Ray Data, 2 s

            stream = stream_reader.epochs(
                recipe, ray.train.get_dataset_shard("train"), pinned=get_device().type == "cuda"
            )
        summary = run_loop(recipe, main=main, **how, stream=stream)
    except (InputError, RunError) as error:
        ray.get(channel.fail.remote(error))
        raise
    except Exception as error:
        if again := comes_again(error, reached, context.get_world_rank(), channel):
            log = keep_error(recipe.output_dir, recipe.remote, error)
            ray.get(channel.fail.remote(RunError(f"{again}\nThe full error is in {log}.")))
        raise
    if summary["status"] == PREEMPTED:
        raise Preempted()


def run_loop(recipe: Recipe, *, main: bool, **how: Any) -> dict:
    """The training loop; on the main rank with the run's folder locked, and copied to its bucket if it has one."""
    report = how["report"]

    def tell(text: str) -> None:
        report(Notice(text))

    for package in recipe.plugins:
        load_plugin(package)
    with contextlib.ExitStack() as run:
        run.enter_context(in_plain_words(recipe))
        if recipe.remote:
            if not main:
                _all_ranks()  # until rank 0 has sent what its node alone had
            fetch = partial(pull, recipe.remote, recipe.output_dir)
            patiently(
                fetch, recipe.remote, tell, doing="read", passing=storage_may_return, stop=how["should_stop"]
            )
        if main:
            run.enter_context(lock(recipe.output_dir, run=recipe.context.run))
            save_options(recipe)
            if recipe.remote:
                how["report"] = run.enter_context(_copied(recipe, how["report"], tell, how["should_stop"]))
                _all_ranks()
        return loop.train(recipe, **how)


@contextlib.contextmanager
def _copied(
    recipe: Recipe,
    report: Callable[[Event], None],
    tell: Callable[[str], None],
    should_stop: Callable[[], str],
) -> Iterator[Callable[[Event], None]]:
    """Keep a copy of the run in its bucket; yields what to report to instead."""
    assert recipe.remote is not None
    with mirrored(recipe.remote, recipe.output_dir, tell, recipe.context.run, stop=should_stop) as mirror:

        def report_and_send(event: Event) -> None:
            report(event)
            if isinstance(event, Saved):
                mirror.changed()

        yield report_and_send


def _all_ranks() -> None:
    """Wait for all workers, where there are several."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        ray.train.collective.barrier()


def train_here(recipe: Recipe, report: Callable[[Event], None], should_stop: Callable[[], str]) -> dict:
    """Ray Train's local mode: one worker, which is this process. Returns the run's summary."""
    summary: dict = {}

    def worker() -> None:
        nonlocal summary
        device = recipe.lerobot.policy.device
        summary = run_loop(recipe, main=True, device=device, report=report, should_stop=should_stop)

    TorchTrainer(worker, scaling_config=ScalingConfig(num_workers=0)).fit()
    return summary
