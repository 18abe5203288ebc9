"""Quantiles of states and actions, for policies that normalize by them (pi0.5) and data sets that have none.

They are computed as LeRobot's `augment_dataset_quantile_stats` does (per episode, averaged by length), kept beside the
decoded frames, and never written into the data set.
"""

import contextlib
import hashlib
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.datasets import LeRobotDatasetMetadata, aggregate_stats, get_feature_stats
from lerobot.utils.feature_utils import dataset_to_policy_features

from ray_jobs.config.errors import InputError
from ray_jobs.storage.cache_folder import default_folder
from ray_jobs.storage.records import read_json

NAMES = {NormalizationMode.QUANTILES: ("q01", "q99"), NormalizationMode.QUANTILE10: ("q10", "q90")}


def lacking(policy: PreTrainedConfig, meta: LeRobotDatasetMetadata) -> dict[str, FeatureType]:
    """Features of the data set whose quantiles the policy needs and `meta.stats` has not. LeRobot leaves alone what has
    no statistics at all."""
    missing, stats = {}, meta.stats or {}
    for key, feature in dataset_to_policy_features(meta.features).items():
        names = NAMES.get(policy.normalization_mapping.get(feature.type.value), ())
        if key in stats and not all(name in stats[key] for name in names):
            missing[key] = feature.type
    return missing


def complete(policy: PreTrainedConfig, meta: LeRobotDatasetMetadata) -> None:
    """Add the quantiles that the policy needs to `meta.stats`, in memory.

    Raises:
        InputError: They cannot be computed: of cameras, or of values that are no numbers.
    """
    missing = lacking(policy, meta)
    cameras = [key for key, kind in missing.items() if kind is FeatureType.VISUAL]
    if cameras:
        # LeRobot's script that would add them uploads the data set, too: nothing to advise.
        mapping = {**policy.normalization_mapping, FeatureType.VISUAL.value: NormalizationMode.IDENTITY}
        spelled = json.dumps({kind: mode.value for kind, mode in mapping.items()})
        raise InputError(
            f"{policy.type} normalizes {', '.join(cameras)} by quantiles, which meta/stats.json lacks; those of images "
            f"are not computed here.\nImages as they are: --policy.normalization_mapping={shlex.quote(spelled)}"
        )
    if not missing:
        return
    files = sorted({meta.root / meta.get_data_file_path(episode) for episode in range(meta.total_episodes)})
    identity = [sorted(missing), *((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    cache = default_folder() / "quantiles"
    cached = cache / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.json"
    quantiles = None
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged
        quantiles = read_json(cached, **dict.fromkeys(missing, dict))
    if quantiles is None:
        quantiles = _compute(files, list(missing))
        with contextlib.suppress(OSError):  # a full disk: the next one computes them again
            cache.mkdir(parents=True, exist_ok=True)
            scratch = cached.with_suffix(f".{os.getpid()}.tmp")  # several workers may compute at once
            scratch.write_text(json.dumps(quantiles))
            scratch.replace(cached)
    for key, values in quantiles.items():
        meta.stats[key] = {**meta.stats[key], **{name: np.array(value) for name, value in values.items()}}


def _compute(files: list[Path], keys: list[str]) -> dict[str, dict[str, list[float]]]:
    """`q01` to `q99` of each feature, lists as long as its vector."""
    table = pa.concat_tables(pq.read_table(file, columns=["episode_index", *keys]) for file in files)
    episodes = table.column("episode_index").to_numpy()
    columns = {key: np.stack(table.column(key).to_numpy()).astype(np.float32) for key in keys}
    for key, column in columns.items():
        if not np.isfinite(column).all():
            bad = int(episodes[~np.isfinite(column.reshape(len(column), -1)).all(1)][0])
            raise InputError(
                f"{key} has no quantiles: episode {bad} holds values that are not finite numbers."
            )
    parts = []
    for episode in np.unique(episodes):
        rows = episodes == episode
        parts.append(
            {key: get_feature_stats(c[rows], axis=0, keepdims=c.ndim == 1) for key, c in columns.items()}
        )
    return {
        key: {name: value.tolist() for name, value in values.items() if name.startswith("q")}
        for key, values in aggregate_stats(parts).items()
    }
