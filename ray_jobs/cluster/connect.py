"""Ray for the jobs: start or join a cluster, see what it can give.

Import it before Ray, which reads its environment once. Only light imports at the top: jobs start Ray while they
are still importing torch and LeRobot.
"""

import concurrent.futures.thread  # noqa: F401  (its fork hooks must not appear while Ray is being forked off)
import contextlib
import math
import os
import re
import sys
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.cli import environment
from ray_jobs.cluster import ray_internals
from ray_jobs.config.errors import InputError, RunError

# For Ray Train's controller and workers.
TRAIN_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # its 2 s would hold up the end of every run
}
# For a cluster of our own. Nobody preempts its one node, nor watches its tasks and metrics, for which every process of
# Ray wakes up every second: of an ACT step on two cores, 5 %. (Nor its dashboard: eleven processes less.)
OWN_CLUSTER_ENV = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_event_stats": "0",
}
# For processes that train on CPUs. glibc gives large blocks back at every free and the kernel must clear them again
# for the next step: of an ACT step on two cores, keeping them saves 10 % in float32 and 15 % in bfloat16.
CPU_WORKER_ENV = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

# Ray reads these while it is imported.
os.environ.update(TRAIN_ENV)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a FutureWarning
# Under `uv run`, Ray would copy this folder and build an environment of its own for the workers. The nodes have
# theirs.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# At SIGTERM, Ray's handler would print its stack, hand on to ours, and abort the process 3 s later, in the middle of
# what is saved. (Python's faulthandler, which Ray enables, still tells of crashes.)
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread that outlives `leave` must not start another Ray

