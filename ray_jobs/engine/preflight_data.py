"""Checks of the data set, before anything expensive is scheduled: is it there, whole, and in today's format?"""

import contextlib
import json
import math
import shlex
from collections import Counter
from pathlib import Path

import av
import pyarrow.parquet
from lerobot.configs.default import DatasetConfig
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.datasets import CODEBASE_VERSION, LeRobotDatasetMetadata
from lerobot.datasets.utils import DatasetInfo, has_legacy_hub_download_metadata
from lerobot.processor.converters import to_tensor
from lerobot.utils.constants import ACTION, HF_LEROBOT_HOME, IMAGENET_STATS
from lerobot.utils.feature_utils import dataset_to_policy_features

from ray_jobs.engine import bucket
from ray_jobs.engine.errors import InputError
from ray_jobs.engine.explain import first_line, hub_answer, hub_or_cache
from ray_jobs.engine.frames import frame_shape, set_frame_size
from ray_jobs.engine.preflight_columns import check_metadata, check_tables
from ray_jobs.engine.recipe import Recipe
from ray_jobs.engine.trust import check_info, read_json

# What LeRobot's normalizer asks for; quantiles are computed here where they are missing.
NORMALIZED_BY = {NormalizationMode.MEAN_STD: ("mean", "std"), NormalizationMode.MIN_MAX: ("min", "max")}
VIDEO_BACKENDS = ("pyav", "torchcodec", "video_reader")


def where_it_is(dataset: DatasetConfig) -> tuple[str, Path | None]:
    """What the user called the data set, and where it lies here: None if LeRobot will ask the Hub for it. Of one in
    a bucket, the metadata alone."""
    if dataset.root is not None:
        here = bucket.fetch(dataset.root) if bucket.is_uri(dataset.root) else Path(dataset.root)
        return f"--dataset.root={dataset.root}", here
    name, home = f"--dataset.repo_id={dataset.repo_id}", HF_LEROBOT_HOME / dataset.repo_id
    if home.exists() and not has_legacy_hub_download_metadata(home):
        return f"{name} in {HF_LEROBOT_HOME}", home
    return name, None


def open_dataset(dataset: DatasetConfig) -> LeRobotDatasetMetadata:
    """Open the data set's metadata, and say what is wrong with it better than LeRobot does."""
    if dataset.video_backend not in VIDEO_BACKENDS:
        raise InputError(
            f"--dataset.video_backend={dataset.video_backend}: must be {' or '.join(VIDEO_BACKENDS[:2])}."
        )
    name, root = where_it_is(dataset)
    if root is not None:
        _info(name, root, dataset.repo_id)
        # A missing file would make LeRobot ask the Hub for the whole data set.
        episodes = sorted((root / "meta" / "episodes").glob("*/*.parquet")) or [root / "meta" / "episodes"]
        for path in (root / "meta" / "tasks.parquet", *episodes):
            _whole(name, root, path)
        if (root / "meta" / "stats.json").exists():  # not all policies need one, nor does LeRobot
            _whole(name, root, root / "meta" / "stats.json")
    try:
        with contextlib.nullcontext() if root else hub_or_cache():
            here = None if dataset.root is None else root
            meta = LeRobotDatasetMetadata(dataset.repo_id, root=here, revision=dataset.revision)
    except Exception as error:
        if root is None:
            raise InputError(f"{name}: not in {HF_LEROBOT_HOME}, and {hub_answer(error)}") from None
        raise InputError(f"{name}: the data set cannot be opened: {first_line(error)}") from None
    for key, numbers in (meta.stats or {}).items():
        try:  # LeRobot makes tensors of all of them, also of those that no policy reads
            to_tensor(numbers)
        except Exception:
            raise InputError(f"{name}: meta/stats.json: {key} has something else than numbers.") from None
    found = len(meta.episodes or ())
    if not found or found < meta.total_episodes:
        raise InputError(
            f"{name}: meta/info.json counts {meta.total_episodes} episodes, meta/episodes has {found}."
        )
    check_metadata(name, meta)
    # LeRobot trains on what is there, whatever meta/info.json counts.
    meta.info.total_episodes, meta.info.total_frames = found, meta.episodes["dataset_to_index"][-1]
    return meta


