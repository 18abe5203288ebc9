"""Validation: `val/loss` and `val/action_error`, a number that means the same for every policy.

For frames t of held-out episodes the policy predicts its action chunk from the observation at t, as it
would at run time (full denoising, with a fixed seed). The first H actions are compared with the recorded
a[t..t+H-1]: absolute error in units of the action's standard deviation per dimension, averaged over
dimensions, then over the steps inside the episode, then over episodes. Dimensions that never move are left
out. The value does not depend on `n_action_steps`, the batch size, the number of workers, or how much longer
than H the chunk is.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION

from ray_jobs.config.busy import busy
from ray_jobs.config.errors import InputError
from ray_jobs.config.options import DataOptions
from ray_jobs.data.dataset import to_device
from ray_jobs.data.frame_cache import FrameCache
from ray_jobs.data.frames import FrameSource
from ray_jobs.data.reader import FrameReader
from ray_jobs.policies.facts import facts_of, why_unscored

# Frames are scored in groups of this size, whatever the training's batch size: the noise of a denoising
# policy then depends on the group alone.
GROUP = 16
TIMED = 5  # predictions that are timed, after one to warm up


def chunk_length(policy_cfg: PreTrainedConfig) -> int:
    """Actions a policy predicts from now on: all of the chunk, whatever `n_action_steps` executes of it."""
    if facts_of(policy_cfg.type).predicts_past:
        return policy_cfg.horizon - policy_cfg.n_obs_steps + 1
    return getattr(policy_cfg, "chunk_size", None) or len(policy_cfg.action_delta_indices or [0])


def check_scored(policy_cfg: PreTrainedConfig) -> None:
    """Refuse a policy whose predictions cannot be compared with the recorded actions.

    Raises:
        InputError: It is one of those.
    """
    if why := why_unscored(policy_cfg.type):
        raise InputError(f"{why} It trains without --data.eval_episodes and --eval_steps.")


def units(meta: LeRobotDatasetMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard deviation of the action's dimensions, and which of them ever move.

    Raises:
        InputError: The data set's statistics do not tell.
    """
    stats = (meta.stats or {}).get(ACTION, {})
    if lacking := {"min", "max", "std"} - set(stats):
        raise InputError(
            f"meta/stats.json of {meta.repo_id} has no {', '.join(sorted(lacking))} of {ACTION}, in which validation "
            "measures. A training without held-out episodes can do without."
        )
    std = torch.as_tensor(np.asarray(stats["std"]), dtype=torch.float32)
    return std, torch.as_tensor(np.asarray(stats["max"]) > np.asarray(stats["min"])) & (std > 0)


