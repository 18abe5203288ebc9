"""Train a LeRobot policy on Ray: `lerobot-train`'s flags, on one or many workers, safe against interruption.

    python -m ray_jobs.train --dataset.repo_id=me/set --dataset.root=datasets/set --policy.type=act \
        --output_dir=outputs/act --ray.num_workers=2

`--help` lists our flags, `--policy.type=act --help` LeRobot's as well.
"""

import contextlib
import fcntl
import logging
import os
import pickle
import shlex
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.engine import cluster
from ray_jobs.engine.console import Display, duration, no_garbage_collection, quiet, run_job
from ray_jobs.engine.errors import InputError, RunError
from ray_jobs.engine.options import asks_to_resume, parse_options, read_flags

if TYPE_CHECKING:
    from ray_jobs.engine.recipe import Recipe

ERROR_LOG = "error.log"
LOCK_FILE = ".lock"
LOCK_WAIT_S = 30  # a killed run's last worker may take a moment to die


def main(argv: list[str]) -> int:
    """Resolve the recipe, start or join Ray, train, and say how it ended. Returns the exit status."""
    quiet()
    if {"--help", "-h"} & set(argv):
        return _help(argv)
    _start_ray(argv)
    with no_garbage_collection():
        from ray_jobs.engine import preflight
        from ray_jobs.engine.recipe import resolve

    recipe = resolve(argv)
    preflight.check(recipe)
    display = Display()
    for notice in recipe.notices:
        display.say(notice)
    started = time.monotonic()
    try:
        train = _train_on_ray if recipe.options.ray.num_workers else _train_here
        summary = train(recipe, display)
    finally:
        display.close()
    _last_screen(summary, display, time.monotonic() - started)
    return 130 if summary["status"] == "interrupted" else 0


def _start_ray(argv: list[str]) -> None:
    """Let Ray start, or be joined, while this process imports LeRobot and checks the recipe; nothing is scheduled
    on it before that. A resumed run may have its options in its folder: its Ray starts later. What is wrong with
    the command line is said by `resolve`.

    Workers that import LeRobot meanwhile were 1 s faster, but a refused command then shuts Ray down under a
    thread that uses it, for which Ray 2.60 ends the process with a status of its own.
    """
    with contextlib.suppress(InputError):
        flags, _ = read_flags(argv)
        options = parse_options(flags).ray
        if options.num_workers and not asks_to_resume(flags):
            cluster.start(options.address)


# ---------------------------------------------------------------------- in this process