GPU_DEVICE = Path("/dev/nvidiactl")  # is there where a GPU is
NODE_GROUP = "ray.io/node-group"  # Ray's label of a node that an autoscaler or launcher has started
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` leaves its file on the head node
LEAVES_WITHIN_S = 5  # while it is still being started or joined
ANSWERS_WITHIN_S = 10  # a cluster, when asked whether it is there
UNLIMITED = 100  # nodes of a group without a limit that are reckoned with

_ready: Future | None = None  # set once this process has begun to connect


def start(address: str | None) -> Future:
    """Start or join Ray in the background; once, whoever asks again gets the same answer.

    Args:
        address: `local`, `auto`, an address, or None: `RAY_ADDRESS` (set inside `ray job submit`), else a
            cluster running on this machine, else a new one. A head that is there and silent is refused all the same: beside
            one that is overloaded, a second Ray would make it worse.

    Returns:
        A future of None; its `result()` raises InputError if the cluster cannot be reached, RunError if none can be started.
    """
    global _ready
    flag, place = "--ray.address", address
    if address in (None, "auto") and os.environ.get("RAY_ADDRESS"):
        flag, place = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    asked = None if place is None else f"{flag}={place}"
    if place not in (None, "auto", "local") and not re.fullmatch(r"[^/]+:\d+", place):
        raise InputError(
            f"{asked}: must be the host:port of a cluster, `auto` or `local`. `ray job submit` takes the http:// "
            "address of one elsewhere and runs the command there."
        )
    if _ready is not None:
        return _ready
    done = _ready = Future()

    def connect(again: bool = False) -> None:
        debug = bool(os.environ.get("RAY_JOBS_DEBUG"))
        how = {
            "logging_level": "CRITICAL",
            "log_to_driver": debug,
            "include_dashboard": False,  # of a cluster that is started; those that are joined have theirs
        }
        found = None
        try:
            import ray

            found = "not looked for yet"
            found = _find(address, required=bool(asked))
            # A cluster that is started here hands its environment down to all of its processes.
            given = {} if found else dict(OWN_CLUSTER_ENV)
            if not found:
                environment.prepare_for_ray()
            if not GPU_DEVICE.exists():
                # Ray Tune has no place for the environment of the processes that trials run in. (On a cluster that
                # is joined, trainings have it, trials not.)
                given |= CPU_WORKER_ENV
            for name, value in given.items():
                os.environ.setdefault(name, value)
            with contextlib.nullcontext() if found else ray_internals.loopback_only():
                # Not `found`: Ray looks for a token of its own accord only where it looks for the address.
                ray.init(address=address if found else "local", **how)
            if not debug:
                ray_internals.silence_raylet()
        except Exception as error:
            if not found and not again:  # its own time-outs are short for a busy machine
                with contextlib.suppress(Exception):
                    ray.shutdown()
                # In a thread of its own: what has been started ends with this one, see below.
                return threading.Thread(target=connect, args=(True,), daemon=True).start()
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            told = (
                f"Ray does not start here, tried twice: {reason}\n"
                "`ray start --head` shows why, or starts one to join."
            )
            if found:
                where = asked or "the address that `ray start` has left"
                told = (
                    f"cannot reach Ray at {where}: {reason}\nIs it running there (port 6379 as a rule; 8265 is the "
                    "dashboard's), and has this shell its token (RAY_AUTH_MODE=token; RAY_AUTH_TOKEN or "
                    "~/.ray/auth_token)? --ray.address=local starts one for this run alone."
                )
            done.set_exception((InputError if found else RunError)(told))
        else:
            done.set_result(None)
            # Linux ends Ray's processes with the thread that started them (PR_SET_PDEATHSIG).
            threading.Event().wait()

    threading.Thread(target=connect, daemon=True).start()
    return done


def _find(address: str | None, required: bool) -> str | None:
    """Where the cluster is that `ray.init` shall join for such an address, `host:port`; None: it shall start one.

    Ray itself (2.60) tries for 14 minutes where no Ray answers: with a mistyped address, the dashboard's port, or the
    note that a `ray start` has left.

    Raises:
        ConnectionError: There is none, though one is `required`.
        ValueError: Not an address.
    """
    import grpc
    from ray.exceptions import AuthenticationError

    found = ray_internals.address_to_join(address)
    if found is None:
        return None
    try:
        ray_internals.ask_whether_alive(found, ANSWERS_WITHIN_S)
    except AuthenticationError:
        pass  # without the token that this shell shall have: `ray.init` says it
    except grpc.RpcError as error:
        another = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED)
        if another and not required:
            return None
        if another or error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            reason = (error.details() or "").rsplit(": ", 1)[-1].rstrip("]")
            raise ConnectionError(f"no Ray answers at {found} ({reason})") from error
        # The others are answers, that it wants a token for example, which `ray.init` may find.
    return found


def leave() -> None:
    """Disconnect from Ray, once connecting has ended one way or the other; ends a cluster of our own.

    Raises:
        TimeoutError: It does not end: a Ray that is started waits for parts of it that a SIGTERM to all of this command's
            processes (`timeout`'s, a batch system's) has ended, 60 s and then once more.
    """
    if _ready is not None:
        _ready.exception(LEAVES_WITHIN_S)
        if ray := sys.modules.get("ray"):
            ray.shutdown()


@dataclass
class Share:
    """Resources of each training worker."""

    cpus: float
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}

    @property
    def env(self) -> dict[str, str]:
        return TRAIN_ENV if self.gpus else TRAIN_ENV | CPU_WORKER_ENV

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs, {self.gpus:g} GPUs"


def share(
    num_workers: int,
    cpus: int | None,
    gpus: float | None,
    device: str | None,
    *,
    decoders: bool = False,
    at_least: int | None = None,
    alone: bool = False,
    asked: str = "--ray.num_workers",
) -> Share:
    """Decide what each worker reserves, and refuse what the cluster can never give.

    Args:
        num_workers: Workers of the run, at least 1.
        cpus, gpus: What the user asked for per worker, or None.
        device: The recipe's `--policy.device`, or None.
        at_least: Workers that must find room, if not all.
        decoders: Whether CPUs must be left for tasks that decode: half of them are.
        alone: Whether each works by itself; several may then share a GPU.
        asked: The flag that says how many workers.

    Raises:
        InputError: Not even an empty cluster has room; lists what there is.
    """

    have = nodes()
    node_cpus = [int(node.get("CPU", 0)) for node in have]
    node_gpus = [node.get("GPU", 0) for node in have]
    if gpus is None:
        allowed = device is None or device.startswith("cuda")
        gpus = 1.0 if allowed and sum(node_gpus) else 0.0
    if gpus % 1 and num_workers > 1 and not alone and device != "cpu":
        raise InputError(
            f"{asked}={num_workers} with {gpus:g} GPUs each: NCCL takes a GPU once, so workers that train together "
            "need whole ones. On one GPU, one worker with a larger --batch_size does the same."
        )
    typed = cpus is not None
    if cpus is None:
        every = range(len(have))
        hosts = [n for n in every if node_gpus[n] >= gpus and node_cpus[n]] or list(every)
        per_host = math.ceil(num_workers / len(hosts))
        fewest = min(node_cpus[n] for n in hosts)
        cpus = max(1, fewest // per_host)
        if decoders:
            cpus = fewest // (2 * per_host) or 0.5
        if gpus:
            cpus = min(cpus, 8)
    room = room_for(Share(cpus, gpus))
    if room < (at_least or num_workers) and not may_grow():
        alike = Counter(f"{c} CPUs, {g:g} GPUs" for c, g in zip(node_cpus, node_gpus, strict=True))
        listed = "; ".join(f"{count} x {what}" if count > 1 else what for what, count in alike.items())
        raise InputError(
            f"{asked}={num_workers} with {cpus:g} CPUs and {gpus:g} GPUs each: this cluster has room for "
            f"{room}. It has {len(have)} node(s): {listed}."
        )
    if decoders and sum(node_cpus) - num_workers * cpus < 1 and not may_grow():
        raise InputError(
            f"--data.source=stream: {num_workers} workers with {cpus:g} CPUs each leave none of the cluster's "
            f"{sum(node_cpus)} to decode. {'Leave --ray.cpus_per_worker out' if typed else 'Fewer workers will do'}."
        )
    return Share(cpus, gpus)


def room_for(each: Share, *, now: bool = False) -> int:
    """How many processes with such a share the cluster's nodes hold; `now`, without those that may be added."""
    import ray

    room = 0
    for node in [n["Resources"] for n in ray.nodes() if n["Alive"]] if now else nodes():
        cpus, gpus = int(node.get("CPU", 0)) // each.cpus, math.inf
        if each.gpus:
            gpus = node.get("GPU", 0) / each.gpus + 1e-9  # three thirds are one
        room += int(min(cpus, gpus))
    return room


def nodes() -> list[dict[str, float]]:
    """Resources of every node that the cluster has, and of those that its autoscaler may add."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    running = Counter(node["Labels"].get(NODE_GROUP) for node in alive)
    more = [held for name, held, most in _groups() for _ in range(most - running[name])]
    return [node["Resources"] for node in alive] + more


def may_grow() -> bool:
    """Whether an autoscaler may add nodes that `nodes` does not know of: it runs elsewhere (KubeRay's), or the
    driver does."""
    import ray

    return not _groups() and any(NODE_GROUP in node["Labels"] for node in ray.nodes())


def _groups() -> list[tuple[str, dict[str, float], int]]:
    """Node groups of an autoscaler: name, resources of a node, nodes at most.

    Ray 2.60 has a place for them in its state, which `ray up` leaves empty; what it leaves is its file on the head
    node, where `ray job submit` runs the driver.
    """
    import ray
    import yaml

    if (told := ray_internals.node_groups()) is not None:
        return [(name, held, UNLIMITED if most == -1 else most) for name, held, most in told]
    file = BOOTSTRAP.expanduser()
    if not file.is_file() or not any(NODE_GROUP in node["Labels"] for node in ray.nodes()):
        return []
    content = yaml.safe_load(file.read_text())
    groups, left = [], content["max_workers"]
    kinds = content["available_node_types"].items()
    for name, kind in sorted(kinds, key=lambda item: -item[1].get("priority", 0)):
        if name != content["head_node_type"]:
            most = min(kind.get("max_workers", left), left)
            groups.append((name, kind["resources"], most))
            left -= most
    return groups
