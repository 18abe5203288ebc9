"""The data set that this process has opened. A slot of a search trains on one for many trials, and opens it once.

Trials share its tables; statistics, image sizes and time steps are each trial's own, since they follow its policy.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs.default import DatasetConfig
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.feature_utils import get_delta_indices
from lerobot.utils.constants import HF_LEROBOT_HOME

from ray_jobs.storage.fingerprint import fingerprint_of

PARTS = ("meta", "data", "videos")
_identity = ""
_opened: dict[str, Any] = {}  # of the data set with that identity


def once[T](dataset: DatasetConfig, what: str, make: Callable[[], T]) -> T:
    """What `make()` gives, or what it gave before for `what` of the same data set, if no file of it has changed."""
    global _identity
    root = Path(dataset.root or HF_LEROBOT_HOME / dataset.repo_id)
    files = [(path, path.stat()) for part in PARTS for path in sorted(root.glob(f"{part}/**/*.*"))]
    asked = {name: value for name, value in draccus.encode(dataset).items() if name != "episodes"}
    identity = fingerprint_of(asked, [(str(path), s.st_size, s.st_mtime_ns) for path, s in files])
    if identity != _identity:
        _opened.clear()
        _identity = identity
    if what not in _opened:
        _opened[what] = make()
    return _opened[what]


def own_metadata(meta: LeRobotDatasetMetadata) -> LeRobotDatasetMetadata:
    """Metadata with the same tables and with features and statistics that may be changed."""
    own = copy.copy(meta)
    own.info, own.stats = copy.deepcopy(meta.info), copy.deepcopy(meta.stats)
    return own


def for_policy(dataset: LeRobotDataset, policy: PreTrainedConfig) -> LeRobotDataset:
    """A data set with the same tables that gives the time steps this policy takes."""
    own = copy.copy(dataset)
    own.meta, own.reader = own_metadata(dataset.meta), copy.copy(dataset.reader)
    deltas = own.delta_timestamps = resolve_delta_timestamps(policy, own.meta)
    own.reader.delta_indices = get_delta_indices(deltas, own.meta.fps) if deltas else None
    return own
