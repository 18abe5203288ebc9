"""Small data sets, made by LeRobot."""

from pathlib import Path

import numpy as np
import torch
from lerobot.configs import RGBEncoderConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

POLICIES = {
    "act": ACTConfig(device="cpu", chunk_size=8, n_action_steps=8),
    "diffusion": DiffusionConfig(device="cpu", horizon=8),
    "smolvla": SmolVLAConfig(device="cpu", chunk_size=8, n_action_steps=8),
    "pi0": PI0Config(device="cpu", chunk_size=8, n_action_steps=8),
    "pi05": PI05Config(device="cpu", chunk_size=8, n_action_steps=8),
    "none": None,
}


def make(root: Path, lengths: list[int], *, cameras: int = 0, seed: int = 0, **create) -> Path:
    """A small data set of random numbers with columns of all sorts: LeRobot's own recording, two tasks.

    Without cameras it trains an ACT in milliseconds (`observation.environment_state` stands in for them).
    The last dimension of the action never moves.
    """
    images = {
        f"observation.images.{name}": {
            "dtype": "video" if create.get("use_videos", True) else "image",
            "shape": (32, 32, 3),
            "names": ["height", "width", "channels"],
        }
        for name in ("top", "side")[:cameras]
    }
    numbers = {
        "observation.state": ("float32", 3),
        "observation.environment_state": ("float32", 4),
        "action": ("float32", 3),
        "next.reward": ("float32", 1),
        "next.done": ("bool", 1),
        "count": ("int32", 1),
        "precise": ("float64", 2),
    }
    features = {key: {"dtype": d, "shape": (n,), "names": None} for key, (d, n) in numbers.items()}
    encoder = {"rgb_encoder": RGBEncoderConfig(vcodec="h264", preset="veryfast")} if cameras else {}
    dataset = LeRobotDataset.create("local/made", 10, {**features, **images}, root=root, **encoder, **create)
    rng = np.random.default_rng(seed)
    for episode, length in enumerate(lengths):
        for step in range(length):
            frame = {key: rng.standard_normal(n).astype(d) for key, (d, n) in numbers.items()}
            frame["action"][-1] = 0.5
            frame["count"][:] = step
            frame |= {key: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for key in images}
            dataset.add_frame({**frame, "task": ("push", "pull")[episode % 2]})
        dataset.save_episode()
    dataset.finalize()
    return root


def opened(root: Path, policy: str, episodes: list[int] | None = None) -> LeRobotDataset:
    deltas = None
    if POLICIES[policy] is not None:
        meta = LeRobotDatasetMetadata("local/made", root=root)
        deltas = resolve_delta_timestamps(POLICIES[policy], meta)
    return LeRobotDataset(
        "local/made",
        root=root,
        episodes=episodes,
        delta_timestamps=deltas,
        video_backend="pyav",
        return_uint8=True,
    )


def assert_same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        if torch.is_tensor(value):
            assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
            assert torch.equal(ours[key], value), key
        else:
            assert ours[key] == value, key
