"""Camera images of a data set, decoded: single frames in any order, or a whole episode from front to back.

Both give LeRobot's frames bit for bit (`decode_video_frames` with its PyAV backend), and both shrink them to
`--data.resize` the way LeRobot's `image_crop_resize_processor` does at run time.
"""

import contextlib
import io
import shlex
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.video_utils import FrameTimestampError, decode_video_frames
from lerobot.processor import ImageCropResizeProcessorStep, NormalizerProcessorStep, PolicyProcessorPipeline
from PIL import Image
from torchvision.transforms import functional

from ray_jobs.config.errors import RunError
from ray_jobs.data.lerobot_internals import video_backend

# What a resized frame depends on beside its size; part of a cache's fingerprint.
DECODER = threading.Lock()  # LeRobot keeps one torchcodec decoder per file, and they are not thread-safe


def frame_shape(meta: LeRobotDatasetMetadata, key: str) -> tuple[int, int, int]:
    """(C, H, W) of a camera's frames. Data sets say (H, W, C), or (C, H, W) if they name it like that."""
    feature = meta.features[key]
    shape, names = tuple(feature["shape"]), feature.get("names") or ()
    return shape if names and names[0] in ("channel", "channels") else (shape[2], shape[0], shape[1])


def set_frame_size(meta: LeRobotDatasetMetadata, size: list[int] | None) -> None:
    """Let a data set's metadata tell of frames of `size` (height, width), which is what a policy will be given."""
    if not size:
        return
    for key in meta.camera_keys:
        channels = frame_shape(meta, key)[0]
        meta.features[key] |= {"shape": (*size, channels), "names": ["height", "width", "channels"]}


def resized(frames: torch.Tensor, size: list[int] | None) -> torch.Tensor:
    """uint8 frames (..., C, H, W) at `size`, by the kernel of LeRobot's resize step."""
    if size is None or list(frames.shape[-2:]) == list(size):
        return frames
    flat = frames.reshape(-1, *frames.shape[-3:])
    return functional.resize(flat, list(size)).view(*frames.shape[:-2], *size)


def add_resize_step(preprocessor: PolicyProcessorPipeline, size: list[int] | None) -> None:
    """Let a policy's preprocessor resize camera images before it normalizes them, as it will have to at run time.
    In training they come at that size, and the step does nothing."""
    if size is None:
        return
    steps = [step for step in preprocessor.steps if not isinstance(step, ImageCropResizeProcessorStep)]
    normalizer = next(n for n, step in enumerate(steps) if isinstance(step, NormalizerProcessorStep))
    steps.insert(normalizer, ImageCropResizeProcessorStep(resize_size=tuple(size)))
    preprocessor.steps = steps


