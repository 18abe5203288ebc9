"""Record the part-sorting expert as a LeRobot v3.0 data set with video."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import datasets
import numpy as np
from lerobot.configs import RGBEncoderConfig
from lerobot.datasets import LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from ray_jobs.part_sorting.env import ACTION_NAMES, STATE_NAMES, TASK, PartSortingEnv
from ray_jobs.part_sorting.expert import demonstrate


def record(
    root: Path,
    episodes: int = 50,
    *,
    image_size: int = 96,
    n_cameras: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    fps: int = 10,
) -> Path:
    """Write `episodes` expert episodes to `root`, silently, and return it; equal seeds give equal episodes.

    `image_size` is in pixels; `progress(done, episodes)` is called after each episode. `root` appears only
    once complete. FileExistsError if it exists already.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists already; remove it or record to another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    env = PartSortingEnv(image_size=image_size, n_cameras=n_cameras, fps=fps)
    episode_seeds = np.random.default_rng(seed).integers(2**31, size=episodes)
    with _quiet(), tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as unfinished:
        dataset = LeRobotDataset.create(
            "local/part_sorting",
            fps,
            _features(env),
            root=Path(unfinished) / "dataset",
            video_backend="pyav",
            rgb_encoder=RGBEncoderConfig(vcodec="h264", crf=18, preset="veryfast"),
            streaming_encoding=True,
            encoder_queue_maxsize=env.episode_steps,  # a full queue would drop frames
            encoder_threads=1,
        )
        try:
            for done, episode_seed in enumerate(episode_seeds.tolist(), start=1):
                for observation, action in demonstrate(env, episode_seed):
                    images = {f"{OBS_IMAGES}.{name}": image for name, image in observation["pixels"].items()}
                    frame = {OBS_STATE: observation["agent_pos"], ACTION: action, **images, "task": TASK}
                    dataset.add_frame(frame)
                dataset.save_episode()
                if progress:
                    progress(done, episodes)
        finally:
            dataset.finalize()  # also when interrupted: its files must be closed before the folder goes
        dataset.root.rename(root)
    return root


def _features(env: PartSortingEnv) -> dict:
    image = {
        "dtype": "video",
        "shape": (env.image_size, env.image_size, 3),
        "names": ["height", "width", "channels"],
    }
    return {
        OBS_STATE: {"dtype": "float32", "shape": (len(STATE_NAMES),), "names": STATE_NAMES},
        ACTION: {"dtype": "float32", "shape": (len(ACTION_NAMES),), "names": ACTION_NAMES},
        # LeRobot writes what it encoded into each camera's entry, so they must not share one.
        **{f"{OBS_IMAGES}.{camera}": image.copy() for camera in env.cameras},
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the encoder's log and the progress bars of `datasets`, one per episode, off the console."""
    no_bars, level = datasets.are_progress_bars_disabled(), av.logging.get_level()
    datasets.disable_progress_bars()
    av.logging.set_libav_level(av.logging.ERROR)
    try:
        yield
    finally:
        av.logging.set_libav_level(av.logging.INFO)  # FFmpeg's default, which PyAV has no way to ask for
        av.logging.set_level(level)  # LeRobot leaves FFmpeg printing to the terminal after each video
        if not no_bars:
            datasets.enable_progress_bars()
