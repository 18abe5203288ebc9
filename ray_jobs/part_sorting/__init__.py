"""Part sorting, a small simulated task for demonstrations, tests and closed-loop evaluation.

Importing this package registers the Gymnasium environment `part_sorting/PartSorting-v0` and LeRobot's
`--env.type=part_sorting` (with `--env.discover_packages_path=ray_jobs.part_sorting`).
"""

from dataclasses import dataclass
from functools import partial

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from ray_jobs.part_sorting.env import CAMERAS, EPISODE_SECONDS

ENV_ID = "part_sorting/PartSorting-v0"
gym.register(ENV_ID, "ray_jobs.part_sorting.env:PartSortingEnv", max_episode_steps=EPISODE_SECONDS * 10)


@EnvConfig.register_subclass("part_sorting")
@dataclass
class PartSortingConfig(EnvConfig):
    """LeRobot's view of the environment; see PartSortingEnv for the fields that it passes on."""

    task: str | None = "PartSorting-v0"
    fps: int = 10  # steps per second
    episode_length: int | None = None  # steps; EPISODE_SECONDS' worth if None
    image_size: int = 96  # pixels
    n_cameras: int = 1
    n_parts: int | None = None

    def __post_init__(self) -> None:
        self.episode_length = self.episode_length or EPISODE_SECONDS * self.fps
        image = PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3))
        cameras = [f"{OBS_IMAGES}.{camera}" for camera in CAMERAS[: self.n_cameras]]
        # Cameras keep the names of the data set here: lerobot-eval matches these keys when it records.
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (3,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (3,)),
            **dict.fromkeys(cameras, image),
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE, **{key: key for key in cameras}}

    @property
    def gym_id(self) -> str:
        return ENV_ID

    @property
    def gym_kwargs(self) -> dict:
        return {
            "max_episode_steps": self.episode_length,
            "image_size": self.image_size,
            "n_cameras": self.n_cameras,
            "n_parts": self.n_parts,
            "fps": self.fps,
        }

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        """{"part_sorting": {0: vector environment of `n_envs`}}; asynchronous only with more than one."""
        # A worker process starts without this process's registrations: "module:id" imports the module first.
        make_env = partial(
            gym.make, f"{__name__}:{ENV_ID}", disable_env_checker=self.disable_env_checker, **self.gym_kwargs
        )
        mode = gym.vector.AutoresetMode.SAME_STEP
        if use_async_envs and n_envs > 1:
            vector: gym.vector.VectorEnv = gym.vector.AsyncVectorEnv(
                [make_env] * n_envs, context="forkserver", autoreset_mode=mode
            )
        else:
            vector = gym.vector.SyncVectorEnv([make_env] * n_envs, autoreset_mode=mode)
        return {self.type: {0: vector}}
