"""Our own groups of options on the command line: `--ray.*`, `--data.*`, `--checkpoint.*`, `--assets.*`."""

from dataclasses import dataclass, field
from pathlib import Path

from ray_jobs.config.errors import all_mistakes

OPTIONS_FILE = "options.json"  # a run's options, beside LeRobot's checkpoints in the output folder
NO_CACHE, SOME_CACHE = ("off", "false", "no", "none", "null"), ("auto", "on", "true", "yes")  # no folders
ASKED = "asked"  # part of that file: what was asked for in LeRobot's flags and train_config.json cannot tell


def at_least(name: str, value: float | None, least: int) -> list[str]:
    """What is wrong with a number that is too small: one mistake, or none."""
    return [f"--{name}={value}: must be at least {least}."] if value is not None and value < least else []


@dataclass
class RayOptions:
    """How the run is spread over workers."""

    num_workers: int = 1
    """Training workers. 0 runs everything in this process, without a cluster (for a debugger). `2:8`: elastic."""
    min_workers: int | None = None
    """Elastic: go on with as few while there is no room for all; each step still takes the batches of all."""
    cpus_per_worker: int | None = None
    """CPUs each worker reserves. Default: its share of the machine, at most 8 beside a GPU."""
    gpus_per_worker: float | None = None
    """GPUs each worker reserves. Default: 1 where the cluster has GPUs and the recipe allows them."""
    placement: str = "pack"
    """`pack`: workers on as few nodes as hold them. `spread`: on as many as there are."""
    address: str | None = None
    """`local` starts a cluster, `auto` or an address joins one. Default: join if there is one."""
    max_failures: int = 3
    """How often workers are lost between two checkpoints before the run is given up; -1: it never is."""
    hang_timeout: int = 600
    """Seconds without a step after which the worker that the others wait for is replaced; 0 never."""
    parallelism: str = "ddp"
    """`ddp`: every worker holds the whole policy. `fsdp`: its share of weights, gradients and optimizer."""
    grad_accumulation: int = 1
    """Batches whose gradients are added up for one optimizer step."""
    ema: bool = False
    """Keep an exponential moving average of the weights, validate with it and save it as the policy."""
    early_stopping: int = 0
    """Stop after so many validations without a better val/action_error; 0 never."""

    def __post_init__(self) -> None:
        with all_mistakes() as mistakes:
            mistakes += at_least("ray.num_workers", self.num_workers, 0)
            if self.min_workers is not None:
                range_ = f"--ray.num_workers={self.min_workers}:{self.num_workers}"
                if not 1 <= self.min_workers <= self.num_workers:
                    mistakes.append(
                        f"{range_}: the fewest workers first, at least 1, then the most, as in 2:8."
                    )
                if self.parallelism == "fsdp":
                    mistakes.append(
                        f"{range_}: not with --ray.parallelism=fsdp, whose shares fit one number only."
                    )
            mistakes += at_least("ray.cpus_per_worker", self.cpus_per_worker, 1)
            mistakes += at_least("ray.gpus_per_worker", self.gpus_per_worker, 0)
            mistakes += at_least("ray.max_failures", self.max_failures, -1)
            mistakes += at_least("ray.hang_timeout", self.hang_timeout, 0)
            mistakes += at_least("ray.grad_accumulation", self.grad_accumulation, 1)
            mistakes += at_least("ray.early_stopping", self.early_stopping, 0)
            if self.parallelism not in ("ddp", "fsdp"):
                mistakes.append(f"--ray.parallelism={self.parallelism}: must be ddp or fsdp.")
            if self.placement not in ("pack", "spread"):
                mistakes.append(f"--ray.placement={self.placement}: must be pack or spread.")
            if self.parallelism == "fsdp" and self.ema:
                mistakes.append(
                    "--ray.parallelism=fsdp: --ray.ema needs the whole policy on every worker (ddp)."
                )


@dataclass
class DataOptions:
    """How frames are read, which episodes are held out, and how they are scored."""

    cache: str = "auto"
    """Decode frames once per node: `auto` where it is worth it and there is room, `off`, or a folder to keep them in."""
    resize: list[int] | None = None
    """Height and width that camera images are resized to, here and by the trained policy at run time: '[H,W]'."""
    source: str = "local"
    """`local`: files on the node. `stream`: Ray decodes them elsewhere in the cluster, also out of `s3://`."""
    shuffle_buffer: int | None = None
    """Samples that each worker of a stream shuffles among. Default: what fits into a GiB, at most 10000."""
    eval_episodes: list[int] | None = None
    """Episodes held out for validation; takes the place of --dataset.eval_split."""
    eval_horizon: int | None = None
    """Steps of the predicted chunk that val/action_error compares. Default: the whole chunk."""
    eval_timing: bool = False
    """Measure val/inference_ms with every validation: one prediction at batch size 1, in milliseconds."""

    def __post_init__(self) -> None:
        with all_mistakes() as mistakes:
            mistakes += at_least("data.eval_horizon", self.eval_horizon, 1)
            mistakes += at_least("data.shuffle_buffer", self.shuffle_buffer, 1)
            if self.source not in ("local", "stream"):
                mistakes.append(f"--data.source={self.source}: must be local or stream.")
            if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < 1):
                mistakes.append(
                    f"--data.resize={self.resize}: must be height and width in pixels, as in '[120,160]'."
                )
        if self.cache.lower() in NO_CACHE:
            self.cache = "off"
        elif self.cache.lower() in SOME_CACHE:
            self.cache = "auto"
        else:
            self.cache = str(Path(self.cache).absolute())  # workers run in folders of their own


@dataclass
class CheckpointOptions:
    """Which checkpoints stay on disk. The last and the best one always do."""

    keep_last: int | None = None
    """Newest checkpoints to keep. Default: all, as LeRobot does."""
    keep_best: int = 1
    """Checkpoints with the lowest val/action_error to keep, when there are held-out episodes."""

    def __post_init__(self) -> None:
        with all_mistakes() as mistakes:
            mistakes += at_least("checkpoint.keep_last", self.keep_last, 1)
            mistakes += at_least("checkpoint.keep_best", self.keep_best, 1)


@dataclass
class AssetsOptions:
    """Where pretrained models and tokenizers lie that were fetched ahead."""

    dir: Path = Path("pretrained")
    """Folder of `hf download org/name --local-dir DIR/name`: found there under their Hub names, offline."""


@dataclass
class Options:
    """Everything on the command line that is not LeRobot's."""

    ray: RayOptions = field(default_factory=RayOptions)
    data: DataOptions = field(default_factory=DataOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    assets: AssetsOptions = field(default_factory=AssetsOptions)
