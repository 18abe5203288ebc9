"""Our own groups of options, `--ray.*`, `--data.*` and `--checkpoint.*`; draccus parses them."""

import dataclasses
import json
from dataclasses import dataclass, field

import draccus

from ray_jobs.engine.errors import InputError

OPTIONS_FILE = "options.json"  # a run's options, beside LeRobot's checkpoints in the output folder


def at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"--{name}={value}: must be at least {least}.")


@dataclass
class RayOptions:
    """How the run is spread over workers."""

    num_workers: int = 1
    """Training workers. 0 runs everything in this process, without a cluster (for a debugger)."""
    cpus_per_worker: int | None = None
    """CPUs each worker reserves. Default: its share of the machine, at most 8 beside a GPU."""
    gpus_per_worker: float | None = None
    """GPUs each worker reserves. Default: 1 where the cluster has GPUs and the recipe allows them."""
    address: str | None = None
    """`local` starts a cluster, `auto` or an address joins one. Default: join if there is one."""
    max_failures: int = 3
    """How often lost workers are replaced before the run is given up; -1 for ever."""
    grad_accumulation: int = 1
    """Batches whose gradients are added up for one optimizer step."""
    ema: bool = False
    """Keep an exponential moving average of the weights, validate with it and save it as the policy."""
    early_stopping: int = 0
    """Stop after so many validations without a better val/action_error; 0 never."""

    def __post_init__(self) -> None:
        at_least("ray.num_workers", self.num_workers, 0)
        at_least("ray.cpus_per_worker", self.cpus_per_worker, 1)
        at_least("ray.gpus_per_worker", self.gpus_per_worker, 0)
        at_least("ray.max_failures", self.max_failures, -1)
        at_least("ray.grad_accumulation", self.grad_accumulation, 1)
        at_least("ray.early_stopping", self.early_stopping, 0)


@dataclass
class DataOptions:
    """Which episodes are held out, and how they are scored."""

    eval_episodes: list[int] | None = None
    """Episodes held out for validation; takes the place of --dataset.eval_split."""
    eval_horizon: int | None = None
    """Steps of the predicted chunk that val/action_error compares. Default: the whole chunk."""

    def __post_init__(self) -> None:
        at_least("data.eval_horizon", self.eval_horizon, 1)


@dataclass
class CheckpointOptions:
    """Which checkpoints stay on disk. The last and the best one always do."""

    keep_last: int | None = None
    """Newest checkpoints to keep. Default: all, as LeRobot does."""
    keep_best: int = 1
    """Checkpoints with the lowest val/action_error to keep, when there are held-out episodes."""

    def __post_init__(self) -> None:
        at_least("checkpoint.keep_last", self.keep_last, 1)
        at_least("checkpoint.keep_best", self.keep_best, 1)


@dataclass
class Options:
    """Everything on the command line that is not LeRobot's."""

    ray: RayOptions = field(default_factory=RayOptions)
    data: DataOptions = field(default_factory=DataOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)


def help_text() -> str:
    """Our options with their defaults, and where LeRobot's are shown."""
    lines = ["Every flag of lerobot-train, and:", ""]
    for group in dataclasses.fields(Options):
        group_type = group.default_factory
        lines.append(f"  {group_type.__doc__}")
        for option in dataclasses.fields(group_type):
            default = "" if option.default is None else f" [{json.dumps(option.default)}]"
            help_line = draccus.wrappers.docstring.get_attribute_docstring(
                group_type, option.name
            ).docstring_below
            lines.append(f"    --{group.name}.{option.name}{default}\n        {help_line}")
        lines.append("")
    lines.append("LeRobot's flags for one policy:  python -m ray_jobs.train --policy.type=act --help")
    return "\n".join(lines)