class FrameSource:
    """The frames of a data set's videos and images, decoded when asked for.

    Args:
        dataset: A LeRobot data set, perhaps of some episodes only.
        size: Height and width the frames are resized to; None leaves them as they are.
    """

    def __init__(self, dataset: LeRobotDataset, size: list[int] | None = None):
        meta = dataset.meta
        self.dataset, self.meta, self.size = dataset, meta, size
        self.file_start = {key: meta.episodes[f"videos/{key}/from_timestamp"] for key in meta.video_keys}

    def shape(self, key: str) -> tuple[int, int, int]:
        """(C, H, W) of a camera's first frame: meta/info.json may say something else, which LeRobot does not mind."""
        said = frame_shape(self.meta, key)
        with contextlib.suppress(Exception):  # it cannot be read: who decodes it will say so
            if key in self.meta.image_keys:
                channels, height, width = self._stored(key, 0).shape
                return channels, height, width
            with av.open(str(self._file(0, key))) as container:
                stream = container.streams.video[0]
                return said[0], stream.height, stream.width
        return said

    def video(self, key: str, episode: int, timestamps: list[float]) -> torch.Tensor:
        """uint8 frames of a video camera: (C, H, W), or (T, C, H, W) with more than one timestamp."""
        path = self._file(episode, key)
        backend = video_backend(self.dataset)
        start = self.file_start[key][episode]
        with _named(f"{key} of episode {episode} from {path}", self.dataset):
            with DECODER if backend == "torchcodec" else contextlib.nullcontext():
                frames = decode_video_frames(
                    path,
                    [start + t for t in timestamps],
                    self.dataset.tolerance_s,
                    backend,
                    return_uint8=True,
                ).squeeze(0)
            return resized(frames, self.size)

    def image(self, key: str, row: int) -> torch.Tensor:
        """The uint8 frame (C, H, W) of an image camera at a row of the (filtered) table."""
        with _named(f"{key} of row {row}", self.dataset):
            return resized(self._stored(key, row), self.size)

    def _stored(self, key: str, row: int) -> torch.Tensor:
        stored = self.dataset.hf_dataset.data.column(key)[row].as_py()
        data = io.BytesIO(stored["bytes"]) if stored["bytes"] else self.dataset.root / stored["path"]
        pixels = np.array(Image.open(data))
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def episode(self, key: str, episode: int, rows: range, timestamps: np.ndarray) -> Iterator[torch.Tensor]:
        """All frames of an episode in order, at a fraction of the price of single ones.

        Args:
            rows, timestamps: The episode's rows in the (filtered) table, and what it says there.
        """
        if key in self.meta.image_keys:
            yield from (self.image(key, row) for row in rows)
            return
        if (np.diff(timestamps) < 0).any():  # back and forth, which single frames allow
            yield from (self.video(key, episode, [second]) for second in timestamps.tolist())
            return
        path = self._file(episode, key)
        with _named(f"{key} of episode {episode} from {path}", self.dataset):
            wanted = [self.file_start[key][episode] + t for t in timestamps.tolist()]
            for frame in _decode_in_order(path, wanted, self.dataset.tolerance_s):
                yield resized(frame, self.size)

    def _file(self, episode: int, key: str) -> Path:
        return self.dataset.root / self.meta.get_video_file_path(episode, key)


def _decode_in_order(path: Path, wanted: list[float], tolerance_s: float) -> Iterator[torch.Tensor]:
    """For each of the ascending timestamps the frame nearest to it, as `decode_video_frames_pyav` picks it: of
    the last one before and the first one not before, compared in float32."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        unit = stream.time_base
        assert unit is not None  # every stream of a file has one
        container.seek(round(wanted[0] / unit) - 1, backward=True, stream=stream)
        decoded = (frame for frame in container.decode(stream) if frame.pts is not None)
        before = at = next(decoded)
        for second in wanted:
            while _seconds(at, unit) < second and (following := next(decoded, None)) is not None:
                before, at = at, following
            away = {
                frame: abs(np.float32(_seconds(frame, unit)) - np.float32(second)) for frame in (before, at)
            }
            nearest = min(away, key=away.__getitem__)
            if not away[nearest] < tolerance_s:
                raise NoFrame(f"no frame at {second:.4f} s, the nearest is {away[nearest]:.4f} s away")
            yield torch.from_numpy(nearest.to_ndarray(format="rgb24")).permute(2, 0, 1).contiguous()


def _seconds(frame: av.VideoFrame, unit: Fraction) -> float:
    assert frame.pts is not None  # others were left out
    return float(frame.pts * unit)


class NoFrame(RunError):
    """A timestamp has no frame within `--tolerance_s`. LeRobot stops there, too, once it comes to that row."""


@contextlib.contextmanager
def _named(what: str, dataset: LeRobotDataset) -> Iterator[None]:
    """Let a failure tell which camera, episode and file it is about."""
    try:
        yield
    except (FrameTimestampError, NoFrame) as error:
        why = error if isinstance(error, NoFrame) else "a timestamp has no frame"
        where = f"--dataset.repo_id={shlex.quote(dataset.repo_id)} --dataset.root={shlex.quote(str(dataset.root))}"
        raise NoFrame(
            f"cannot read {what}: {why} (--tolerance_s={dataset.tolerance_s}). What would do:\n"
            f"python -m ray_jobs.doctor {where} --measure=false"
        ) from error
    except RunError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"cannot read {what}: {reason}") from error
