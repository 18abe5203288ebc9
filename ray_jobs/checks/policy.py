"""Whether LeRobot can train a policy of this type here at all: its packages, a class for recordings, what it learns from.

Most of LeRobot's policies are tested nowhere here; what `lerobot-train` cannot train is refused before anything is
scheduled, and the rest is left to it.
"""

import inspect
import re
from importlib.metadata import version
from pathlib import Path

from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies import get_policy_class
from lerobot.utils.constants import OBS_ENV_STATE, REWARD
from lerobot.utils.import_utils import is_package_available

from ray_jobs.config.errors import InputError, first_line
from ray_jobs.policies.facts import facts_of

VERSION = version("lerobot")
# How LeRobot's sources say what they need, but not until the policy is built: on a worker, after minutes of downloads.
REQUIRED = re.compile(r'require_package\("([^"]+)", extra="([^"]+)"(?:, import_name="([^"]+)")?\)')


def check_type(policy: PreTrainedConfig) -> None:
    """Refuse a policy that cannot be built here from recordings, whatever they hold.

    Raises:
        InputError: A package is missing, or it learns from something else, or from a checkpoint only.
    """
    asked = f"--policy.type={policy.type}"
    missing = missing_packages(policy)
    if missing:
        extra = next(iter(missing.values()))
        raise InputError(
            f"{asked} needs {' and '.join(missing)}, which this environment has not. On every node: "
            f"pip install 'lerobot[{extra}]=={VERSION}'"
        )
    try:
        built = inspect.signature(get_policy_class(policy.type))
    except ImportError as error:
        raise InputError(f"{asked} cannot be imported here: {first_line(error)}") from None
    try:
        built.bind(config=policy, dataset_stats=None, dataset_meta=None)  # as `lerobot-train` does
    except TypeError:
        raise InputError(
            f"{asked}: it does not learn from recordings, lerobot-train cannot build it either; LeRobot has it for "
            "reinforcement learning."
        ) from None
    network = facts_of(policy.type).network_field
    if network and policy.pretrained_path is None:
        try:
            getattr(policy, f"get_{network}")()
        except Exception as error:
            raise InputError(
                f"{asked} starts from a checkpoint, which --policy.path names; from scratch --policy.{network} "
                f"must describe its network ({first_line(error)})."
            ) from None


def missing_packages(policy: PreTrainedConfig) -> dict[str, str]:
    """Packages that a policy's code requires and that are not here, and LeRobot's extra that brings each."""
    folder = Path(inspect.getfile(type(policy))).parent
    found = {}
    for file in sorted(folder.rglob("*.py")):
        for package, extra, module in REQUIRED.findall(file.read_text(encoding="utf-8")):
            if not is_package_available(package, module or None):
                found[package] = extra.replace("_", "-")
    return found


def check_rewards(policy: PreTrainedConfig, meta: LeRobotDatasetMetadata, name: str) -> None:
    """See that a policy that learns from rewards gets some.

    Args:
        name: What the user called the data set.

    Raises:
        InputError: There are none.
    """
    if policy.reward_delta_indices is not None and REWARD not in meta.features:
        raise InputError(f"{policy.type} learns from rewards; {name} has no {REWARD}.")
    seen = meta.camera_keys or OBS_ENV_STATE in meta.features
    if facts_of(policy.type).needs_camera_or_environment and not seen:
        raise InputError(f"{policy.type} takes a camera or {OBS_ENV_STATE}; {name} has neither.")
