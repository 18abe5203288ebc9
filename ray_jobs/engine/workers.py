"""Ray Train around the loop: one run in this process, or on workers of a cluster."""

import contextlib
import fcntl
import json
import os
import pickle
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.engine.cluster import Share
from ray_jobs.engine.console import no_garbage_collection, quiet
from ray_jobs.engine.errors import PREEMPTED, InputError, RunError

if TYPE_CHECKING:
    from ray_jobs.engine.recipe import Recipe

ERROR_LOG = "error.log"
LOCK_FILE = ".lock"
MARK_FILE = ".driver"  # what tells workers that they see the driver's folder
LOCK_WAIT_S = 30  # a killed run's last worker may take a moment to die
CUT_OFF_S = 300  # on a node that is cut off it ends itself after two minutes (see `watchdog`); NFS then frees its lock
# Of workers for one that validates or waits for storage; who hangs is found by the `watchdog`.
LONGEST_WAIT_S = 6 * 3600
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
        summary = run_loop(recipe, main=True, device=device, report=report, should_stop=should_stop)

    TorchTrainer(worker, scaling_config=ScalingConfig(num_workers=0)).fit()
    return summary


def train_on_workers(
    recipe: "Recipe", each: Share, report: Callable[[dict], None], should_stop: Callable[[], str]
) -> dict:
    """A group of `--ray.num_workers` workers on the cluster; returns the run's summary.

    Args:
        each: What each worker reserves.
        report: Called with the run's events.
        should_stop: Asked twice a second.

    Raises:
        RunError: The run has failed for good.
    """
    import ray

    from ray_jobs.engine.cluster import open_line
    from ray_jobs.engine.faults import without_line
    from ray_jobs.engine.watchdog import Watchdog

    line = open_line()
    fitting, outcome = start_fit(Training(recipe, each, line))
    watchdog = Watchdog(line, recipe.options.ray.hang_timeout)
    with without_line():
        while fitting.is_alive():
            for event in ray.get(line.hear.remote(0.5)):
                report(event)
            if hung := watchdog.look():
                report({"kind": "notice", "text": hung})
            if reason := should_stop():
                line.ask_to_stop.remote(reason)
        for event in ray.get(line.hear.remote(0)):
            report(event)
        return summary_of(recipe, line, outcome)


class Training:
    """Ray Train's trainer, and another one when its controller dies, since Ray Train 2.60 starts workers again, but not the
    process that does so; or when it has given up a run that had got on: `--ray.max_failures` is for one that does not, and
    not for a week on spot nodes."""

    def __init__(self, recipe: "Recipe", each: Share, line):
        self.recipe, self.each, self.line = recipe, each, line

    def fit(self) -> None:
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError
        from ray.train import ControllerError, WorkerGroupError

        from ray_jobs.engine.faults import of_a_loss, why

        most, losses, known = self.recipe.options.ray.max_failures, 0, 0
        while True:
            _give_back()
            try:
                make_trainer(self.recipe, self.each, self.line, max(most - losses, -1)).fit()
                return
            except (RayActorError, OutOfMemoryError, WorkerGroupError, ControllerError) as error:
                told, _ = ray.get(self.line.losses.remote())
                text = "the run's controller was lost"
                if isinstance(error, WorkerGroupError):  # which the `faults.Witness` has told
                    text = None
                elif isinstance(error, ControllerError):
                    if not of_a_loss(error.controller_failure):
                        raise
                    # Of those that are lost while workers start the witness does not hear.
                    text = f"a worker was lost ({why(error)})" if told == known else None
                if text:
                    ray.get(self.line.tell.remote({"kind": "fault", "text": text}))
                    self.line.forget_beats.remote()
                known, losses = ray.get(self.line.losses.remote())
                if losses > most >= 0 or ray.get(self.line.why_failed.remote()):
                    raise
            # One that could not end its workers is known to be dead only when the next has begun to wait for their room.
            late = threading.Timer(10, _give_back_if_it_can)
            late.daemon = True
            late.start()


def _give_back_if_it_can() -> None:
    with contextlib.suppress(Exception):  # the run may be over, and its connection to Ray
        _give_back()


def _give_back() -> None:
    """Remove what controllers that are dead have reserved for their workers, or have asked for: Ray keeps it as long as the
    driver lives, and Ray Train's own cleaner comes too late for what had not started yet. Who has made a placement group
    is not in Ray 2.60's public table of them."""
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()
    table = state._connect_and_get_accessor().get_placement_group_table()
    for row in map(PlacementGroupTableData.FromString, table):
        if ray.ActorID(row.creator_actor_id).is_nil():
            continue  # made by the driver, as those of a search's slots are, for which Ray says "dead" as well
        dead = row.creator_actor_dead and row.creator_job_id.hex() == job
        if dead and row.state != PlacementGroupTableData.REMOVED:
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(row.placement_group_id)))


