"""Closed loop: a policy acts in a simulator, with LeRobot's environments and LeRobot's `eval_policy`.

Episodes are seeded one by one, and each batch of them begins from a random state of its own: what comes out depends
neither on how many workers share the episodes nor on what was run before.
"""

import contextlib
import io
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import metadata
from math import sqrt
from pathlib import Path

import torch
from accelerate import Accelerator
from lerobot.configs.default import EvalConfig
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.configs.types import FeatureType
from lerobot.envs import EnvConfig, close_envs, make_env, make_env_pre_post_processors
from lerobot.envs.utils import env_to_policy_features
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import ImageCropResizeProcessorStep, PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import eval_policy
from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME
from lerobot.utils.random_utils import seeded_context

from ray_jobs.config.busy import busy
from ray_jobs.config.errors import InputError, first_line
from ray_jobs.data.lerobot_internals import registered_name
from ray_jobs.storage.records import SUCCESS

CONFIDENCE = 0.95


@dataclass
class SimulatorOptions:
    """Which environment, how many episodes of it, from which seed on; as in `lerobot-eval`."""

    env: EnvConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 1000

    @property
    def asynchronous(self) -> bool:
        """Whether each environment has a process of its own."""
        return self.eval.use_async_envs and self.eval.batch_size > 1

    @property
    def batches(self) -> list[tuple[int, int]]:
        """(first seed, episodes) of each batch of `eval.batch_size` episodes that run at the same time."""
        size, n = self.eval.batch_size, self.eval.n_episodes
        return [(self.seed + done, min(size, n - done)) for done in range(0, n, size)]


def check_eval(asked: EvalConfig) -> None:
    """Raises InputError where `lerobot-eval`'s own flags will not do."""
    if min(asked.n_episodes, asked.batch_size) < 1 or asked.recording:
        raise InputError(
            "--eval.n_episodes and --eval.batch_size must be at least 1, and --eval.recording is lerobot-eval's."
        )


def check(options: SimulatorOptions, policy: PreTrainedConfig, rename_map: dict[str, str]) -> list[str]:
    """See that the environment can be made, and gives the policy what it takes; returns what to mind.

    Raises:
        InputError: It is not installed, or made for another robot.
    """
    kind = options.env.type
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            close_envs(make_env(options.env, n_envs=1, use_async_envs=False))
    except ImportError as error:
        extra = kind if kind in (metadata("lerobot").get_all("Provides-Extra") or ()) else None
        version = metadata("lerobot")["Version"]
        what = f"`pip install 'lerobot[{extra}]=={version}'` brings it" if extra else first_line(error)
        raise InputError(f"--env.type={kind}: this environment is not installed here; {what}.") from None
    except Exception as error:
        raise InputError(f"--env.type={kind}: the environment cannot be made: {first_line(error)}") from None
    if options.asynchronous:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                close_envs(make_env(options.env, n_envs=2, use_async_envs=True))
        except Exception as error:  # what this process has imported, others have not: gym_pusht is such a one
            raise InputError(
                f"--env.type={kind}: the environment cannot be made in processes of its own ({first_line(error)}). "
                "--eval.use_async_envs=false makes it in this one."
            ) from None
    notices: list[str] = []
    gives = {rename_map.get(key, key): f for key, f in env_to_policy_features(options.env).items()}
    takes = {**(policy.input_features or {}), **(policy.output_features or {})}
    for key, feature in takes.items():
        if key not in gives:
            if feature.type is FeatureType.VISUAL and getattr(policy, "empty_cameras", False):
                continue
            hint = " If names differ only, --rename_map helps." if policy.pretrained_path else ""
            raise InputError(
                f"--env.type={kind} gives {', '.join(sorted(gives))}; the policy takes {key} "
                f"{tuple(feature.shape)} as well.{hint}"
            )
        ours, theirs = tuple(feature.shape), tuple(gives[key].shape)
        if feature.type is FeatureType.VISUAL and ours != theirs and not _resizes(policy):
            notices.append(
                f"--env.type={kind} gives {key} as {theirs[1]}x{theirs[2]}, the policy was trained on {ours[1]}x{ours[2]} and "
                "does not resize: its success will say little."
            )
        if feature.type is not FeatureType.VISUAL and ours != theirs and not hasattr(policy, "max_state_dim"):
            raise InputError(f"{key}: the policy has shape {ours}, --env.type={kind} {theirs}.")
    return notices


def _resizes(policy: PreTrainedConfig) -> bool:
    """Whether images of any size become the one that the policy was trained on: by itself, or by its preprocessor."""
    own = ("resize_imgs_with_padding", "image_resolution", "resize_shape", "resize_size")
    if any(getattr(policy, name, None) for name in own):
        return True
    saved = Path(policy.pretrained_path or "") / f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json"
    return saved.is_file() and registered_name(ImageCropResizeProcessorStep) in saved.read_text()


