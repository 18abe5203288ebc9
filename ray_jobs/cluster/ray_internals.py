"""All of Ray that is used here and is not public: what for, and which public way is missing.

Seen in Ray 2.60. At the next version `tests/test_ray_internals.py` tells which name has gone, and which workaround is no longer
needed. Ray is imported within the functions, for nothing here may cost a command time that does not start Ray, and some of this
is called before Ray's other parts may be imported (see `connect.start`).
"""

import atexit
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Ray's resource of the head node, of which there is plenty. Its name is in `ray._common.constants`; Ray Train writes it out, too.
HEAD_NODE = "node:__internal_head__"
# What `ray job submit` sets for the command that it runs. Nothing public tells a driver that it was submitted.
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# ---------------------------------------------------------------------- starting and joining


def address_to_join(address: str | None) -> str | None:
    """The `host:port` that `ray.init` would join for such an address; None: it would start a cluster.

    Missing: asking that without joining. No issue found.
    """
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address(address)


def ask_whether_alive(address: str, timeout_s: float) -> None:
    """Ask a cluster whether it is there.

    Missing: a time limit of `ray.init`, which tries for 14 minutes (https://github.com/ray-project/ray/issues/46863, closed
    without one).

    Raises:
        grpc.RpcError: It is not, or does not answer in time, or answers something else.
        ray.exceptions.AuthenticationError: This process has no token.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    with init_grpc_channel(address, GLOBAL_GRPC_OPTIONS) as channel:
        NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=timeout_s)


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Within, a Ray that is started is to be reached from this machine alone. Ray does so on macOS and Windows, by a constant
    (https://github.com/ray-project/ray/issues/18730).

    Missing: an argument of `ray.init`. The environment variable for it is read while Ray is imported, and would hold for
    clusters that are joined, too.
    """
    from ray._private import ray_constants

    usual = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


def silence_raylet() -> None:
    """Keep Ray from printing a paragraph for every process that dies, and the end of its log for every node: a run tells of a
    lost worker in one line.

    Missing: a switch. `log_to_driver=False` does not reach them (https://github.com/ray-project/ray/issues/28216 is open for
    workers' errors; none found for the raylet's). This one is its debugger's.
    """
    import ray

    ray._private.worker._worker_logs_enabled = False


# ---------------------------------------------------------------------- what the cluster knows


def draining_nodes() -> set[str]:
    """Ids of nodes that will be taken away, as somebody has announced to Ray.

    Missing: asking it outside of Ray Train's workers; `ray.nodes()` does not tell. No issue found; Ray Train asks here, too.
    """
    from ray._private.state import state

    return set(state.get_draining_nodes())


