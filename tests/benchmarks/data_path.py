"""The loader alone: how many samples a second does a training get, from LeRobot's reading and from the frame cache?

    uv run python tests/benchmarks/data_path.py [--root=DATASET] [--seconds=10] [--workers=4]

Without `--root` on two data sets made here, both two cameras and AV1: 480x640 and 96x96. Batches of 8 in random
order, ACT's and Diffusion's time steps, full size and half of it. `lerobot` is what `lerobot-train` iterates over, in
this process and in its worker processes; `cache` is what `ray_jobs.train` iterates over. `memcpy` copies the same bytes
from one place in memory to another: nothing can be faster.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from ray_jobs.cli.terminal import quiet

quiet()
os.environ["SVT_LOG"] = "1"  # the AV1 encoder: errors only

import numpy as np  # noqa: E402
import torch  # noqa: E402
from lerobot.configs import RGBEncoderConfig  # noqa: E402
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata  # noqa: E402
from lerobot.datasets.factory import resolve_delta_timestamps  # noqa: E402
from lerobot.policies.act.configuration_act import ACTConfig  # noqa: E402
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from ray_jobs.config.options import DataOptions  # noqa: E402
from ray_jobs.data.dataset import training_batches  # noqa: E402
from ray_jobs.data.frame_cache import open_frames  # noqa: E402

BATCH = 8
POLICIES = {
    "act": ACTConfig(device="cpu", chunk_size=50, n_action_steps=50),
    "diffusion": DiffusionConfig(device="cpu"),
}


def make(root: Path, height: int, width: int, episodes: int = 3, length: int = 100) -> Path:
    """Two cameras over a textured table on which a square moves, with sensor noise; LeRobot's own recording."""
    image = {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
    number = {"dtype": "float32", "shape": (14,), "names": None}
    features = {"observation.state": number, "action": dict(number)}
    features |= {f"observation.images.{camera}": dict(image) for camera in ("top", "wrist")}
    encoder = RGBEncoderConfig(vcodec="libsvtav1", g=2)  # LeRobot's defaults
    dataset = LeRobotDataset.create("local/made", 30, features, root=root, rgb_encoder=encoder)
    rng = np.random.default_rng(0)
    table = sum(  # as much at every scale, as in a photograph
        rng.normal(0, 12, (height // n + 1, width // n + 1, 3)).repeat(n, 0).repeat(n, 1)[:height, :width]
        for n in (1, 2, 4, 8, 16, 32, 64)
    )
    for _ in range(episodes):
        for step in range(length):
            picture = table + rng.normal(128, 4, table.shape)
            top, left = height * step // (2 * length), width * step // (2 * length)
            picture[top : top + height // 6, left : left + height // 6] += (90, -60, -60)
            picture = picture.clip(0, 255).astype(np.uint8)
            numbers = {
                key: rng.standard_normal(14).astype(np.float32) for key in ("observation.state", "action")
            }
            cameras = {f"observation.images.{camera}": picture for camera in ("top", "wrist")}
            dataset.add_frame({**numbers, **cameras, "task": "move"})
        dataset.save_episode()
    dataset.finalize()
    return root


def ms_per_sample(batches: Iterable[dict], seconds: float) -> float:
    """After two batches to warm up."""
    batches = iter(batches)
    for _ in range(2):
        next(batches)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        count += len(next(batches)["index"])
    return (time.perf_counter() - begin) / count * 1e3


def memcpy_ms(frame_bytes: int, frames_per_sample: int) -> float:
    """Copying as many frames out of an array that does not fit into the processor's caches."""
    source = np.random.default_rng(0).integers(0, 256, (2**29 // frame_bytes, frame_bytes), dtype=np.uint8)
    target = np.zeros((BATCH * frames_per_sample, frame_bytes), np.uint8)
    rows = np.random.default_rng(1).integers(0, len(source), (200, len(target)))
    begin = time.perf_counter()
    for some in rows:
        for n, row in enumerate(some):
            target[n] = source[row]
    return (time.perf_counter() - begin) / len(rows) / BATCH * 1e3


def lerobots(dataset: LeRobotDataset, workers: int) -> Iterable[dict]:
    how = {"num_workers": workers, "batch_size": BATCH, "shuffle": True}
    if workers:
        how |= {"prefetch_factor": 4, "persistent_workers": True, "multiprocessing_context": "spawn"}
    while True:
        yield from DataLoader(dataset, **how)


def tell(what: str, ms: float, *against: float) -> None:
    """A line of the table: `against` are the times of pyav in this process, of the best of LeRobot, of memcpy."""
    ratios = [f"{stock / ms:.0f}" for stock in against[:2]] + [f"{ms / bound:.2f}" for bound in against[2:]]
    print(f"{what:44} {ms:10.3f} {1e3 / ms:10.0f} " + " ".join(f"{ratio:>9}" for ratio in ratios), flush=True)


def torchcodec_loads() -> bool:
    """It needs FFmpeg's shared libraries."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def measure(name: str, root: Path, seconds: float, workers: int) -> None:
    meta = LeRobotDatasetMetadata("local/set", root=root)
    backends = ["pyav"] + ["torchcodec"] * torchcodec_loads()
    height, width = meta.features[meta.camera_keys[0]]["shape"][:2]
    print(f"\n{name}: {meta.total_frames} frames, {len(meta.camera_keys)} camera(s) {height}x{width}")
    print(f"{'':44} {'ms/sample':>10} {'samples/s':>10} {'x pyav, 0':>10} {'x best':>8} {'x memcpy':>9}")
    folder = Path(tempfile.mkdtemp())
    for policy, config in POLICIES.items():
        deltas = resolve_delta_timestamps(config, meta)

        def opened(backend: str, deltas=deltas) -> LeRobotDataset:
            return LeRobotDataset(
                "local/set", root=root, delta_timestamps=deltas, video_backend=backend, return_uint8=True
            )

        stock = best = None

        for backend in backends:
            for count in (0, workers):
                ms = ms_per_sample(lerobots(opened(backend), count), seconds)
                tell(f"{policy}, lerobot {backend}, {count} worker processes", ms)
                stock = stock or ms  # pyav, in this process
                best = min(best or ms, ms)
        for size in (None, [height // 2, width // 2]):
            dataset = opened("pyav")
            begin = time.perf_counter()
            frames = open_frames(dataset, DataOptions(cache=str(folder), resize=size), reads=0)
            built = time.perf_counter() - begin
            cfg = SimpleNamespace(
                policy=config, seed=0, batch_size=BATCH, num_workers=1, persistent_workers=True
            )
            rank = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
            batches = training_batches(cfg, dataset, rank, frames=frames)
            entry = next(iter(frames.entries.values()))
            steps = len(config.observation_delta_indices or [0])
            bound = memcpy_ms(entry.frame_bytes, steps * len(frames.entries))
            ms = ms_per_sample(batches, seconds)
            batches.close()
            tell(f"{policy}, cache{f' {size[0]}x{size[1]}' if size else ''}", ms, stock, best, bound)
            print(f"    opened in {built:.2f} s")
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="a LeRobot v3.0 data set; two are made if there is none")
    parser.add_argument("--seconds", type=float, default=10, help="per figure")
    parser.add_argument("--workers", type=int, default=4, help="LeRobot's --num_workers")
    args = parser.parse_args()
    if args.root:
        measure(str(args.root), args.root, args.seconds, args.workers)
        return
    with tempfile.TemporaryDirectory() as folder:
        for height, width in ((480, 640), (96, 96)):
            measure("made here", make(Path(folder) / f"{height}", height, width), args.seconds, args.workers)


if __name__ == "__main__":
    main()
