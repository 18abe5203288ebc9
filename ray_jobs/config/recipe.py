"""A training recipe: LeRobot's own training config, our options, and what has been found out about the run."""

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import lerobot.policies  # noqa: F401  (registers every --policy.type)
from lerobot.configs.train import TrainPipelineConfig

import ray_jobs.part_sorting  # noqa: F401  (registers --env.type=part_sorting)
from ray_jobs.config.options import Options

if TYPE_CHECKING:
    from ray_jobs.training.memory import Memory


@dataclass
class Recipe:
    """A resolved training recipe, ready to be shipped to workers.

    `lerobot` holds absolute paths and is what `train_config.json` will contain. `device` is what the user
    asked for (None: whatever the worker has); `lerobot.policy.device` cannot tell, since LeRobot rewrites it
    on a driver without a GPU.
    """

    lerobot: TrainPipelineConfig
    options: Options
    device: str | None = None
    eval_steps: int = 0
    notices: list[str] = field(default_factory=list)
    memory: "Memory | None" = None
    remote: str | None = None
    """The bucket that the run is copied to, if `--output_dir` is one; `output_dir` is then a folder of each node."""
    plugins: list[str] = field(default_factory=list)
    """Packages of `--*.discover_packages_path`, for workers to import."""

    mark: str = ""
    """What the driver has found in the run's folder, by which workers know that they see the same one."""
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells this driver's run from others: a worker may take the place of one that is not dead yet."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The same whenever the run is resumed."""
    typed: dict[str, str] = field(default_factory=dict)
    """The flags that the run was begun with."""
    command: dict[str, str] = field(default_factory=dict)
    """The flags of this command, which may go on with it."""
    held_out: list[int] = field(default_factory=list)
    """Episodes that are not trained on, however they were chosen; preflight finds them."""
    trainings: int = 1
    """That will read the same data."""
    gpu_share: float = 1.0
    """Of a GPU, that a worker may use."""
    unneeded: tuple[str, ...] = ()
    """Packages that workers do without (see `lean_imports`)."""

    @property
    def output_dir(self) -> Path:
        return Path(self.lerobot.output_dir)