class Simulator:
    """The environments of one process, made when they are first used; `close` them."""

    def __init__(self, options: SimulatorOptions):
        self.options = options
        self.envs: dict = {}

    def run(
        self,
        policy: PreTrainedPolicy,
        before: PolicyProcessorPipeline,
        after: PolicyProcessorPipeline,
        batch: tuple[int, int],
        videos: int = 0,
    ) -> Iterator[dict]:
        """Run a batch of episodes in every task of the environment; leaves the random state as it was.

        Args:
            policy: In evaluation mode, with its processors `before` and `after`.
            batch: One of `SimulatorOptions.batches`.
            videos: Of how many of its episodes to keep a video.

        Yields:
            For each episode `task`, `seed`, `success`, `sum_reward`, `max_reward`, and `video` (bytes of an mp4 file,
            or None).
        """
        seed, episodes = batch
        env_cfg, size = self.options.env, self.options.eval.batch_size
        if not self.envs:
            with seeded_context(seed), contextlib.redirect_stdout(io.StringIO()):
                self.envs = make_env(env_cfg, n_envs=size, use_async_envs=self.options.asynchronous)
        of_env = make_env_pre_post_processors(env_cfg=env_cfg, policy_cfg=policy.config)
        for group, tasks in self.envs.items():
            for number, env in tasks.items():
                with (
                    tempfile.TemporaryDirectory(prefix="ray_jobs_videos_") as folder,
                    seeded_context(seed),
                    torch.no_grad(),
                    contextlib.redirect_stderr(io.StringIO()),  # two progress bars
                ):
                    info = eval_policy(
                        env,
                        policy,
                        *of_env,
                        before,
                        after,
                        n_episodes=episodes,
                        max_episodes_rendered=min(videos, episodes),
                        videos_dir=Path(folder) if videos else None,
                        start_seed=seed,
                    )
                    films = [Path(path).read_bytes() for path in info.get("video_paths", ())]
                for position, episode in enumerate(info["per_episode"]):
                    yield {
                        "task": f"{group}_{number}",
                        "seed": int(episode["seed"]),
                        "success": bool(episode["success"]),
                        "sum_reward": episode["sum_reward"],
                        "max_reward": episode["max_reward"],
                        "video": films[position] if position < len(films) else None,
                    }

    def close(self) -> None:
        if self.envs:
            close_envs(self.envs)
            self.envs = {}


class ClosedLoop:
    """The simulator in the midst of a training: the same episodes at every step, in every trial of a search and in
    `ray_jobs.evaluate`, shared by the ranks."""

    def __init__(self, cfg: TrainPipelineConfig):
        self.options = SimulatorOptions(cfg.env, cfg.eval)
        self.simulator = Simulator(self.options)

    @busy("validating")
    def __call__(
        self,
        policy: PreTrainedPolicy,
        before: PolicyProcessorPipeline,
        after: PolicyProcessorPipeline,
        accelerator: Accelerator,
    ) -> dict:
        """Run all episodes with the unwrapped `policy`; call on every rank.

        Returns:
            `env/success_rate`, and `env/sum_reward`, the mean over episodes.
        """
        mine = self.options.batches[accelerator.process_index :: accelerator.num_processes]
        training = policy.training
        policy.eval()
        with accelerator.autocast():
            episodes = [e for batch in mine for e in self.simulator.run(policy, before, after, batch)]
        policy.train(training)
        policy.reset()
        sums = [len(episodes), sum(e["success"] for e in episodes), sum(e["sum_reward"] for e in episodes)]
        sums = accelerator.reduce(torch.tensor(sums, dtype=torch.float32, device=accelerator.device))
        count, wins, reward = sums.tolist()
        return {SUCCESS: wins / count, "env/sum_reward": reward / count}

    @busy("closing the simulator")
    def close(self) -> None:
        self.simulator.close()


def success(episodes: list[dict]) -> dict:
    """The share of successful episodes, and the interval in which it lies with 95 % confidence."""
    wins = sum(episode["success"] for episode in episodes)
    low, high = wilson(wins, len(episodes))
    return {"success_rate": wins / len(episodes), "low": low, "high": high, "episodes": len(episodes)}


def wilson(wins: int, trials: int) -> tuple[float, float]:
    """The interval of Wilson (1927) for a probability, of which `wins` in `trials` were seen: unlike the usual one it
    says something at 0 and 1, and with few trials."""
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, weight = wins / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)
