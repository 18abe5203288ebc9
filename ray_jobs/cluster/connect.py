"""Ray for the jobs: start or join a cluster, and leave it.

Only light imports at the top: jobs start Ray while they
are still importing torch and LeRobot.
"""

import concurrent.futures.thread  # noqa: F401  (its fork hooks must not appear while Ray is being forked off)
import contextlib
import os
import re
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

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

GPU_DEVICE = Path("/dev/nvidiactl")  # is there where a GPU is
LEAVES_WITHIN_S = 5  # while it is still being started or joined
ANSWERS_WITHIN_S = 10  # a cluster, when asked whether it is there

_ready: Future | None = None  # set once this process has begun to connect


def before_ray() -> None:
    """Set what Ray reads from the environment while it is imported. A job does so, not who imports this module: a notebook's own
    Ray is none of ours."""
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
    before_ray()
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
        how: dict[str, Any] = {
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
