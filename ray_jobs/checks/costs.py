"""What training on a data set will cost on this machine, measured on one of its episodes: seconds, not promises."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ray_jobs.checks.dataset import DatasetOptions
from ray_jobs.config.errors import GO_ON, PRUNED
from ray_jobs.config.events import Event, Log, Step
from ray_jobs.config.recipe import Recipe
from ray_jobs.data.frame_cache import FrameCache
from ray_jobs.data.frames import FrameSource
from ray_jobs.data.reader import FrameReader
from ray_jobs.storage.cache_folder import default_folder, free_bytes
from ray_jobs.training import loop

SECONDS = 2  # per figure
STEPS, MOST_STEPS = 4, 200  # of which the first warms up; as many as fit into twice the time


def measure(
    asked: DatasetOptions,
    recipe: Recipe,
    steps: int,
    cost_per_hour: float | None,
    doing: Callable[[str], None],
) -> dict:
    """Samples per second of LeRobot's loader, of the frame cache and of the training step; size of the cache and time
    to build it; hours and price of a training. One worker, this machine's processors.

    Args:
        recipe: What would be trained; its data set's episodes are replaced by one.
        steps: Of that training.
        cost_per_hour: Of this machine, in any currency.
        doing: Told of what is measured next.
    """
    recipe = recipe.copy()
    dataset = asked.open()
    lengths = dataset.meta.episodes["length"]
    episode = int(np.argsort(lengths)[len(lengths) // 2])  # of median length
    asked.dataset.episodes = recipe.lerobot.dataset.episodes = [episode]
    facts = {"batch_size": recipe.lerobot.batch_size, "policy": recipe.lerobot.policy.type}
    with tempfile.TemporaryDirectory(prefix="ray_jobs_doctor_") as folder:
        if dataset.meta.camera_keys and FrameReader.can_read(dataset):
            chosen = asked.data.cache
            keeps = default_folder() if chosen in ("auto", "off") else Path(chosen)
            whole = FrameCache(FrameSource(dataset, asked.data.resize), keeps)
            facts |= {"cache_bytes": whole.bytes(), "to_decode_bytes": whole.missing_bytes()}
            facts["free_disk_bytes"] = free_bytes(keeps)
            doing("measuring: decoding one episode")
            one = FrameCache(FrameSource(asked.open(), asked.data.resize), Path(folder) / "cache")
            begin = time.perf_counter()
            one.fill()
            per_byte = (time.perf_counter() - begin) / one.bytes()
            facts["decode_s"] = per_byte * facts["to_decode_bytes"]
            doing("measuring: the loaders")
            rows = np.random.default_rng(0).integers(lengths[episode], size=(100, recipe.lerobot.batch_size))
            reader, stock = FrameReader(one.dataset, 0, one), asked.open()
            facts["cache_samples_per_s"] = _rate(
                lambda n: reader(rows[n % 100].tolist()), recipe.lerobot.batch_size
            )
            facts["lerobot_samples_per_s"] = _rate(lambda n: stock[int(rows[n % 100][0])], 1)
        doing("measuring: training steps")
        recipe.lerobot.output_dir = Path(folder) / "run"
        recipe.options.data.cache = str(Path(folder) / "cache")
        recipe.lerobot.steps = MOST_STEPS
        events: list[Event] = []
        begin = 0.0

        def report(event: Event) -> None:
            nonlocal begin
            events.append(event)
            begin = begin or (time.perf_counter() if isinstance(event, Step) else 0.0)

        def enough() -> str:
            done = sum(isinstance(event, Log) for event in events)
            return PRUNED if done >= STEPS and time.perf_counter() - begin > 2 * SECONDS else GO_ON

        device = recipe.device or recipe.lerobot.policy.device
        loop.train(recipe, device=device, report=report, should_stop=enough)
    logged = [event.values for event in events if isinstance(event, Log)][1:]
    batch = recipe.lerobot.batch_size
    step_s = statistics.median(e["train/step_s"] - e["train/data_s"] for e in logged)
    facts["step_samples_per_s"] = batch / step_s
    # Batches are read while the step before computes.
    facts["step_s"] = max(step_s, batch / facts.get("cache_samples_per_s", math.inf))
    facts |= {"steps": steps, "train_s": steps * facts["step_s"] + facts.get("decode_s", 0.0)}
    if cost_per_hour is not None:
        facts["cost"] = cost_per_hour * facts["train_s"] / 3600
    return facts


def _rate(read: Callable[[int], object], samples: int) -> float:
    """Samples per second of calling `read` again and again; the first call warms up."""
    read(0)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        count += 1
        read(count)
    return count * samples / (time.perf_counter() - begin)
