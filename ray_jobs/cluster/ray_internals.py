"""All of Ray that is used here and is not public: what for, and which public way is missing.

Seen in Ray 2.60. At the next version `tests/cluster/test_ray_internals.py` tells which name has gone, and which workaround is
no longer needed. Ray is imported within the functions, for nothing here may cost a command time that does not start Ray, and
some of this is called before Ray's other parts may be imported (see `connect.start`).
"""

import contextlib
from collections.abc import Iterator

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

    return canonicalize_bootstrap_address(address)  # type: ignore[arg-type]  # `ray.init` gives it None, too


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
