"""What a worker of a run does around the training loop: see that its node is fit, hold the run's folder, listen, report."""

import contextlib
import fcntl
import os
import pickle
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ray_jobs.cli import environment
from ray_jobs.cli.terminal import no_garbage_collection, quiet
from ray_jobs.cluster import ray_internals
from ray_jobs.config.errors import PREEMPTED, InputError, RunError
from ray_jobs.policies.lean_imports import without

if TYPE_CHECKING:
    from ray_jobs.config.recipe import Recipe

ERROR_LOG = "error.log"
LOCK_FILE = ".lock"
MARK_FILE = ".driver"  # what tells workers that they see the driver's folder
LOCK_WAIT_S = 30  # a killed run's last worker may take a moment to die
CUT_OFF_S = 300  # on a node that is cut off it ends itself after two minutes (see `watchdog`); NFS then frees its lock
TELL_EVERY_S = 0.5  # how often the driver hears of steps


def work(config: dict) -> None:
    """One training worker: unpack the recipe, run the loop, report to the driver and to Ray Train."""
    import ray

    line = config["line"]
    if ray.get(line.why_failed.remote()):
        return  # Ray has started this worker in place of one that knew better
    environment.take_over(config["paths"])
    quiet()
    line.tell.remote({"kind": "doing", "text": "a worker imports LeRobot"})
    with no_garbage_collection(), without(config["unneeded"]):
        import ray.train
        import torch
        from ray.train.torch import get_device

        import ray_jobs.training.loop  # noqa: F401
        from ray_jobs.cluster import watchdog
        from ray_jobs.cluster.faults import Preempted, comes_again

    recipe = pickle.loads(config["recipe"])
    context = ray.train.get_context()
    try:
        check_node(recipe.lerobot.dataset.root, None if recipe.remote else recipe.output_dir, recipe.mark)
    except RunError as error:
        ray.get(line.fail.remote(error))
        raise
    main = context.get_world_rank() == 0
    if context.get_world_size() == 1:
        os.environ.pop("LOCAL_RANK", None)  # else accelerate wraps the policy for a group of one
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    tell = teller(line) if main else lambda event: None
    hear = watchdog.beat(line, context.get_world_rank())

    reached = None

    def report(event: dict) -> None:
        nonlocal reached
        reached = event.get("step", reached)
        hear(event)
        tell(event)
        if event["kind"] == "eval":
            ray.train.report({k: v for k, v in event.items() if isinstance(v, int | float)})

    asked_to_stop = listen_for_stop(line)

    def should_stop() -> str:
        return asked_to_stop() or (PREEMPTED if ray_internals.node_will_be_taken() else "")

    how = {"device": str(get_device()), "report": report, "should_stop": should_stop}
    try:
        stream = None
        if recipe.options.data.source == "stream":
            from ray_jobs.cluster import stream_reader

            stream = stream_reader.epochs(
                recipe, ray.train.get_dataset_shard("train"), pinned=get_device().type == "cuda"
            )
        summary = run_loop(recipe, main=main, **how, stream=stream)
    except (InputError, RunError) as error:
        ray.get(line.fail.remote(error))
        raise
    except Exception as error:
        if again := comes_again(error, reached, context.get_world_rank(), line):
            log = keep_error(recipe.output_dir, recipe.remote, error)
            ray.get(line.fail.remote(RunError(f"{again}\nThe full error is in {log}.")))
        raise
    if summary["status"] == PREEMPTED:
        raise Preempted()


def keep_error(folder: Path, remote: str | None, error: BaseException) -> Path:
    """Write the whole story of an error into a run's folder; returns where."""
    log = folder / ERROR_LOG
    folder.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(traceback.format_exception(error)))
    if remote:
        from ray_jobs.storage import mirror

        mirror.send(remote, ERROR_LOG, log)
    return log