def _info(name: str, root: Path, repo_id: str) -> None:
    """Check info.json, above all the format's version."""
    info = root / "meta" / "info.json"
    if not root.exists():
        raise InputError(f"{name}: there is no such folder.")
    if not info.is_file():
        raise InputError(f"{name}: not a LeRobot data set, it has no meta/info.json.")
    try:
        content = read_json(info)
        version = str(content["codebase_version"])
        if version.startswith(CODEBASE_VERSION.split(".")[0] + "."):
            check_info(content)
            DatasetInfo.from_dict(content)
            return
    except Exception as error:
        raise InputError(
            f"{name}: meta/info.json is damaged ({type(error).__name__}: {first_line(error)})."
        ) from None
    if version == "v2.1":
        raise InputError(
            f"{name}: a LeRobot v2.1 data set; this LeRobot reads {CODEBASE_VERSION}. This converts it in place:\n"
            f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={shlex.quote(repo_id)} "
            f"--root={shlex.quote(str(root))} --push-to-hub=false"
        )
    raise InputError(
        f"{name}: a LeRobot {version} data set; this LeRobot reads {CODEBASE_VERSION} and can convert v2.1."
    )


def _whole(name: str, root: Path, path: Path, what: str = "") -> None:
    """Refuse a file of the data set that is missing or torn, as far as its first and last bytes show."""
    file = f"{name}: {path.relative_to(root)}{what}"
    if not path.is_file():
        raise InputError(f"{file} is missing.")
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".parquet":
            pyarrow.parquet.read_metadata(path)
        else:
            av.open(str(path)).close()
    except Exception as error:
        raise InputError(f"{file} is damaged: {first_line(error)}") from None


def check_statistics(recipe: Recipe, meta: LeRobotDatasetMetadata) -> None:
    """See that meta/stats.json has what LeRobot will not do without, of what the policy reads. A feature without any
    statistics it trains on as it is, and so it is here, with a notice."""
    dataset, policy, stats = recipe.lerobot.dataset, recipe.lerobot.policy, meta.stats or {}
    file = f"{where_it_is(dataset)[0]}: meta/stats.json"
    imagenets = [k for k in meta.camera_keys if dataset.use_imagenet_stats and k not in meta.depth_keys]
    if cameras := [key for key in imagenets if key not in stats]:
        reason = "is missing" if meta.stats is None else f"has no statistics of {', '.join(cameras)}"
        raise InputError(
            f"{file} {reason}, and LeRobot then has no place for those of ImageNet that it gives cameras.\n"
            "Cameras as they are, not normalized: --dataset.use_imagenet_stats=false"
        )
    as_they_are = []
    for key, feature in dataset_to_policy_features(meta.features).items():
        mode = policy.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        read = key == ACTION or feature.type is not FeatureType.ACTION
        if not read or mode is NormalizationMode.IDENTITY or meta.features[key]["dtype"] == "string":
            continue
        there = {*stats.get(key, ()), *(IMAGENET_STATS if key in imagenets else ())}
        if key not in stats:
            as_they_are.append(key)
        elif lacking := [name for name in NORMALIZED_BY.get(mode, ()) if name not in there]:
            raise InputError(
                f"{file} has no {' and no '.join(lacking)} of {key}, by which {policy.type} normalizes it."
            )
    if as_they_are:
        recipe.notices.append(
            f"warning: {file} has no statistics of {', '.join(as_they_are)}, which the policy is given as it is, not "
            "normalized (as in lerobot-train)."
        )


def check_files(
    dataset: DatasetConfig, meta: LeRobotDatasetMetadata, held_out: list[int] | None = None
) -> None:
    """See that every file that will be read is there, and begins and ends as it should."""
    name, root = where_it_is(dataset)
    if root is None:
        return  # the workers download it
    chosen = dataset.episodes
    wanted = set(range(meta.total_episodes) if chosen is None else [*chosen, *(held_out or ())])
    if bucket.is_uri(dataset.root):
        there = bucket.listing(dataset.root, "data", "videos")
        for episode in sorted(wanted):
            for file in bucket.files_of(meta, (episode,)):
                if file not in there:
                    raise InputError(f"{name}: {file} (episode {episode} is in it) is missing.")
        return
    columns = [("data", meta.data_path, None)]
    columns += [(f"videos/{camera}", meta.video_path, camera) for camera in meta.video_keys]
    for column, pattern, camera in columns:
        chunks, files = (list(meta.episodes[f"{column}/{index}_index"]) for index in ("chunk", "file"))
        first = {}  # (chunk, file) -> the first episode in it
        for episode, place in enumerate(zip(chunks, files, strict=True)):
            # LeRobot opens all parquet files, whatever episodes are asked for.
            if camera is None or episode in wanted:
                first.setdefault(place, episode)
        for (chunk, file), episode in first.items():
            try:
                name_of_file = pattern.format(chunk_index=chunk, file_index=file, video_key=camera)
            except ValueError as error:
                raise InputError(f"{name}: meta/episodes: file {chunk}/{file}: {error}.") from None
            path = root / name_of_file
            _whole(name, root, path, f" (episode {episode} is in it)")
    check_tables(name, meta)


