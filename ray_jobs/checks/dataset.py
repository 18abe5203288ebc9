"""Checks of the data set, before anything expensive is scheduled: is it there, whole, and in today's format?"""

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from lerobot.configs.default import DatasetConfig
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.utils import has_legacy_hub_download_metadata
from lerobot.processor.converters import to_tensor
from lerobot.utils.constants import (
    ACTION,
    DEFAULT_FEATURES,
    HF_LEROBOT_HOME,
    IMAGENET_STATS,
    OBS_IMAGES,
    OBS_PREFIX,
    OBS_STATE,
)
from lerobot.utils.feature_utils import dataset_to_policy_features

from ray_jobs.checks.columns import check_metadata, check_tables
from ray_jobs.checks.dataset_files import metadata_faults, missing_files, refuse, wrong_episodes
from ray_jobs.config.errors import InputError, all_mistakes, first_line
from ray_jobs.config.options import DataOptions, RayOptions
from ray_jobs.config.recipe import Recipe
from ray_jobs.data.columns import check_rows
from ray_jobs.data.frames import frame_shape, set_frame_size
from ray_jobs.data.stream import split_episodes
from ray_jobs.policies.build import with_features
from ray_jobs.storage import bucket
from ray_jobs.storage.hub import hub_answer, hub_or_cache

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
        refuse(name, metadata_faults(root, dataset.repo_id))
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


def check_statistics(recipe: Recipe, meta: LeRobotDatasetMetadata) -> list[str]:
    """See that meta/stats.json has what LeRobot will not do without, of what the policy reads. A feature without any
    statistics it trains on as it is, and so it is here: that is the notice, if there is one."""
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
    if not as_they_are:
        return []
    return [
        f"warning: {file} has no statistics of {', '.join(as_they_are)}, which the policy is given as it is, not "
        "normalized (as in lerobot-train)."
    ]


def misnamed(meta: LeRobotDatasetMetadata) -> str | None:
    """What to say of features that no policy finds, since LeRobot goes by names: `action`, `observation.*`; None if
    there is an action, and no camera is called otherwise."""
    features = dataset_to_policy_features(meta.features)
    cameras = [key for key in meta.camera_keys if not key.startswith(OBS_PREFIX)]
    if ACTION in features and not cameras:
        return None
    others = [
        k for k in meta.features if k not in (*DEFAULT_FEATURES, ACTION) and not k.startswith(OBS_PREFIX)
    ]
    better = {key: f"{OBS_IMAGES}.{key.rpartition('.')[2]}" for key in cameras}
    if ACTION not in features:
        guess = next((key for key in others if key.startswith(ACTION) and key not in better), None)
        better |= {guess: ACTION} if guess else {}
    if OBS_STATE not in features:
        guess = next((key for key in others if "state" in key.lower() and key not in better), None)
        better |= {guess: OBS_STATE} if guess else {}
    lacking = "" if ACTION in features else f"the data set has no '{ACTION}'; "
    unread = (
        f"no policy reads {', '.join(others)}: LeRobot goes by names"
        if others
        else f"it has {named(features)}"
    )
    renaming = (
        f".\nRename {', '.join(f'{a} to {b}' for a, b in better.items())}, everywhere: in meta/info.json, meta/stats.json, the "
        "columns of data/ and meta/episodes/, the folders of videos/."
    )
    return f"{lacking}{unread}{renaming if better else '.'}"


def unfit(policy: PreTrainedConfig, features: dict[str, PolicyFeature]) -> str | None:
    """Why a policy cannot be trained on such features, with what they are; None if it can."""
    kinds = {feature.type for feature in features.values()}
    # pi0, pi0.5 and SmolVLA fill in for a camera that is missing, but not for all of them, and stop at the first step.
    if hasattr(policy, "empty_cameras") and FeatureType.VISUAL not in kinds:
        return f"at least one camera is needed. It has {named(features)}."
    try:
        with_features(policy, features).validate_features()
    except Exception as error:
        return f"{first_line(error).replace('`', '')} It has {named(features)}."
    return None


def named(features: dict) -> str:
    """A data set's or a policy's inputs, in words."""
    return ", ".join(sorted(key for key in features if key != ACTION)) or "no observations"


def check_files(
    dataset: DatasetConfig, meta: LeRobotDatasetMetadata, held_out: list[int] | None = None
) -> None:
    """See that every file that will be read is there, and begins and ends as it should."""
    name, root = where_it_is(dataset)
    if root is None:
        return  # the workers download it
    refuse(name, file_faults(dataset, meta, held_out))
    if not bucket.is_uri(dataset.root):
        check_tables(name, meta)