def mark_of(folder: Path) -> str:
    """What tells processes of other nodes that they see this very folder (see `check_node`)."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK_FILE
    if not mark.is_file() or not mark.read_text():
        mark.write_text(uuid.uuid4().hex)
    return mark.read_text()


def check_node(root: str | None, output_dir: Path | None, mark: str) -> None:
    """See that this node has the folders that the driver's has.

    Args:
        root: Of the data set.
        output_dir: Of the run or search; None for one that is copied to a bucket.
        mark: What `mark_of` gives on the driver's node.

    Raises:
        RunError: It has not.
    """
    import ray

    from ray_jobs.storage.bucket import is_uri

    where = f"on node {ray.util.get_node_ip_address()}"
    if root is not None and not is_uri(root) and not Path(root).is_dir():
        raise RunError(
            f"--dataset.root={root} is not there {where}. All nodes must see it, or it must be a bucket."
        )
    seen = output_dir and output_dir / MARK_FILE
    if seen and not (seen.is_file() and seen.read_text() == mark):
        raise RunError(
            f"--output_dir={output_dir} is not {where} what it is on the driver's node. All nodes must see the "
            "same folder, or it must be a bucket (s3://...)."
        )


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


def listen_for_stop(line, node: str | None = None) -> Callable[[], str]:
    """The loop's `should_stop`: what the run was asked to stop for, as far as the line has told.

    Args:
        node: This one, for a trial, which has nobody else to hear from that it will be taken away.
    """
    import ray

    def wait() -> None:
        with contextlib.suppress(Exception):  # the driver is gone: Ray ends this process
            while not _asked_to_stop[line]:
                _asked_to_stop[line] = ray.get(line.stop_asked.remote(node))

    if line not in _asked_to_stop:
        _asked_to_stop[line] = ""
        threading.Thread(target=wait, daemon=True).start()
    return lambda: _asked_to_stop[line]


def run_loop(recipe: "Recipe", *, main: bool, **how) -> dict:
    """The training loop; on the main rank with the run's folder locked, and copied to its bucket if it has one."""
    from lerobot.configs.parser import load_plugin

    from ray_jobs.cluster.faults import in_plain_words
    from ray_jobs.storage.mirror import pull
    from ray_jobs.storage.retry import patiently, storage_may_return
    from ray_jobs.training import loop
    from ray_jobs.training.tracking import save_options

    report = how["report"]

    def tell(text: str) -> None:
        report({"kind": "notice", "text": text})

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
            run.enter_context(lock(recipe.output_dir, run=recipe.run))
            save_options(recipe)
            if recipe.remote:
                how["report"] = run.enter_context(_copied(recipe, how["report"], tell, how["should_stop"]))
                _all_ranks()
        return loop.train(recipe, **how)


@contextlib.contextmanager
def _copied(
    recipe: "Recipe",
    report: Callable[[dict], None],
    tell: Callable[[str], None],
    should_stop: Callable[[], str],
) -> Iterator[Callable[[dict], None]]:
    """Keep a copy of the run in its bucket; yields what to report to instead."""
    from ray_jobs.storage.mirror import mirrored

    with mirrored(recipe.remote, recipe.output_dir, tell, recipe.run, stop=should_stop) as mirror:

        def report_and_send(event: dict) -> None:
            report(event)
            if event["kind"] == "checkpoint":
                mirror.changed()

        yield report_and_send


def _all_ranks() -> None:
    """Wait for all workers, where there are several."""
    import torch.distributed

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        import ray.train.collective

        ray.train.collective.barrier()


@contextlib.contextmanager
def only_driver(output_dir: Path) -> Iterator[None]:
    """Be the one command that runs, or searches, in a folder. Who else tries is told at once: a driver that was killed
    holds nothing any more, whatever its workers may still do (see `lock`).

    Raises:
        RunError: There is another one.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / MARK_FILE).open("a") as file:
        _take(file, output_dir)
        yield


def refuse_busy(flags: dict[str, str]) -> None:
    """See that no other command is at work in the folder that these flags mean; before anything is imported for it.

    Raises:
        RunError: There is one.
    """
    folders: Sequence[Path] = ()
    if "output_dir" in flags:
        folders = [Path(flags["output_dir"])]
    elif (
        "config_path" in flags
    ):  # <run>/checkpoints/<step>/pretrained_model/train_config.json, or the last folder of that
        folders = Path(flags["config_path"]).absolute().parents[2:4]
    for folder in folders:
        with contextlib.suppress(OSError), (folder / MARK_FILE).open("r+") as file:
            _take(file, folder)


def _take(file: IO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"another run is writing into {folder}.") from None


@contextlib.contextmanager
def lock(output_dir: Path, run: str = "") -> Iterator[None]:
    """Hold a run's folder: two workers must never write into one. Ends with the process, however it ends.

    Args:
        run: Tells this run from others. For a worker of the same run, on a node that was cut off, is waited longer.

    Raises:
        RunError: Somebody else holds it still, after a while.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK_FILE).open("a+") as file:
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                wait = CUT_OFF_S if run and file.read() == run else LOCK_WAIT_S
                if time.monotonic() - begin > wait:
                    raise RunError(f"another run is writing into {output_dir}.") from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(run)
        file.flush()
        yield