def check_resize(
    size: list[int] | None, meta: LeRobotDatasetMetadata, rename_map: dict[str, str] | None = None
) -> None:
    """See that the cameras can be resized; then the metadata tell of images of that size.

    LeRobot's resize step takes every observation with "image" in its name, and nothing else.
    """
    if size is None:
        return
    flag = f"--data.resize={size}".replace(" ", "")
    cameras = {key: frame_shape(meta, key) for key in meta.camera_keys}
    if not cameras:
        raise InputError(f"{flag}: the data set has no cameras.")
    if meta.depth_keys or meta.has_language_columns:
        raise InputError(
            f"{flag}: data sets with depth images or language columns are read by LeRobot, at full size."
        )
    for key in cameras:
        if "image" not in (rename_map or {}).get(key, key):
            raise InputError(
                f"{flag}: LeRobot's resize step goes by names, and {key} has no 'image' in its name."
            )
    if all(size[0] > height or size[1] > width for _, height, width in cameras.values()):
        recorded = ", ".join(f"{height}x{width}" for _, height, width in set(cameras.values()))
        raise InputError(f"{flag}: larger than the recorded images ({recorded}).")
    set_frame_size(meta, size)


def check_episodes(flag: str, episodes: list[int], total: int) -> None:
    """Raises InputError unless these are some of the data set's episodes, each once."""
    if not episodes or len(set(episodes)) < len(episodes):
        fault = "names an episode twice" if episodes else "name at least one episode, or leave it out"
        raise InputError(f"--{flag}={episodes}: {fault}.")
    if wrong := sorted(set(episodes) - set(range(total))):
        raise InputError(
            f"--{flag}={episodes}: there is no episode {wrong[0]}; the data set has 0 to {total - 1}."
        )


def choose_episodes(recipe: Recipe, meta: LeRobotDatasetMetadata) -> None:
    """Work out the training episodes and see that some are left."""
    dataset, held_out = recipe.lerobot.dataset, recipe.options.data.eval_episodes
    everything = list(range(meta.total_episodes))
    for name, episodes in (("dataset.episodes", dataset.episodes), ("data.eval_episodes", held_out)):
        if episodes is not None:
            check_episodes(name, episodes, meta.total_episodes)
    chosen = dataset.episodes if dataset.episodes is not None else everything
    if held_out is not None:
        dataset.episodes = [episode for episode in chosen if episode not in set(held_out)]
        if not dataset.episodes:
            raise InputError(
                f"--data.eval_episodes={held_out} holds out every episode: none is left to train on."
            )
        if recipe.eval_steps == 0:
            save_freq = recipe.lerobot.save_freq
            recipe.eval_steps = save_freq if save_freq > 0 else recipe.lerobot.steps
    elif dataset.eval_split:
        tasks = list(meta.episodes["tasks"])
        per_task = Counter(tasks[episode][0] if tasks[episode] else "" for episode in chosen)
        left = sum(count - math.ceil(count * dataset.eval_split) for count in per_task.values())
        if left == 0:
            raise InputError(
                f"--dataset.eval_split={dataset.eval_split} leaves no training episode: LeRobot rounds up per task "
                f"({len(per_task)} task(s), {len(chosen)} episode(s)). A smaller share, or --data.eval_episodes."
            )
    drop, lengths = getattr(recipe.lerobot.policy, "drop_n_last_frames", 0), list(meta.episodes["length"])
    if max(lengths[episode] for episode in dataset.episodes or everything) <= drop:
        raise InputError(
            f"--policy.drop_n_last_frames={drop}: no training episode is longer, none would be left."
        )