def _train_here(recipe, display: Display) -> dict:
    """Ray Train's local mode: one worker, which is this process."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    stop = threading.Event()

    def worker() -> None:
        nonlocal summary
        device = recipe.lerobot.policy.device
        summary = _loop(recipe, main=True, device=device, report=display.show, should_stop=stop.is_set)

    def interrupt(signum, frame) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        display.say("stopping after this step; Ctrl-C again stops at once.")
        stop.set()

    summary: dict = {}
    logging.getLogger("ray.train").setLevel(logging.ERROR)  # it has a handler of its own
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        TorchTrainer(worker, scaling_config=ScalingConfig(num_workers=0)).fit()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return summary


# ---------------------------------------------------------------------- on Ray workers


def _train_on_ray(recipe: "Recipe", display: Display) -> dict:
    """Run the loop on Ray Train's workers, show what they report, hand on Ctrl-C; returns the summary."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from ray_jobs.engine.tracking import SUMMARY_FILE, read_json

    options = recipe.options.ray
    cluster.start(options.address).result()
    each = cluster.share(options.num_workers, options.cpus_per_worker, options.gpus_per_worker, recipe.device)
    line = cluster.open_line()
    trainer = TorchTrainer(
        _worker,
        # As bytes: Ray's controller would import LeRobot to hold the recipe itself.
        train_loop_config={"recipe": pickle.dumps(recipe), "line": line},
        scaling_config=ScalingConfig(
            num_workers=options.num_workers, use_gpu=each.gpus > 0, resources_per_worker=each.resources
        ),
        run_config=RunConfig(
            name=".ray",
            storage_path=str(recipe.output_dir),
            failure_config=FailureConfig(max_failures=options.max_failures),
            worker_runtime_env={"env_vars": each.env},
        ),
    )
    outcome: dict = {}

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            outcome["error"] = error

    # In a thread, so that Ctrl-C comes to us and not to Ray Train, which would kill the workers.
    fitting = threading.Thread(target=fit, daemon=True)
    fitting.start()
    interrupts, waiting_since = 0, time.monotonic()
    while fitting.is_alive():
        try:
            for event in ray.get(line.hear.remote(0.5)):
                display.show(event)
            if not display.facts and time.monotonic() - waiting_since > 60:
                free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
                display.say(f"waiting for {options.num_workers} worker(s) with {each}; free now: {free}")
                waiting_since = time.monotonic()
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1 or not display.facts:
                raise
            display.say("stopping: the workers save a checkpoint first; Ctrl-C again stops at once.")
            line.ask_to_stop.remote()
    for event in ray.get(line.hear.remote(0)):
        display.show(event)

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

    stop = threading.Event()

    def wait_for_stop() -> None:
        with contextlib.suppress(Exception):  # the driver is gone: Ray ends this process
            ray.get(line.stop_asked.remote())
            stop.set()

    threading.Thread(target=wait_for_stop, daemon=True).start()
    told_at = 0.0

    def report(event: dict) -> None:
        nonlocal told_at
        if main and (event["kind"] != "step" or time.monotonic() - told_at > 0.5):
            told_at = time.monotonic()
            line.tell.remote(event)
        if event["kind"] == "eval":
            ray.train.report({k: v for k, v in event.items() if isinstance(v, int | float)})

    try:
        _loop(recipe, main=main, device=str(get_device()), report=report, should_stop=stop.is_set)
    except (InputError, RunError) as error:
        ray.get(line.fail.remote(str(error)))
        raise


def _loop(recipe: "Recipe", *, main: bool, **how) -> dict:
    """The training loop, with the models it starts from at hand and, on the main rank, the run's folder locked."""
    from lerobot.configs.parser import load_plugin

    from ray_jobs.engine import assets, loop

    for package in recipe.plugins:
        load_plugin(package)
    assets.mount(recipe.options.assets.dir, recipe.lerobot.policy, weights=True)
    with _lock(recipe.output_dir) if main else contextlib.nullcontext():
        if main:
            recipe.save_options()
        return loop.train(recipe, **how)


@contextlib.contextmanager
def _lock(output_dir: Path) -> Iterator[None]:
    """Hold a run's folder: two runs must never write into one. Ends with the process, however it ends."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK_FILE).open("w") as file:
        give_up = time.monotonic() + LOCK_WAIT_S
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


# ---------------------------------------------------------------------- what the user sees


def _last_screen(summary: dict, display: Display, seconds: float) -> None:
    """Where the checkpoint is, the last and best values, and the command that continues the run."""
    done = {"finished": "done", "stopped early": "stopped early, validation no longer improves"}
    display.say(
        f"\n{done.get(summary['status'], summary['status'])}: step {summary['step']}/{summary['steps']}"
        f" in {duration(seconds)}"
    )
    last, best = summary["last"], summary["best"]
    if "train/loss" in last:
        display.say(f"loss        {last['train/loss']:.4g}, {last['train/samples_per_s']:.3g} samples/s")
    if best:
        display.say(f"best        val/action_error {best['val/action_error']:.4g} std at step {best['step']}")
    if summary["checkpoint"]:
        config = Path(summary["checkpoint"]) / "pretrained_model" / "train_config.json"
        more = "" if summary["step"] < summary["steps"] else f" --steps={2 * summary['steps']}"
        display.say(f"checkpoint  {summary['checkpoint']}")
        display.say(
            f"continue    python -m ray_jobs.train --config_path={shlex.quote(str(config))} --resume=true{more}"
        )


def _help(argv: list[str]) -> int:
    from lerobot.configs.parser import print_scoped_help
    from lerobot.configs.train import TrainPipelineConfig

    from ray_jobs.engine.options import help_text

    print(__doc__)
    print(help_text())
    if any(word.startswith("--policy.type") for word in argv):
        print_scoped_help(TrainPipelineConfig, argv)
    return 0


if __name__ == "__main__":
    run_job(main, at_end=cluster.leave)
