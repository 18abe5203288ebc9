"""A data set as the jobs name it that do not train: `--dataset.*`, `--data.*`, `--ray.address`."""

from dataclasses import dataclass, field

import draccus
from lerobot.configs.default import DatasetConfig
from lerobot.datasets import LeRobotDataset

from ray_jobs.checks.dataset import check_files, check_resize, open_dataset, where_it_is
from ray_jobs.cli.command_line import read_flags
from ray_jobs.cli.flags import NO_DATA_SET, as_arguments
from ray_jobs.cli.parse_errors import parse
from ray_jobs.config.errors import InputError, first_line
from ray_jobs.config.options import DataOptions, RayOptions
from ray_jobs.data.columns import check_rows
from ray_jobs.data.frames import set_frame_size
from ray_jobs.storage import bucket


@dataclass
class DatasetOptions:
    """Which data set, how it is read, and on which cluster."""

    dataset: DatasetConfig
    data: DataOptions = field(default_factory=DataOptions)
    ray: RayOptions = field(default_factory=RayOptions)
    tolerance_s: float = 1e-4  # LeRobot's default

    @property
    def name(self) -> str:
        """What the user called it."""
        return where_it_is(self.dataset)[0]

    def open(self) -> LeRobotDataset:
        """The data set, looked over as before a training; its metadata tell of resized frames.

        Raises:
            InputError: It is not there, not whole, or cannot be resized.
        """
        meta = open_dataset(self.dataset)
        check_files(self.dataset, meta)
        check_resize(self.data.resize, meta)
        try:
            dataset = LeRobotDataset(
                self.dataset.repo_id,
                root=self.dataset.root,
                episodes=self.dataset.episodes,
                revision=self.dataset.revision,
                video_backend=self.dataset.video_backend,
                tolerance_s=self.tolerance_s,
                return_uint8=True,
            )
        except Exception as error:
            raise InputError(f"{self.name}: the data set cannot be opened: {first_line(error)}") from None
        check_rows(dataset)
        set_frame_size(dataset.meta, self.data.resize)
        return dataset


def read(words: list[str]) -> DatasetOptions:
    """Parse the flags.

    Raises:
        InputError: A flag or a value is wrong, or no data set is named, or one in a bucket.
    """
    flags, _ = read_flags(words)
    if "dataset.repo_id" not in flags:
        raise InputError(NO_DATA_SET)
    asked = parse(lambda: draccus.parse(DatasetOptions, args=as_arguments(flags)), flags)
    if bucket.is_uri(asked.dataset.root):
        raise InputError(
            f"--dataset.root={asked.dataset.root}: this looks at local folders; a training reads from a bucket."
        )
    return asked