def make_trainer(recipe: "Recipe", each: Share, line, max_failures: int):
    """A `TorchTrainer` that runs the recipe on `--ray.num_workers` workers.

    Args:
        each: What each worker reserves.
        line: Handle of a `cluster.Line`, which will carry the run's events and the wish to stop it.
        max_failures: How often workers are replaced, -1 for ever.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from ray_jobs.engine.faults import Witness

    options = recipe.options.ray
    if not recipe.remote:
        recipe.mark = mark_of(recipe.output_dir)
    datasets = {}
    if recipe.options.data.source == "stream":
        from ray_jobs.engine import stream_reader

        datasets["train"] = stream_reader.source_of(recipe)
    return TorchTrainer(
        _worker,
        datasets=datasets,
        # As bytes: Ray's controller would import LeRobot to hold the recipe itself.
        train_loop_config={"recipe": pickle.dumps(recipe), "line": line},
        torch_config=TorchConfig(timeout_s=LONGEST_WAIT_S),
        scaling_config=ScalingConfig(
            num_workers=(options.min_workers, options.num_workers)
            if options.min_workers
            else options.num_workers,
            use_gpu=each.gpus > 0,
            resources_per_worker=each.resources,
            placement_strategy=options.placement.upper(),
        ),
        run_config=RunConfig(
            name=".ray",
            storage_path=str(recipe.output_dir),
            # A node that is taken away is no failure: Ray Train counts those apart, and takes up the run for ever.
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[Witness(line)],
            worker_runtime_env={
                "env_vars": each.env | {k: os.environ[k] for k in HANDED_ON if k in os.environ}
            },
        ),
    )


def mark_of(folder: Path) -> str:
    """What tells processes of other nodes that they see this very folder (see `check_node`)."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK_FILE
    if not mark.is_file():
        mark.write_text(uuid.uuid4().hex)
    return mark.read_text()


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

    if error := ray.get(line.why_failed.remote()):
        raise error if isinstance(error, RunError) else RunError(str(error))
    if isinstance(outcome.get("error"), InputError | RunError):
        raise outcome["error"]
    if "error" in outcome:
        raise RunError(_explain(outcome["error"], recipe))
    if recipe.remote:
        from ray_jobs.engine.mirror import read_file
        from ray_jobs.engine.patience import patiently, storage_may_return

        read = partial(read_file, recipe.remote, SUMMARY_FILE)
        quietly = lambda text: None  # noqa: E731
        return json.loads(patiently(read, recipe.remote, quietly, doing="read", passing=storage_may_return))
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
        from ray_jobs.engine import watchdog
        from ray_jobs.engine.faults import Preempted

    recipe, line = pickle.loads(config["recipe"]), config["line"]
    if ray.get(line.why_failed.remote()):
        return  # Ray has started this worker in place of one that knew better
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

    def report(event: dict) -> None:
        hear(event)
        tell(event)
        if event["kind"] == "eval":
            ray.train.report({k: v for k, v in event.items() if isinstance(v, int | float)})

    asked_to_stop = listen_for_stop(line)

    def should_stop() -> str:
        return asked_to_stop() or (PREEMPTED if _preempted() else "")

    how = {"device": str(get_device()), "report": report, "should_stop": should_stop}
    try:
        stream = None
        if recipe.options.data.source == "stream":
            from ray_jobs.engine import stream_reader

            stream = stream_reader.epochs(
                recipe, ray.train.get_dataset_shard("train"), pinned=get_device().type == "cuda"
            )
        summary = run_loop(recipe, main=main, **how, stream=stream)
    except (InputError, RunError) as error:
        ray.get(line.fail.remote(error))
        raise
    if summary["status"] == PREEMPTED:
        raise Preempted()


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

    from ray_jobs.engine.bucket import is_uri

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


def _preempted() -> bool:
    """Whether one of the run's nodes will be taken away. Ray's public call for it is a barrier for all ranks; the loop
    agrees on a step to stop at by itself, so this looks at what Ray Train 2.60 has told this worker."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


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

    from ray_jobs.engine import loop
    from ray_jobs.engine.faults import in_plain_words
    from ray_jobs.engine.mirror import pull
    from ray_jobs.engine.patience import patiently, storage_may_return

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
            patiently(fetch, recipe.remote, tell, doing="read", passing=storage_may_return)
        if main:
            run.enter_context(lock(recipe.output_dir, run=recipe.run))
            recipe.save_options()
            if recipe.remote:
                how["report"] = run.enter_context(_copied(recipe, how["report"], tell))
                _all_ranks()
        return loop.train(recipe, **how)


@contextlib.contextmanager
def _copied(
    recipe: "Recipe", report: Callable[[dict], None], tell: Callable[[str], None]
) -> Iterator[Callable[[dict], None]]:
    """Keep a copy of the run in its bucket; yields what to report to instead."""
    from ray_jobs.engine.mirror import mirrored

    with mirrored(recipe.remote, recipe.output_dir, tell, recipe.run) as mirror:

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
def lock(output_dir: Path, wait_s: float = LOCK_WAIT_S, run: str = "") -> Iterator[None]:
    """Hold a run's folder: two runs must never write into one. Ends with the process, however it ends.

    Args:
        run: Tells this run from others. For a worker of the same run, on a node that was cut off, is waited longer.

    Raises:
        RunError: Somebody else holds it, after `wait_s` seconds still.
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
                wait = CUT_OFF_S if run and file.read() == run else wait_s
                if time.monotonic() - begin > wait:
                    raise RunError(f"another run is writing into {output_dir}.") from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(run)
        file.flush()
        yield


def _explain(error: Exception, recipe: "Recipe") -> str:
    """Why Ray Train gave up, in two lines; the whole story goes into the run's error.log."""
    from ray_jobs.engine.faults import describe

    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = min(failures.items())
    log = recipe.output_dir / ERROR_LOG
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(traceback.format_exception(cause)))
    if recipe.remote:
        from ray_jobs.engine import mirror

        mirror.send(recipe.remote, ERROR_LOG, log)
    return f"{describe(failures)}, and that for good.\nThe full error is in {log}."
