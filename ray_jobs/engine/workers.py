"""Ray Train around the loop: one run in this process, or on workers of a cluster."""

import contextlib
import fcntl
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.engine.cluster import Share
from ray_jobs.engine.console import no_garbage_collection, quiet
from ray_jobs.engine.errors import InputError, RunError

if TYPE_CHECKING:
    from ray_jobs.engine.recipe import Recipe

ERROR_LOG = "error.log"
LOCK_FILE = ".lock"
LOCK_WAIT_S = 30  # a killed run's last worker may take a moment to die
HANDED_ON = ("WANDB_RUN_GROUP",)  # from the process that starts the workers
TELL_EVERY_S = 0.5  # how often the driver hears of steps


def train_here(recipe: "Recipe", report: Callable[[dict], None], should_stop: Callable[[], str]) -> dict:
    """Ray Train's local mode: one worker, which is this process. Returns the run's summary."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    summary: dict = {}

    def worker() -> None:
        nonlocal summary
        device = recipe.lerobot.policy.device
        summary = _loop(recipe, main=True, device=device, report=report, should_stop=should_stop)

    TorchTrainer(worker, scaling_config=ScalingConfig(num_workers=0)).fit()
    return summary


def make_trainer(recipe: "Recipe", each: Share, line):
    """A `TorchTrainer` that runs the recipe on `--ray.num_workers` workers.

    Args:
        each: What each worker reserves.
        line: Handle of a `cluster.Line`, which will carry the run's events and the wish to stop it.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    options = recipe.options.ray
    datasets = {}
    if recipe.options.data.source == "stream":
        from ray_jobs.engine import stream_reader

        datasets["train"] = stream_reader.source_of(recipe)
    return TorchTrainer(
        _worker,
        datasets=datasets,
        # As bytes: Ray's controller would import LeRobot to hold the recipe itself.
        train_loop_config={"recipe": pickle.dumps(recipe), "line": line},
        scaling_config=ScalingConfig(
            num_workers=options.num_workers, use_gpu=each.gpus > 0, resources_per_worker=each.resources
        ),
        run_config=RunConfig(
            name=".ray",
            storage_path=str(recipe.output_dir),
            failure_config=FailureConfig(max_failures=options.max_failures),
            worker_runtime_env={
                "env_vars": each.env | {k: os.environ[k] for k in HANDED_ON if k in os.environ}
            },
        ),
    )


def start_fit(trainer) -> tuple[threading.Thread, dict]:
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


def summary_of(recipe: "Recipe", line, outcome: dict) -> dict:
    """The summary of a run whose `fit` is over (see `start_fit`).

    Raises:
        RunError: Why it failed.
    """
    import ray

    from ray_jobs.engine.tracking import SUMMARY_FILE, read_json

    if reason := ray.get(line.why_failed.remote()):
        raise RunError(reason)
    if "error" in outcome:
        raise RunError(_explain(outcome["error"], recipe.output_dir))
    return read_json(recipe.output_dir / SUMMARY_FILE)


def _worker(config: dict) -> None:
    """One training worker: unpack the recipe, run the loop, report to the driver and to Ray Train."""
    quiet()
    with no_garbage_collection():
        import ray
        import ray.train
        import torch
        from ray.train.torch import get_device

        import ray_jobs.engine.loop  # noqa: F401

    recipe, line = pickle.loads(config["recipe"]), config["line"]
    if ray.get(line.why_failed.remote()):
        return  # Ray has started this worker in place of one that knew better
    context = ray.train.get_context()
    main = context.get_world_rank() == 0
    if context.get_world_size() == 1:
        os.environ.pop("LOCAL_RANK", None)  # else accelerate wraps the policy for a group of one
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    tell = teller(line) if main else lambda event: None

    def report(event: dict) -> None:
        tell(event)
        if event["kind"] == "eval":
            ray.train.report({k: v for k, v in event.items() if isinstance(v, int | float)})

    how = {"device": str(get_device()), "report": report, "should_stop": listen_for_stop(line)}
    try:
        stream = None
        if recipe.options.data.source == "stream":
            from ray_jobs.engine import stream_reader

            stream = stream_reader.epochs(
                recipe, ray.train.get_dataset_shard("train"), pinned=get_device().type == "cuda"
            )
        _loop(recipe, main=main, **how, stream=stream)
    except (InputError, RunError) as error:
        ray.get(line.fail.remote(str(error)))
        raise


def teller(line) -> Callable[[dict], None]:
    """Sends a run's events over the line; of the steps, only one now and then."""
    told_at = 0.0

    def tell(event: dict) -> None:
        nonlocal told_at
        if event["kind"] != "step" or time.monotonic() - told_at > TELL_EVERY_S:
            told_at = time.monotonic()
            line.tell.remote(event)

    return tell


_asked_to_stop: dict = {}  # line -> the reason it has told; one listening thread for each, however many trials


def listen_for_stop(line) -> Callable[[], str]:
    """The loop's `should_stop`: what the run was asked to stop for, as far as the line has told."""
    import ray

    def wait() -> None:
        with contextlib.suppress(Exception):  # the driver is gone: Ray ends this process
            _asked_to_stop[line] = ray.get(line.stop_asked.remote())

    if line not in _asked_to_stop:
        _asked_to_stop[line] = ""
        threading.Thread(target=wait, daemon=True).start()
    return lambda: _asked_to_stop[line]


def _loop(recipe: "Recipe", *, main: bool, **how) -> dict:
    """The training loop; on the main rank, with the run's folder locked."""
    from lerobot.configs.parser import load_plugin

    from ray_jobs.engine import loop

    for package in recipe.plugins:
        load_plugin(package)
    with lock(recipe.output_dir) if main else contextlib.nullcontext():
        if main:
            recipe.save_options()
        return loop.train(recipe, **how)


@contextlib.contextmanager
def lock(output_dir: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Hold a run's folder: two runs must never write into one. Ends with the process, however it ends.

    Raises:
        RunError: Somebody else holds it, after `wait_s` seconds still.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK_FILE).open("w") as file:
        give_up = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise RunError(f"another run is writing into {output_dir}.") from None
                time.sleep(0.2)
        yield


def _explain(error: Exception, output_dir: Path) -> str:
    """Why Ray Train gave up, in two lines; the whole story goes into the run's error.log."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = min(failures.items())
    log = output_dir / ERROR_LOG
    output_dir.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(traceback.format_exception(cause)))
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else type(cause).__name__
    return f"worker {rank} failed for good: {last}\nThe full error is in {log}."
