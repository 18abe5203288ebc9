"""Room on the cluster that is still kept for workers which are gone: Ray keeps a placement group as long as the driver lives.
Imported by Ray's controller: light."""

from collections.abc import Callable


def give_back(unwanted: Callable) -> None:
    """Remove placement groups of this job, and end what runs in them.

    Args:
        unwanted: Asked of every row of Ray's table that an actor of this job has made. Who has is not in Ray 2.60's public
            table of them.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()
    table = state._connect_and_get_accessor().get_placement_group_table()
    for row in map(PlacementGroupTableData.FromString, table):
        if ray.ActorID(row.creator_actor_id).is_nil():
            continue  # made by the driver, as those of a search's slots are, for which Ray says "dead" as well
        ours = row.creator_job_id.hex() == job and row.state != PlacementGroupTableData.REMOVED
        if ours and unwanted(row):
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(row.placement_group_id)))