class Validation:
    """Scores a policy on held-out episodes.

    Args:
        dataset: The held-out data set, with the policy's own delta timestamps.
        horizon: H, the number of predicted actions that are compared; None for the whole chunk.
        max_frames: Frames to score in total, spread evenly over episodes and time; 0 scores all.
        threads, frames: See `FrameReader`.
        timed: Whether to measure `val/inference_ms` as well.
        detailed: Whether to tell how the error grows over the horizon as well.

    Raises:
        InputError: H is longer than the policy's chunk, or it cannot be scored.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        policy_cfg: PreTrainedConfig,
        *,
        horizon: int | None,
        max_frames: int = 0,
        threads: int = 0,
        frames: FrameCache | FrameSource | None = None,
        timed: bool = False,
        detailed: bool = False,
    ):
        check_scored(policy_cfg)
        self.dataset, self.timed, self.detailed = dataset, timed, detailed
        longest = chunk_length(policy_cfg)
        self.horizon = longest if horizon is None else horizon
        if self.horizon > longest:
            raise InputError(
                f"--data.eval_horizon={horizon}: the policy predicts {longest} actions from now on."
            )
        self.reader = FrameReader(dataset, threads, frames) if FrameReader.can_read(dataset) else self._items
        table = dataset.hf_dataset.with_format("numpy")
        self.actions = torch.from_numpy(np.stack(table[ACTION][:]).astype(np.float32))  # (frames, dims)
        episode = torch.from_numpy(np.asarray(table["episode_index"][:]))
        self.episodes = episode.unique().tolist()
        self.std, self.moving = units(dataset.meta)
        self.last_row = torch.empty_like(episode)
        self.groups: list[tuple[int, list[int]]] = []  # (position of the episode, rows)
        per_episode = max(1, max_frames // len(self.episodes)) if max_frames else None
        for position, index in enumerate(self.episodes):
            rows = (episode == index).nonzero()[:, 0]
            self.last_row[rows] = rows[-1]
            if per_episode is not None and per_episode < len(rows):
                rows = rows[torch.linspace(0, len(rows) - 1, per_episode).round().long()]
            self.groups += [(position, group.tolist()) for group in rows.split(GROUP)]

    @classmethod
    def of(
        cls,
        cfg: TrainPipelineConfig,
        options: DataOptions,
        dataset: LeRobotDataset,
        frames: FrameCache | FrameSource | None,
        **how: Any,
    ) -> "Validation":
        """As a command line wants it; `how` is what else the constructor takes."""
        return cls(
            dataset,
            cfg.policy,
            horizon=options.eval_horizon,
            max_frames=cfg.max_eval_samples,
            threads=cfg.num_workers,
            frames=frames,
            **how,
        )

    @busy("validating")
    def __call__(
        self,
        policy: PreTrainedPolicy,
        preprocessor: PolicyProcessorPipeline,
        postprocessor: PolicyProcessorPipeline,
        accelerator: Accelerator,
    ) -> dict:
        """Score the unwrapped `policy`; call on every rank. Leaves the random state as it was.

        Returns:
            `val/loss`, `val/action_error`, and `val/action_error_raw`: the error per dimension, averaged the
            same way, in the units of the data set (list of floats, action_dim long); `val/inference_ms` if
            asked for: the median time of a prediction at the batch size of 1 that a robot has; and
            `val/action_error_over_horizon`: the same error of the 1st, 2nd ... H-th predicted action alone (list).
        """
        device = accelerator.device
        dims = self.actions.shape[1]
        # Per episode: summed absolute error of each dimension, number of compared actions; then the loss.
        errors = torch.zeros(len(self.episodes), dims + 1, dtype=torch.float64)
        by_step = torch.zeros(len(self.episodes), self.horizon, dims + 1, dtype=torch.float64)  # the same
        loss = torch.zeros(2, dtype=torch.float64)  # summed over frames, frames
        cuda = [device] if device.type == "cuda" else []
        training = policy.training
        policy.eval()
        with torch.no_grad(), torch.random.fork_rng(cuda), accelerator.autocast(), _whole_chunk(policy):
            # Every rank makes as many calls, since a sharded policy answers all ranks or none; extra ones count 0.
            ranks = accelerator.num_processes
            for number in range(
                accelerator.process_index, math.ceil(len(self.groups) / ranks) * ranks, ranks
            ):
                position, rows = self.groups[number % len(self.groups)]
                counts = number < len(self.groups)
                batch = to_device(self.reader(rows), self.dataset.meta.camera_keys, device)
                batch = preprocessor(batch)
                torch.manual_seed(number)
                group_loss, _ = policy(dict(batch))
                loss += counts * torch.tensor([group_loss.item() * len(rows), len(rows)], dtype=torch.float64)
                policy.reset()  # a policy with an observation history takes it from the batch, not its queues
                torch.manual_seed(number)
                chunk = postprocessor(policy.predict_action_chunk(batch)).float().cpu()[:, : self.horizon]
                wanted = torch.tensor(rows)[:, None] + torch.arange(self.horizon)  # (B, H)
                inside = (wanted <= self.last_row[rows][:, None]) & counts
                recorded = self.actions[wanted.clamp(max=len(self.actions) - 1)]  # (B, H, dims)
                error = ((chunk - recorded).abs() * inside[..., None]).double()
                errors[position, :dims] += error.sum((0, 1))
                errors[position, dims] += inside.sum()
                if self.detailed:
                    by_step[position, :, :dims] += error.sum(0)
                    by_step[position, :, dims] += inside.sum(0)
            milliseconds = None
            if self.timed:
                times = self.inference_ms(policy, preprocessor, postprocessor, device, TIMED)
                milliseconds = statistics.median(times)
        policy.train(training)
        policy.reset()
        errors, loss = accelerator.reduce(errors.to(device)).cpu(), accelerator.reduce(loss.to(device)).cpu()
        raw = (errors[:, :dims] / errors[:, dims:]).mean(0)  # (dims,)
        in_std = raw[self.moving] / self.std[self.moving]
        values = {
            "val/loss": (loss[0] / loss[1]).item(),
            "val/action_error": in_std.mean().item() if len(in_std) else 0.0,
            "val/action_error_raw": raw.tolist(),
        }
        if milliseconds is not None:
            values["val/inference_ms"] = milliseconds
        if self.detailed:
            by_step = accelerator.reduce(by_step.to(device)).cpu()
            by_step = by_step[:, by_step[..., dims].sum(0) > 0]  # not beyond the longest episode
            # Averaged over the episodes that are long enough.
            of_step = (by_step[..., :dims] / by_step[..., dims:]).nanmean(0)[:, self.moving]  # (H, moving)
            values["val/action_error_over_horizon"] = (of_step / self.std[self.moving]).mean(1).tolist()
        return values

    def inference_ms(
        self,
        policy: PreTrainedPolicy,
        preprocessor: PolicyProcessorPipeline,
        postprocessor: PolicyProcessorPipeline,
        device: torch.device,
        predictions: int,
    ) -> list[float]:
        """How long each of some predictions takes at batch size 1, after one to warm up."""
        frame = self.groups[0][1][:1]
        batch = preprocessor(to_device(self.reader(frame), self.dataset.meta.camera_keys, device))
        times = []
        for _ in range(predictions + 1):
            policy.reset()
            begin = time.perf_counter()
            postprocessor(policy.predict_action_chunk(batch)).cpu()
            times.append(1000 * (time.perf_counter() - begin))
        return times[1:]

    def _items(self, rows: list[int]) -> dict:
        from lerobot.utils.collate import lerobot_collate_fn
        from torch.utils.data import default_collate

        collate = lerobot_collate_fn if self.dataset.meta.has_language_columns else default_collate
        return collate([self.dataset[row] for row in rows])


@contextlib.contextmanager
def _whole_chunk(policy: PreTrainedPolicy) -> Iterator[None]:
    """Let a policy that cuts its output to `n_action_steps` (Diffusion) return all actions from now on."""
    config = policy.config
    saved = config.n_action_steps
    if facts_of(config.type).predicts_past:
        config.n_action_steps = chunk_length(config)
    try:
        yield
    finally:
        config.n_action_steps = saved
