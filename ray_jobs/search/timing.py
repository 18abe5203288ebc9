"""What a slot of a search does, timed before there is one: its start, one trial's steps, validation, saving, and the rest.

Two short trainings in a process of its own, on as many of the data set's episodes as they read: the first one pays for
what a slot pays for once.
"""

import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lerobot.datasets import LeRobotDataset

from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.cluster.worker import train_here
from ray_jobs.config.events import Event, Log, Saved, Validated
from ray_jobs.config.recipe import Recipe
from ray_jobs.data.dataset import make_datasets
from ray_jobs.data.frame_cache import FrameCache, why_not
from ray_jobs.data.frames import FrameSource
from ray_jobs.data.reader import FrameReader
from ray_jobs.storage.cache_folder import default_folder

FEW, MOST, SECONDS = 6, 100, 3  # steps of the second training, which are to take so many seconds
WARM_UP = 2  # steps that are not counted


@dataclass
class Costs:
    """Seconds, of one slot."""

    device: str
    step_s: float
    eval_s: float
    """Of a validation, and of the checkpoint that is saved after it."""
    trial_s: float
    """Of a trial beside both: checks, the policy, its first steps, the end."""
    decode_s: float
    """Until the frames of the whole data set are in the cache, for a process that decodes alone."""
    inside_s: float
    """What would not be paid for in a slot: the timing itself."""
    node: str


def time_a_slot(words: list[str], trials: int) -> Costs:
    """Train twice, for a few steps, in folders that are thrown away.

    Args:
        words: The command line of a trial, without its folder.
        trials: How many will read the data (see `Recipe.trainings`).
    """
    with tempfile.TemporaryDirectory(prefix="ray_jobs_timing_") as folder:
        recipe = resolve([*words, f"--output_dir={Path(folder) / 'first'}"])
        recipe = preflight.check(recipe).knowing(trainings=trials)
        begin = time.monotonic()
        decode_s, timed = _on_a_few_episodes(recipe, Path(folder) / "frames")
        decoding = time.monotonic() - begin
        first = _train(recipe, FEW, timed)
        steps = max(FEW, min(MOST, int(SECONDS / first["step_s"])))
        # As a trial does that finds the process warm.
        begin = time.monotonic()
        again = resolve([*words, f"--output_dir={Path(folder) / 'second'}"])
        again = preflight.check(again)
        checks = time.monotonic() - begin
        for name in ("dataset", "tolerance_s"):
            setattr(again.lerobot, name, getattr(recipe.lerobot, name))
        again.options.data = recipe.options.data
        second = _train(again, steps, timed)
    trial_s = checks + second["rest_s"]
    spent = first["wall_s"] + checks + second["wall_s"] + decoding
    return Costs(
        device=second["device"],
        step_s=second["step_s"],
        eval_s=second["eval_s"],
        trial_s=trial_s,
        decode_s=decode_s,
        inside_s=spent - max(0.0, first["rest_s"] - second["rest_s"]),
        node=platform.node(),
    )


def _on_a_few_episodes(recipe: Recipe, folder: Path) -> tuple[float, Callable[[dict], float]]:
    """Let a recipe read a few of its episodes, decoded into `folder`, or as it would without a cache.

    Returns:
        Seconds to decode the rest, and what a step takes by what is logged of it: reading is part of that where nothing is
        read ahead out of a cache.
    """
    cfg, data = recipe.lerobot, recipe.options.data
    validations = cfg.steps // recipe.eval_steps if recipe.eval_steps else 0
    read = (
        cfg.steps * cfg.batch_size * recipe.context.trainings,
        validations * (cfg.max_eval_samples or 10**9) * recipe.context.trainings,
    )
    whole = [of_set for of_set in make_datasets(cfg, data.eval_episodes, data.resize) if of_set is not None]
    decode_s, chosen, keeps = 0.0, data.cache, Path(data.cache)
    if chosen == "auto":
        keeps = default_folder()
    missing = []
    for of_set, reads in zip(whole, read, strict=False):
        if chosen == "off" or not of_set.meta.camera_keys or not FrameReader.can_read(of_set):
            continue
        cache = FrameCache(FrameSource(of_set, data.resize), keeps)
        need = cache.missing_bytes()
        if not cache.entries or (chosen == "auto" and need and why_not(cache, need, reads)):
            continue
        missing.append(need)
    few = [
        _longest(of_set, frames)
        for of_set, frames in zip(whole, (MOST * cfg.batch_size, cfg.max_eval_samples), strict=False)
    ]
    cfg.dataset.episodes, cfg.dataset.eval_split = few[0], 0.0
    data.eval_episodes = few[1] if len(few) > 1 else None
    if not missing:
        data.cache = "off"
        cameras = bool(whole[0].meta.camera_keys)
        return 0.0, lambda log: log["train/step_s"] - (0.0 if cameras else log["train/data_s"])
    data.cache = str(folder)
    for of_set in make_datasets(copy.deepcopy(cfg), data.eval_episodes, data.resize):
        cache = FrameCache(FrameSource(of_set, data.resize), folder)
        begin = time.monotonic()
        cache.fill()
        decode_s = max(decode_s, (time.monotonic() - begin) / max(1, cache.bytes()))
    return decode_s * sum(missing), lambda log: log["train/step_s"] - log["train/data_s"]


def _longest(of_set: LeRobotDataset, frames: int | None) -> list[int]:
    """Episodes that have so many frames together: the longest, for of the shortest nothing may be left."""
    lengths = list(of_set.meta.episodes["length"])
    chosen: list[int] = []
    for episode in sorted(of_set.episodes or range(len(lengths)), key=lambda e: -lengths[e]):
        if chosen and sum(lengths[e] for e in chosen) >= (frames or 0):
            break
        chosen.append(int(episode))
    return sorted(chosen)


def _train(recipe: Recipe, steps: int, timed: Callable[[dict], float]) -> dict:
    """Train as a slot does; how long it took, and what of it were steps and validations."""
    recipe = replace(recipe.copy(), eval_steps=steps)
    recipe.lerobot.steps = recipe.lerobot.save_freq = steps
    recipe.lerobot.log_freq, recipe.lerobot.wandb.enable = 1, False
    recipe.options.ray.num_workers = 1
    told: list[tuple[float, Event]] = []
    begin = time.monotonic()
    summary = train_here(recipe, lambda event: told.append((time.monotonic(), event)), lambda: "")
    wall_s = time.monotonic() - begin
    logs = [event.values for _, event in told if isinstance(event, Log)]
    at = {type(event): when for when, event in told}  # the last of each
    step_s = statistics.median(timed(log) for log in logs[WARM_UP:])
    eval_s = at.get(Saved, at.get(Validated, at[Log])) - at[Log]
    whole_steps_s = sum(log["train/step_s"] for log in logs[WARM_UP:]) + WARM_UP * step_s
    return {
        "device": summary["device"],
        "wall_s": wall_s,
        "step_s": step_s,
        "eval_s": eval_s,
        "rest_s": max(0.0, wall_s - whole_steps_s - eval_s),
    }