def file_faults(
    dataset: DatasetConfig, meta: LeRobotDatasetMetadata, held_out: list[int] | None = None
) -> list[str]:
    """What is missing or torn of the files that will be read."""
    chosen = dataset.episodes
    wanted = set(range(meta.total_episodes) if chosen is None else [*chosen, *(held_out or ())])
    if bucket.is_uri(dataset.root):
        there = bucket.listing(dataset.root, "data", "videos")
        needed = {file: e for e in sorted(wanted, reverse=True) for file in bucket.files_of(meta, (e,))}
        return [f"{f} (episode {e} is in it) is missing." for f, e in needed.items() if f not in there]
    return missing_files(meta.root, wanted)


def check_resize(
    size: list[int] | None, meta: LeRobotDatasetMetadata, rename_map: dict[str, str] | None = None
) -> None:
    """See that the cameras can be resized.

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


def check_episodes(flag: str, episodes: list[int], total: int) -> None:
    """Raises InputError unless these are some of the data set's episodes, each once."""
    with all_mistakes() as mistakes:
        mistakes += wrong_episodes(flag, episodes, total)


def with_episodes(recipe: Recipe, meta: LeRobotDatasetMetadata) -> Recipe:
    """The recipe with its training and its held-out episodes.

    Raises:
        InputError: There are no such episodes, or none is left to train on.
    """
    recipe = recipe.copy()
    dataset, held_out = recipe.lerobot.dataset, recipe.options.data.eval_episodes
    everything = list(range(meta.total_episodes))
    for name, episodes in (("dataset.episodes", dataset.episodes), ("data.eval_episodes", held_out)):
        if episodes is not None:
            check_episodes(name, episodes, meta.total_episodes)
    chosen = dataset.episodes if dataset.episodes is not None else everything
    if held_out is not None:
        recipe = recipe.knowing(held_out=tuple(held_out))
        dataset.episodes = [episode for episode in chosen if episode not in set(held_out)]
        if not dataset.episodes:
            raise InputError(
                f"--data.eval_episodes={held_out} holds out every episode: none is left to train on."
            )
        if recipe.eval_steps == 0:
            save_freq = recipe.lerobot.save_freq
            recipe = replace(recipe, eval_steps=save_freq if save_freq > 0 else recipe.lerobot.steps)
        training = dataset.episodes
    elif dataset.eval_split:
        training, held_out = split_episodes(recipe.lerobot, meta, None)
        recipe = recipe.knowing(held_out=tuple(held_out))
        share, count = dataset.eval_split, len(held_out)
        if not training:
            raise InputError(
                f"--dataset.eval_split={share} leaves no training episode: LeRobot rounds up per task, of which there "
                f"are {_tasks(meta, chosen)} in {len(chosen)} episode(s). A smaller share, or --data.eval_episodes."
            )
        if count > 1.5 * share * len(chosen):
            recipe = recipe.noting(
                f"warning: --dataset.eval_split={share} holds out {count} of {len(chosen)} episodes, since LeRobot rounds "
                f"up for each of {_tasks(meta, chosen)} task(s); --data.eval_episodes='[...]' names fewer."
            )
    else:
        training = chosen
    drop = getattr(recipe.lerobot.policy, "drop_n_last_frames", None) or 0
    lengths = list(meta.episodes["length"])
    if max(lengths[episode] for episode in training) <= drop:
        raise InputError(
            f"--policy.drop_n_last_frames={drop}: no training episode is longer, none would be left."
        )
    return recipe


def _tasks(meta: LeRobotDatasetMetadata, episodes: list[int]) -> int:
    """How many tasks LeRobot finds in these episodes: it goes by each one's first."""
    tasks = list(meta.episodes["tasks"])
    return len({tasks[episode][0] if tasks[episode] else "" for episode in episodes})


@dataclass
class DatasetOptions:
    """Which data set, how it is read, and on which cluster."""

    dataset: DatasetConfig
    data: DataOptions = field(default_factory=DataOptions)
    ray: RayOptions = field(default_factory=RayOptions)
    tolerance_s: float = 1e-4  # LeRobot's default

    @property
    def name(self) -> str:
        """What the user called it."""
        return where_it_is(self.dataset)[0]

    def open(self) -> LeRobotDataset:
        """The data set, looked over as before a training; its metadata tell of resized frames.

        Raises:
            InputError: It is not there, not whole, or cannot be resized.
        """
        meta = open_dataset(self.dataset)
        check_files(self.dataset, meta)
        check_resize(self.data.resize, meta)
        try:
            dataset = LeRobotDataset(
                self.dataset.repo_id,
                root=self.dataset.root,
                episodes=self.dataset.episodes,
                revision=self.dataset.revision,
                video_backend=self.dataset.video_backend,
                tolerance_s=self.tolerance_s,
                return_uint8=True,
            )
        except Exception as error:
            raise InputError(f"{self.name}: the data set cannot be opened: {first_line(error)}") from None
        check_rows(dataset)
        set_frame_size(dataset.meta, self.data.resize)
        return dataset
