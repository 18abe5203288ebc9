"""A training recipe: LeRobot's own training config, our options, and what has been found out about the run."""

import copy
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lerobot.policies  # noqa: F401  (registers every --policy.type)
from lerobot.configs.train import TrainPipelineConfig

import ray_jobs.part_sorting  # noqa: F401  (registers --env.type=part_sorting)
from ray_jobs.config.options import Options

if TYPE_CHECKING:
    from ray_jobs.training.memory import Memory


@dataclass(frozen=True)
class Context:
    """What has been found out about a run since its recipe was resolved."""

    memory: "Memory | None" = None
    """What a worker will need, where that can be estimated."""
    held_out: tuple[int, ...] = ()
    """Episodes that are not trained on, however they were chosen."""
    mark: str = ""
    """What the driver has found in the run's folder, by which workers know that they see the same one."""
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells this driver's run from others: a worker may take the place of one that is not dead yet."""
    trainings: int = 1
    """That will read the same data."""
    gpu_share: float = 1.0
    """Of a GPU, that a worker may use."""
    unneeded: tuple[str, ...] = ()
    """Packages that workers do without (see `lean_imports`)."""


@dataclass(frozen=True)
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
    notices: tuple[str, ...] = ()
    """What the user should know of it."""
    remote: str | None = None
    """The bucket that the run is copied to, if `--output_dir` is one; `output_dir` is then a folder of each node."""
    plugins: tuple[str, ...] = ()
    """Packages of `--*.discover_packages_path`, for workers to import."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The same whenever the run is resumed."""
    typed: dict[str, str] = field(default_factory=dict)
    """The flags that the run was begun with."""
    command: dict[str, str] = field(default_factory=dict)
    """The flags of this command, which may go on with it."""
    context: Context = field(default_factory=Context)

    @property
    def output_dir(self) -> Path:
        return Path(self.lerobot.output_dir)

    def knowing(self, **found: Any) -> "Recipe":
        """The same recipe, and more of its context."""
        return replace(self, context=replace(self.context, **found))

    def noting(self, *notices: str) -> "Recipe":
        """The same recipe with more notices."""
        return replace(self, notices=(*self.notices, *notices))

    def copy(self) -> "Recipe":
        """One whose configs can be changed."""
        return replace(self, lerobot=copy.deepcopy(self.lerobot), options=copy.deepcopy(self.options))
