"""What the cluster has, and what each worker of a run reserves of it. Imported once Ray is up."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml

from ray_jobs.cluster import ray_internals
from ray_jobs.cluster.connect import CPU_WORKER_ENV, TRAIN_ENV
from ray_jobs.config.errors import InputError

NODE_GROUP = "ray.io/node-group"  # Ray's label of a node that an autoscaler or launcher has started
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` leaves its file on the head node
UNLIMITED = 100  # nodes of a group without a limit that are reckoned with


@dataclass
class Resources:
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


def per_worker(
    num_workers: int,
    cpus: float | None,
    gpus: float | None,
    device: str | None,
    *,
    decoders: bool = False,
    at_least: int | None = None,
    alone: bool = False,
    asked: str = "--ray.num_workers",
) -> Resources:
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
        gpus = 1.0 if allowed and any(node_gpus) else 0.0
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
    room = room_for(Resources(cpus, gpus))
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
    return Resources(cpus, gpus)


def room_for(each: Resources, *, now: bool = False) -> int:
    """How many processes with such a share the cluster's nodes hold; `now`, without those that may be added."""
    room = 0
    for node in [n["Resources"] for n in ray.nodes() if n["Alive"]] if now else nodes():
        cpus, gpus = int(node.get("CPU", 0)) // each.cpus, math.inf
        if each.gpus:
            gpus = node.get("GPU", 0) / each.gpus + 1e-9  # three thirds are one
        room += int(min(cpus, gpus))
    return room


def nodes() -> list[dict[str, float]]:
    """Resources of every node that the cluster has, and of those that its autoscaler may add."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    running = Counter(node["Labels"].get(NODE_GROUP) for node in alive)
    more = [held for name, held, most in _groups() for _ in range(most - running[name])]
    return [node["Resources"] for node in alive] + more


def may_grow() -> bool:
    """Whether an autoscaler may add nodes that `nodes` does not know of: it runs elsewhere (KubeRay's), or the
    driver does."""
    return not _groups() and any(NODE_GROUP in node["Labels"] for node in ray.nodes())


def _groups() -> list[tuple[str, dict[str, float], int]]:
    """Node groups of an autoscaler: name, resources of a node, nodes at most.

    Ray 2.60 has a place for them in its state, which `ray up` leaves empty; what it leaves is its file on the head
    node, where `ray job submit` runs the driver.
    """
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
