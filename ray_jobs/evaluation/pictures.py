"""What a policy predicts for a recorded episode, and pictures of it."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION

from ray_jobs.data.dataset import to_device
from ray_jobs.training.validation import Validation

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STRIP = 6  # camera frames that are kept of an episode


@dataclass
class Replay:
    """One episode's recorded actions and, chunk after chunk, what the policy predicts in their place.

    Each chunk starts from a recorded observation: prediction, not closed-loop control.
    """

    policy: str
    episode: int
    fps: int
    names: list[str]
    recorded: np.ndarray
    """(frames, dims)"""
    chunks: list[tuple[int, np.ndarray]]
    """(first frame, (actions, dims)) of each prediction."""
    strips: dict[str, list[np.ndarray]]
    """By camera, a few frames of the episode from first to last: (H, W, 3) uint8."""


def joint_names(meta: LeRobotDatasetMetadata) -> list[str]:
    """Names of the action's dimensions, as the data set has them."""
    names = meta.features[ACTION].get("names")
    if isinstance(names, dict):  # grouped, as {"motors": [...]}
        names = [name for group in names.values() for name in group]
    dims = meta.features[ACTION]["shape"][0]
    return list(names) if names and len(names) == dims else [f"action {d}" for d in range(dims)]


def replay(
    validation: Validation,
    policy: PreTrainedPolicy,
    before: PolicyProcessorPipeline,
    after: PolicyProcessorPipeline,
    device: torch.device,
    position: int = 0,
) -> Replay:
    """Let the policy predict all of a held-out episode; call without gradients.

    Args:
        before, after: Its processors.
        position: Which of the validation's episodes.
    """
    dataset, episode = validation.dataset, validation.episodes[position]
    meta = dataset.meta
    index = np.asarray(dataset.hf_dataset.with_format("numpy")["episode_index"][:])
    rows = np.flatnonzero(index == episode).tolist()
    recorded = validation.actions[rows].numpy()
    policy.reset()
    chunks, frame = [], 0
    while frame < len(rows):
        batch = before(to_device(validation.reader([rows[frame]]), meta.camera_keys, device))
        chunk = after(policy.predict_action_chunk(batch))[0].float().cpu().numpy()
        chunks.append((frame, chunk[: len(rows) - frame]))
        frame += len(chunk)
    strips: dict[str, list[np.ndarray]] = {key: [] for key in meta.camera_keys if key not in meta.depth_keys}
    for row in np.linspace(0, len(rows) - 1, STRIP).round().astype(int) if strips else ():
        batch = to_device(validation.reader([rows[row]]), meta.camera_keys, torch.device("cpu"))
        for key, frames in strips.items():
            image = batch[key].reshape(-1, *batch[key].shape[-3:])[-1]  # of a history, the newest
            frames.append((255 * image.permute(1, 2, 0)).round().to(torch.uint8).numpy())
    return Replay(policy.config.type, episode, meta.fps, joint_names(meta), recorded, chunks, strips)


def predicted_against_recorded(drawn: Replay, file: Path) -> Path:
    """Draw a replay, a panel for each dimension (PNG)."""
    columns = min(4, len(drawn.names))
    rows = -(-len(drawn.names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.4 * rows), squeeze=False, sharex=True)
    seconds = np.arange(len(drawn.recorded)) / drawn.fps
    for dim, axis in enumerate(axes.flat):
        if dim >= len(drawn.names):
            axis.axis("off")
            continue
        axis.plot(seconds, drawn.recorded[:, dim], color="0.4", linewidth=2, label="recorded")
        for number, (start, chunk) in enumerate(drawn.chunks):
            axis.plot(
                seconds[start : start + len(chunk)],
                chunk[:, dim],
                color="C1",
                marker=".",
                markersize=3,
                label="predicted" if number == 0 else None,
            )
        axis.set_title(drawn.names[dim], fontsize=9)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    figure.suptitle(f"{drawn.policy}: predicted against recorded actions, episode {drawn.episode}")
    return _saved(figure, file)


def errors(results: dict[str, dict], file: Path) -> Path:
    """Draw how the error grows over the horizon, and how it is spread over the joints, of some checkpoints (PNG).

    Args:
        results: What `trained.score` gives, by the checkpoint's name.
    """
    figure, (grown, joints) = plt.subplots(1, 2, figsize=(12, 4))
    for number, (name, result) in enumerate(results.items()):
        steps = np.arange(1, len(result["over_horizon"]) + 1)
        grown.plot(steps, result["over_horizon"], marker=".", label=name)
        names = [joint["joint"] for joint in result["joints"]]
        values = [joint["error_in_std"] or 0.0 for joint in result["joints"]]
        width = 0.8 / len(results)
        joints.barh(np.arange(len(names)) + number * width, values, height=width, label=name)
    joints.set_yticks(np.arange(len(names)) + 0.4 - width / 2, names, fontsize=7)
    joints.invert_yaxis()
    grown.set_xlabel("action of the prediction")
    for axis in (grown, joints):
        (axis.set_ylabel if axis is grown else axis.set_xlabel)("mean absolute error (std)")
    grown.set_ylim(bottom=0)
    grown.legend(fontsize=8)
    return _saved(figure, file)


def _saved(figure: plt.Figure, file: Path) -> Path:
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file
