"""What has happened to a worker, in the words of the person who started the run. Imported by Ray's controller: light."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import (
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.train import UserCallback

from ray_jobs.cluster import ray_train_internals
from ray_jobs.config.errors import InputError, RunError, StorageLost, no_room
from ray_jobs.config.events import Fault

if TYPE_CHECKING:
    from ray_jobs.cluster.channel import ChannelHandle
    from ray_jobs.config.recipe import Recipe

OUT_OF_MEMORY = ("memory pressure", "low on memory", "(OOM)", "memory usage threshold")  # as Ray has it
# Of workers that do not find each other: NCCL's words, and Gloo's.
NOT_CONNECTED = (
    "onnection refused",
    "Unable to find address for",
    "connectFullMesh",
    "no socket interface",
    "No route to host",
)
NETWORK = (
    "; where nodes have several networks, NCCL_SOCKET_IFNAME (on CPUs GLOO_SOCKET_IFNAME) says which one is theirs, "
    "set on every node before `ray start`"
)
ERROR_LOG = "error.log"  # in a run's folder
ORDINARY = 4  # how telling an exception of the training's own code is, see `_reason`
ADDRESS = re.compile(r"0x[0-9a-f]+")  # of an object, another one in every process
LOST_CONNECTION = (
    "onnection closed by peer",
    "onnection reset",
    "onnection was likely closed",  # and the next: the store in which the workers find each other, which rank 0 has
    "DistNetworkError: Broken pipe",
)


class Preempted(RayActorError):
    """A worker has saved a checkpoint and left, because one of the run's nodes will be taken away.

    Ray Train 2.60 would let it wait until the node is gone. For an error that says `preempted` it starts the group again
    elsewhere at once, and counts that apart from `--ray.max_failures`.
    """

    def __init__(self, message: str = "its node will be taken away"):
        super().__init__(error_msg=message, preempted=True)


class FailureCallback(UserCallback):
    """Tells a run's driver, over its channel, why workers are about to be started again."""

    def __init__(self, channel: "ChannelHandle"):
        self.channel = channel

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        announced = any(getattr(error, "preempted", False) for error in worker_exceptions.values())
        text = describe(worker_exceptions)
        self.channel.tell.remote(Fault(text, announced=announced))
        self.channel.forget_heartbeats.remote()


def describe(errors: dict[int, Exception]) -> str:
    """One line on why a group of workers ended. When one of them goes, the others fail for lack of it; what is told is
    the most telling.

    Args:
        errors: By rank.
    """
    told = sorted(((*_reason(error), rank) for rank, error in errors.items()), key=lambda item: item[0])
    kind, text, rank = told[0]
    return f"a worker {'failed' if kind == ORDINARY else 'was lost'} (rank {rank}: {text})"


def ordinary(error: Exception) -> str | None:
    """What an exception of the training's own code says, in the same words whenever it is raised; None for what a loss
    has done: of another worker, of a connection, of a node."""
    kind, text = _reason(error)
    return ADDRESS.sub("0x", text) if kind == ORDINARY else None


def comes_again(
    error: Exception, step: int | None, who: int | str, channel: "ChannelHandle"
) -> RunError | None:
    """What to give the run up with, if the same exception has come at the same step before: another try would end there,
    too. What came once may have been the node's fault.

    Args:
        step: The last one done.
        who: The rank or trial.
        channel: Handle of the `channel.Channel`, which remembers.
    """
    text = ordinary(error)
    if text is None or not ray.get(channel.came_before.remote(who, (step, text))):
        return None
    when = f"after step {step}" if step is not None else "before the first step"
    return RunError(f"{text}, twice {when}: it would come again.")


def of_a_loss(error: Exception | None) -> bool:
    """Whether it ended Ray Train's controller (2.60) though only a worker was lost, which it takes for a loss of its own
    until the training begins: one that was killed or that Ray has ended for want of memory, or one without which the
    others could not start."""
    text = str(error)
    lost = any(sign in text for sign in LOST_CONNECTION) and not any(sign in text for sign in NOT_CONNECTED)
    return isinstance(error, RayActorError | OutOfMemoryError) or lost


@contextmanager
def if_helper_dies(what: str, kept: str) -> Iterator[None]:
    """Within, a driver that loses a process of its own on the cluster (its channel to the run, say) tells why.

    Args:
        what: Which, as in "the run's helper process".
        kept: What is not lost, and how to go on.

    Raises:
        RunError: It has lost it.
        InputError: As raised in the process.
    """
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, InputError | RunError):
            raise error.cause from None
        raise
    except RayError as error:
        raise RunError(f"{what}, or its cluster, is gone: {why(error)}\n{kept}") from error


def why(error: Exception) -> str:
    """Why one process has ended."""
    return _reason(getattr(error, "cause", None) or error)[1]


def _reason(error: Exception) -> tuple[int, str]:
    """How telling an error is, the lowest first, and what it says."""
    inside: Exception = getattr(error, "controller_failure", error)
    error = ray_train_internals.health_check_failure(error) or inside
    text = str(error)
    if getattr(error, "preempted", False):
        return 0, "its node is being taken away, as was announced"
    starved = isinstance(error, OutOfMemoryError) or any(sign in text for sign in OUT_OF_MEMORY)
    if starved:
        return (
            1,
            "its node ran out of memory; fewer workers on a node, --num_workers=0 or a smaller --batch_size",
        )
    if "node" in text and any(
        sign in text for sign in ("node has died", "node was terminated", "node is dead")
    ):
        return 2, "its node is gone"
    if isinstance(error, ActorUnavailableError):  # in the first seconds after its node is gone
        return 3, "its process does not answer any more"
    if isinstance(error, RayActorError | WorkerCrashedError):
        return 3, "its process was killed"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = next(
        (line for line in lines if "CUDA error" in line), lines[-1] if lines else ""
    )  # advice follows it
    told = f"{type(error).__name__}: {last}"[:300]
    if any(sign in text for sign in NOT_CONNECTED):
        return 5, told + NETWORK
    if any(sign in text for sign in (*LOST_CONNECTION, "NCCL", "gloo")):
        return 5, f"it has lost its connection to another one, {told}"
    return ORDINARY, told


@contextmanager
def in_plain_words(recipe: "Recipe") -> Iterator[None]:
    """Within, a training whose errors another try would not mend, full disks and memory, ends with a RunError."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        if told := _for_good(error, recipe):
            raise told from error
        raise


def _for_good(error: Exception, recipe: "Recipe") -> RunError | None:
    import torch

    text = str(error)
    if no_room(error):
        place = getattr(error, "filename", None) or recipe.output_dir
        return StorageLost(
            f"no space is left for {place}. The last checkpoint is intact: make room, or lower --checkpoint.keep_last; "
            "--resume=true goes on from it."
        )
    gpu = isinstance(error, torch.OutOfMemoryError)
    if gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        memory = recipe.context.memory
        need = f"The estimate was {memory}. " if memory else ""
        less = memory.savings(recipe) if memory else "a smaller --batch_size"
        return RunError(
            f"out of {'GPU ' if gpu else ''}memory: {text.strip().splitlines()[0][:200] if text else 'MemoryError'}\n"
            f"{need}What makes it less: {less}."
        )
    return None


def keep_error(folder: Path, remote: str | None, error: BaseException) -> Path:
    """Write the whole story of an error into a run's folder; returns where."""
    log = folder / ERROR_LOG
    folder.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(traceback.format_exception(error)))
    if remote:
        from ray_jobs.storage import mirror

        mirror.send(remote, ERROR_LOG, log)
    return log
