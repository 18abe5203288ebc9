"""What one trial reserves on the cluster."""

from dataclasses import dataclass

from ray_jobs.cluster import resources
from ray_jobs.cluster.ray_internals import HEAD_NODE
from ray_jobs.config.errors import InputError
from ray_jobs.search.plan import Plan

MAX_CPU_TRIALS = 4  # at a time, where nothing else says so: a search learns from one trial for the next
# A trial whose workers have a group of their own only watches them. A sliver of a CPU would be too much: on a machine
# that they fill, they would wait for it for ever. So it takes a place on the head node, of which there are plenty.
WATCHER = {HEAD_NODE: 0.001}


@dataclass
class Slot:
    """What one trial reserves on the cluster."""

    bundle: dict[str, float]
    """Resources of the trial's own process."""
    each: resources.Resources
    """Of each worker, where a trial has several."""
    at_once: int
    """Trials that the cluster holds, with the nodes that its autoscaler may add."""


def decide(plan: Plan) -> Slot:
    """Decide what each trial reserves, and refuse what no node has.

    Raises:
        InputError: Not even an empty cluster has room for one trial.
    """
    tune, options = plan.options.tune, plan.recipe.options.ray
    nodes = resources.nodes()
    total_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    gpus, cpus = tune.gpus_per_trial, options.cpus_per_worker
    workers = tune.workers_per_trial
    if gpus is None and workers == 1 and total_gpus and (plan.recipe.device or "cuda").startswith("cuda"):
        gpus = 1.0
    most = max(node.get("GPU", 0) for node in nodes)
    if gpus and gpus > most and workers == 1 and not resources.may_grow():
        raise InputError(
            f"--tune.gpus_per_trial={gpus:g}: no node of this cluster has more than {most:g} GPUs."
        )
    if workers > 1:
        of_each = None if gpus is None else gpus / workers
        each = resources.per_worker(
            workers, cpus, of_each, plan.recipe.device, asked="--tune.workers_per_trial"
        )
        return Slot(WATCHER, each, max(1, resources.room_for(each) // workers))
    gpus = gpus or 0.0
    hosts = [node for node in nodes if node.get("GPU", 0) >= gpus]
    if cpus is None:
        at_once = int(total_gpus / gpus) if gpus else min(MAX_CPU_TRIALS, tune.num_samples)
        largest = max((int(node.get("CPU", 0)) for node in hosts), default=1)
        near = sum(int(node.get("CPU", 0)) for node in hosts)  # a head without GPUs lends none
        cpus = max(1, min(near // max(1, at_once), largest, 8 if gpus else largest))
    each = resources.Resources(cpus, gpus)
    room = resources.room_for(each)
    if not room and not resources.may_grow():
        raise InputError(f"--ray.cpus_per_worker={cpus}: no node of this cluster has {each}.")
    return Slot(each.resources, each, max(1, room))
