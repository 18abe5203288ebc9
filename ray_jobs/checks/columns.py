"""Checks of a data set's columns: do its files hold what they say of each other, and can a policy take what they hold?

LeRobot finds these things out amid a step and says them in torch's words, or trains on the wrong rows.
"""

import math

import numpy as np
import pyarrow.parquet as pq
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features

from ray_jobs.config.errors import InputError
from ray_jobs.data.columns import COUNTERS
from ray_jobs.data.frames import frame_shape
from ray_jobs.policies.facts import facts_of

READ = (OBS_STATE, OBS_ENV_STATE, ACTION)  # the numbers that LeRobot's policies compute with


def check_metadata(name: str, meta: LeRobotDatasetMetadata) -> None:
    """See that meta/info.json and meta/episodes have what no training can do without."""
    for key in COUNTERS:
        if key not in meta.features:
            raise InputError(
                f"{name}: meta/info.json has no feature {key}, by which LeRobot reads the tables."
            )
    for key in meta.camera_keys:
        feature = meta.features[key]
        if len(feature["shape"]) != 3 or len(feature.get("names") or ()) != 3:
            raise InputError(
                f"{name}: meta/info.json: {key} needs a shape and names of three axes, as ['height', 'width', "
                f"'channels']; it has {list(feature['shape'])} and {feature.get('names')}."
            )
    for key, numbers in (meta.stats or {}).items():
        if nested := [f"{key}/{inner}" for inner, values in numbers.items() if isinstance(values, dict)]:
            raise InputError(
                f"{name}: meta/stats.json: {nested[0]} has a '/' in its name, with which LeRobot can train, but save no "
                "checkpoint."
            )
    if meta.tasks is None:
        raise InputError(f"{name}: meta/info.json counts no tasks; LeRobot needs the task of each frame.")
    needed = ["length", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
    needed += [
        f"videos/{key}/{what}"
        for key in meta.video_keys
        for what in ("chunk_index", "file_index", "from_timestamp")
    ]
    if lacking := [column for column in needed if column not in meta.episodes.column_names]:
        raise InputError(f"{name}: meta/episodes has no column {', '.join(lacking)}.")


def check_tables(name: str, meta: LeRobotDatasetMetadata) -> None:
    """See that each table has the columns of meta/info.json and the episodes of meta/episodes, as far as its footer
    tells."""
    promised = {key for key, feature in meta.features.items() if feature["dtype"] != "video"}
    inside: dict[str, list[int]] = {}
    # As columns: a row of meta.episodes takes a hundred times as long.
    chunks, files = (list(meta.episodes[f"data/{index}_index"]) for index in ("chunk", "file"))
    for episode, (chunk, file) in enumerate(zip(chunks, files, strict=True)):
        inside.setdefault(meta.data_path.format(chunk_index=chunk, file_index=file), []).append(episode)
    lengths = list(meta.episodes["length"])
    for file, episodes in inside.items():
        if not (meta.root / file).is_file():
            continue  # its episodes were not asked for, and LeRobot reads what lies there
        footer = pq.read_metadata(meta.root / file)
        columns = footer.schema.to_arrow_schema().names
        if lacking := sorted(promised - set(columns)):
            raise InputError(
                f"{name}: {file} has no column {', '.join(lacking)}, which meta/info.json promises."
            )
        if unknown := [column for column in columns if column not in promised]:
            raise InputError(
                f"{name}: {file} has a column {', '.join(unknown)}, which meta/info.json does not know: LeRobot cannot "
                "read such a table."
            )
        first, last = _range(footer, columns.index("episode_index"), "episode_index")
        if (first, last) != (None, None) and (first, last) != (episodes[0], episodes[-1]):
            raise InputError(
                f"{name}: {file} has the rows of episodes {first} to {last}, meta/episodes says {episodes[0]} to "
                f"{episodes[-1]}."
            )
        said = sum(lengths[episode] for episode in episodes)
        if footer.num_rows != said:
            raise InputError(
                f"{name}: {file} has {footer.num_rows} rows, meta/episodes says {said} (episodes {episodes[0]} to "
                f"{episodes[-1]})."
            )


def _range(footer: pq.FileMetaData, number: int, key: str) -> tuple[int | None, int | None]:
    """Smallest and largest value of a column, from the notes of whoever wrote the file; None if there are none."""
    groups = [footer.row_group(n) for n in range(footer.num_row_groups)]
    leaf = next(n for n in range(footer.num_columns) if footer.schema.column(n).path == key)
    notes = [group.column(leaf).statistics for group in groups if group.num_rows]
    if not notes or any(note is None or not note.has_min_max for note in notes):
        return None, None
    return min(note.min for note in notes), max(note.max for note in notes)


def check_kinds(name: str, policy: PreTrainedConfig, meta: LeRobotDatasetMetadata, batch_size: int) -> None:
    """See that the policy can compute with what the columns hold, in batches of that size."""
    features, stats = dataset_to_policy_features(meta.features), meta.stats or {}
    facts = facts_of(policy.type)
    known = hasattr(policy, "max_state_dim") or not facts.casts_numbers
    for key, feature in features.items():
        kind, shape = meta.features[key]["dtype"], tuple(meta.features[key]["shape"])
        if kind == "string":
            raise InputError(
                f"{name}: {key} holds strings; whatever is called 'observation.' or 'action' LeRobot takes for numbers."
            )
        if key in meta.camera_keys and known:
            if (channels := frame_shape(meta, key)[0]) not in (1, 3) and not _unsure(meta, key):
                raise InputError(f"{name}: {key} has {channels} channels; {policy.type} takes 3 (or 1).")
        if key not in READ or not known:
            continue
        if shape == (1,) and min(batch_size, meta.total_frames) > 1:  # a batch of one passes for that axis
            raise InputError(
                f"{name}: {key} has one dimension, which LeRobot's loader gives as a number without an axis: "
                f"{policy.type} cannot take it. A second dimension, of zeros, helps."
            )
        if len(shape) != 1:
            raise InputError(
                f"{name}: {key} has the shape {shape}; {policy.type} takes a single row of numbers."
            )
        mode = policy.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        normalized = key in stats and mode is not NormalizationMode.IDENTITY
        if not normalized and not facts.casts_numbers and not kind.startswith("float"):
            raise InputError(
                f"{name}: {key} holds {kind}, and {policy.type} does not normalize it: it must be float32."
            )
        if normalized and kind == "bool":
            raise InputError(f"{name}: {key} holds booleans, which LeRobot cannot normalize.")
        for said, numbers in stats.get(key, {}).items() if normalized else ():
            if said == "count":
                continue
            if np.size(numbers) not in (1, math.prod(shape)):
                raise InputError(
                    f"{name}: {key}: meta/stats.json is not of these data: {said} has {np.size(numbers)} dimensions, "
                    f"they have {math.prod(shape)}."
                )
            if not np.isfinite(np.asarray(numbers, np.float64)).all():
                raise InputError(
                    f"{name}: {key}: {said} in meta/stats.json is NaN or infinite: so would every loss be."
                )
    if hasattr(policy, "tokenizer_max_length") and (fault := tasks_unread(meta)):
        raise InputError(f"{name}: {fault}, and {policy.type} reads the task.")
    if facts.needs_state and OBS_STATE not in features:
        raise InputError(f"{name}: {facts.title} cannot do without {OBS_STATE}, which the data set has not.")


def tasks_unread(meta: LeRobotDatasetMetadata) -> str | None:
    """What to say of tasks that LeRobot does not find: it takes the table's index for their texts."""
    if all(isinstance(task, str) for task in meta.tasks.index):
        return None
    return f"meta/tasks.parquet does not have the tasks as its index: LeRobot takes {meta.tasks.index[0]} for the first one's text"


def _unsure(meta: LeRobotDatasetMetadata, key: str) -> bool:
    """Whether a shape in meta/info.json is (C, H, W) though its names say (H, W, C)."""
    return meta.features[key]["shape"][0] in (1, 3)
