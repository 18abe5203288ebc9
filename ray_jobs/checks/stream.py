"""Checks of `--data.source=stream`: what the stream cannot do is refused before anything is scheduled."""

import shutil

from lerobot.datasets import LeRobotDatasetMetadata

from ray_jobs.config.errors import InputError
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.units import gigabytes
from ray_jobs.data import ffmpeg, quantiles
from ray_jobs.data.frames import frame_shape
from ray_jobs.data.stream import shuffle_buffer, split_episodes
from ray_jobs.storage import bucket
from ray_jobs.storage.cache_folder import default_folder

FLAG = "--data.source=stream"


def check_flags(recipe: Recipe) -> None:
    """Raises InputError for flags that exclude each other, before the data set is looked for."""
    cfg, options = recipe.lerobot, recipe.options
    root = cfg.dataset.root
    if options.data.source != "stream":
        return
    if root is None:
        raise InputError(
            f"{FLAG} needs --dataset.root: a folder that every node sees, or an address such as s3://bucket/set."
        )
    if options.ray.num_workers == 0:
        raise InputError(f"{FLAG} needs Ray's workers, and --ray.num_workers=0 has none; 1 is enough.")
    if options.ray.min_workers:
        raise InputError(
            f"{FLAG}: --ray.num_workers must be one number, a stream is split among all workers."
        )
    if cfg.dataset.image_transforms.enable:
        raise InputError(
            f"{FLAG}: --dataset.image_transforms.enable=true is not supported, a stream gives images as they are."
        )


def check_data(recipe: Recipe, meta: LeRobotDatasetMetadata) -> list[str]:
    """Raises InputError for data sets that Ray's reader cannot give as `LeRobotDataset` does; returns notices."""
    if recipe.options.data.source != "stream":
        return []
    name = f"{FLAG}: {recipe.lerobot.dataset.repo_id}"
    if meta.depth_keys or meta.has_language_columns:
        raise InputError(f"{name} has depth images or language columns, which Ray's reader does not give.")
    for key, feature in meta.features.items():
        if key in meta.camera_keys:
            if frame_shape(meta, key)[0] != 3:
                raise InputError(f"{name}: {key} has no colours, and Ray's reader gives three channels.")
        elif feature["dtype"] == "string" or len(feature["shape"]) > 1:
            raise InputError(f"{name}: {key} is neither a number nor a vector.")
    policy = recipe.lerobot.policy
    if bucket.is_uri(recipe.lerobot.dataset.root) and quantiles.lacking(policy, meta):
        raise InputError(
            f"{name}: {policy.type} normalizes by quantiles, which meta/stats.json lacks.\n--data.source=local "
            "fetches the data set, once per node, and computes them from it."
        )
    if meta.video_keys:
        ffmpeg.check()
    samples, size = shuffle_buffer(recipe)
    episodes = samples * meta.total_episodes / meta.total_frames
    # Ray lets the buffer grow by half before it makes a new one beside it.
    _room_for_held_out(recipe, meta)
    return [
        f"stream: every worker shuffles among {samples} samples, about {episodes:.3g} episodes ({gigabytes(size)}, "
        "for moments two and a half times that); --data.shuffle_buffer changes it"
    ]


def _room_for_held_out(recipe: Recipe, meta: LeRobotDatasetMetadata) -> None:
    """Held-out episodes lie in files with others, which are fetched as they are."""
    root, cfg = recipe.lerobot.dataset.root, recipe.lerobot
    held_out = split_episodes(cfg, meta, recipe.options.data.eval_episodes)[1]
    if not held_out or not bucket.is_uri(root):
        return
    there = bucket.listing(root, "data", "videos")
    size = sum(int(there[name].split()[0]) for name in bucket.files_of(meta, held_out) if name in there)
    folder = default_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > 0.9 * free:
        raise InputError(
            f"{FLAG}: the files of the held-out episodes {held_out} are {gigabytes(size)}, and {folder} has "
            f"{gigabytes(free)} left. Fewer of them: --data.eval_episodes, or another RAY_JOBS_CACHE."
        )
