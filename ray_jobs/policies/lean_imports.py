"""LeRobot imported without the packages that a new policy does not need.

LeRobot 0.6.1 imports transformers, diffusers and PEFT with every policy: 2.9 of the 8.5 CPU seconds that its import
takes, in the driver and again in every worker. It does without those that are not installed, which is what an entry of
None in `sys.modules` means to Python (importlib: "the import system"). Once LeRobot is imported they can be, too.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping

from ray_jobs.policies.facts import OPTIONAL, facts_of

# What else may need them: a trained policy's processors, adapters, simulators, packages of the user's.
NEED_ALL = (
    "policy.path",
    "policy.pretrained_path",
    "config_path",
    "peft.",
    "env.",
    "scheduler.",
    "optimizer.",
)


def unneeded(policies: Iterable[str], flags: Mapping[str, str]) -> tuple[str, ...]:
    """Packages that a training of these policies, with these flags, does without."""
    if any(name.startswith(NEED_ALL) or "discover_packages_path" in name for name in flags):
        return ()
    needed = {name for policy in policies for name in facts_of(policy).imports}
    return tuple(name for name in OPTIONAL if name not in needed)


@contextlib.contextmanager
def without(packages: Iterable[str]) -> Iterator[None]:
    """Within, these packages are not there to be imported, unless they are already."""
    hidden = [name for name in packages if name not in sys.modules and "lerobot" not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None, in the place of a module, hides it
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, "") is None:
                del sys.modules[name]