def node_groups() -> list[tuple[str, dict[str, float], int]] | None:
    """Node groups that an autoscaler has told Ray of: name, resources of a node, nodes at most (-1: no limit). None: it has
    told nothing.

    Missing: https://github.com/ray-project/ray/issues/37838 and https://github.com/ray-project/ray/issues/52033.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is None:
        return None
    return [(group.name, dict(group.resources), group.max_count) for group in config.node_group_configs]


# ---------------------------------------------------------------------- Ray Train


def give_back_orphaned_room() -> None:
    """Remove what controllers that are dead have reserved for their workers, or have asked for: Ray keeps it as long as the
    driver lives, and Ray Train's own cleaner comes too late for what had not started yet.

    Missing: placement groups that end with the actor that has made them (https://github.com/ray-project/ray/issues/65881; of
    the cleaner, https://github.com/ray-project/ray/issues/62753).
    """
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup

    for row in _reserved():
        if row.creator_actor_dead and row.state != PlacementGroupTableData.REMOVED:
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(row.placement_group_id)))


def has_room() -> bool:
    """Whether the workers have what was asked for them, and are but to start in it."""
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    return any(
        row.state == PlacementGroupTableData.CREATED and not row.creator_actor_dead for row in _reserved()
    )


def _reserved() -> list:
    """Rows of Ray's table of placement groups that this driver's controllers have made.

    Missing: who has made one, in `ray.util.placement_group_table()`. No issue found.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job = ray.get_runtime_context().get_job_id()
    table = state._connect_and_get_accessor().get_placement_group_table()
    rows = map(PlacementGroupTableData.FromString, table)
    # Those made by the driver, as those of a search's slots are, are left out: Ray says "dead" for them as well.
    return [r for r in rows if r.creator_job_id.hex() == job and not ray.ActorID(r.creator_actor_id).is_nil()]


def torch_trainer(**arguments):
    """A `TorchTrainer` with fewer actors: each is a process that takes 2 s of a processor while the workers start. Without data
    sets of Ray Data's nothing of Ray Data is started or imported, and nobody but `give_back_orphaned_room` looks after the
    room of a dead controller.

    Missing: a way to leave them out. No issue found.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list:
            unused = (
                PlacementGroupCleanerCallback
                if self.datasets
                else (PlacementGroupCleanerCallback, DatasetsCallback)
            )
            return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]

    return Trainer(**arguments)


def node_will_be_taken() -> bool:
    """Whether one of the run's nodes will be taken away, as Ray Train has told this worker.

    Missing: asking it alone. `ray.train.get_preemption_info` is a barrier for all ranks
    (https://github.com/ray-project/ray/pull/65183); the loop agrees on a step to stop at by itself.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def health_check_failure(error: Exception) -> Exception | None:
    """What Ray Train has found wrong with a worker, if that is what this error is about.

    Missing: it is in the error's text alone, or in this attribute of an internal class. No issue found.
    """
    return getattr(error, "health_check_failure", None)


def end_at_lost_start():
    """A callback for Ray Train's trainer that ends a run's controller when a worker is lost while they start: the driver tells
    and counts it, and begins with another.

    Ray Train would start them again without a word and without end, since it does not count that as a failure. Of those that
    were finding each other it would also forget the others, which hold the room of the next until the process group's
    time-out.

    Missing: `FailureConfig(controller_failure_limit=0)` would also give up waiting for room, which is counted with these
    (https://github.com/ray-project/ray/pull/54833); a `UserCallback` hears of neither. The trainer takes internal callbacks,
    too.
    """
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Starting(ControllerCallback):
        def after_controller_state_update(self, previous_state, current_state) -> None:
            error = getattr(current_state, "training_failed_error", None)
            failure = getattr(error, "controller_failure", None)
            if isinstance(failure, WorkerGroupStartupFailedError):
                raise failure.__cause__

    return Starting()


def exit_quickly():
    """A callback for Ray Train's trainer that has the process of a run's controller end when the run has.

    Ray clears up its C++ objects on the way out, after it has taken leave of its raylet, and may wait for a lock of its own
    there for ever (https://github.com/ray-project/ray/issues/52322): about one run in ten left a process of 800 MB behind that
    nobody knew of.

    Missing: such a hook of `UserCallback` (https://github.com/ray-project/ray/issues/64252).
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class QuickExit(ControllerCallback):
        def after_controller_start(self, train_run_context) -> None:
            atexit.register(os._exit, 0)

    return QuickExit()


# ---------------------------------------------------------------------- Ray Tune


def survive_memory_kills() -> None:
    """Let Ray Tune take a trial whose process Ray has ended for want of memory for one whose process was killed. Ray Tune ends
    the search instead, since `OutOfMemoryError` is no `RayActorError`.

    Missing: anything that reaches what looks after Ray Tune's actors. No issue found.
    """
    from ray.air.execution._internal import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.tune.execution import tune_controller

    def as_killed(error: Exception) -> Exception:
        return RayActorError(error_msg=str(error)) if isinstance(error, OutOfMemoryError) else error

    class Manager(RayActorManager):
        def _actor_start_failed(self, tracked_actor, exception: Exception) -> None:
            super()._actor_start_failed(tracked_actor, as_killed(exception))

        def _actor_task_failed(self, tracked_actor_task, exception: Exception) -> None:
            super()._actor_task_failed(tracked_actor_task, as_killed(exception))

    tune_controller.RayActorManager = Manager


def keep_keys_out_of_logs() -> None:
    """Keep Ray Tune from copying four keys of AWS from the driver into its actors' runtime environment, which Ray writes into
    its logs. Keys are every node's own.

    Missing: a way to say what is copied, or a runtime environment whose values are not logged
    (https://github.com/ray-project/ray/issues/28276).
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if "AWS" in name}


def error_of(trial) -> Exception:
    """The last error of one of Ray Tune's trials.

    Missing: `Trial.get_pickled_error` reads a copy that lags behind; the file is here. No issue found.

    Raises:
        Exception: It has none, or one that cannot be read.
    """
    from ray import cloudpickle

    return cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())


def drop(tune_controller, trial, result: dict) -> None:
    """End one of Ray Tune's trials that has not begun, with this result: of an empty one Ray Tune prints a line.

    Missing: a scheduler can stop a trial that reports, not one that waits. No issue found.
    """
    trial.run_metadata.last_result = result
    tune_controller.stop_trial(trial)


def allow_failures(trial, more: int) -> None:
    """Let one of Ray Tune's trials go on after so many failures from now on.

    Missing: `FailureConfig(max_failures=...)` counts from the beginning, for all trials alike. No issue found.
    """
    trial.max_failures = trial.num_failures + more
