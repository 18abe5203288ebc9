"""Pictures of what a policy does."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.policies import PreTrainedPolicy, make_pre_post_processors
from lerobot.utils.constants import ACTION

from ray_jobs.engine.data import FrameReader, to_device

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def predicted_against_recorded(
    policy: PreTrainedPolicy, pretrained_dir: Path, dataset_root: Path, episode: int, file: Path
) -> Path:
    """Draw one episode's recorded actions and, chunk after chunk, what the policy predicts in their place.

    Each chunk starts from a recorded observation, so the picture shows prediction, not closed-loop control.

    Args:
        policy: A trained policy, on any device.
        pretrained_dir: The folder it was loaded from; holds its processors.
        file: The picture to write (PNG).
    """
    meta = LeRobotDatasetMetadata("local/data", root=dataset_root)
    deltas = resolve_delta_timestamps(policy.config, meta)
    dataset = LeRobotDataset(
        "local/data",
        root=dataset_root,
        episodes=[episode],
        delta_timestamps=deltas,
        video_backend="pyav",
        return_uint8=True,
    )
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(pretrained_dir))
    recorded = np.stack(dataset.hf_dataset.with_format("numpy")[ACTION][:])  # (frames, dims)
    policy.eval()
    policy.reset()
    starts, chunks, frame = [], [], 0
    with torch.no_grad():
        while frame < len(recorded):
            batch = to_device(FrameReader(dataset, threads=0)([frame]), meta.camera_keys, torch.device("cpu"))
            chunk = after(policy.predict_action_chunk(before(batch)))[0].float().cpu().numpy()
            starts.append(frame)
            chunks.append(chunk[: len(recorded) - frame])
            frame += len(chunk)

    names = meta.features[ACTION].get("names") or [f"action {d}" for d in range(recorded.shape[1])]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.4 * rows), squeeze=False, sharex=True)
    seconds = np.arange(len(recorded)) / meta.fps
    for dim, axis in enumerate(axes.flat):
        if dim >= len(names):
            axis.axis("off")
            continue
        axis.plot(seconds, recorded[:, dim], color="0.4", linewidth=2, label="recorded")
        for number, (start, chunk) in enumerate(zip(starts, chunks, strict=True)):
            label = "predicted" if number == 0 else None
            axis.plot(
                seconds[start : start + len(chunk)],
                chunk[:, dim],
                color="C1",
                marker=".",
                markersize=3,
                label=label,
            )
        axis.set_title(names[dim], fontsize=9)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    figure.suptitle(f"{policy.config.type}: predicted against recorded actions, episode {episode}")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file
