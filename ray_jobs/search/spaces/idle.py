"""What has no effect: searched all the same, it would cost trials, and what it seems to matter would be chance.

A policy's own module is where it shows which of its flags it does not look at; the tests train with both ends of each of these
flags and get the same weights.
"""

from ray_jobs.policies.facts import facts_of
from ray_jobs.search.spaces import constraints
from ray_jobs.search.spaces.space import Space

IMAGES = ("dataset.image_transforms.", "dataset.use_imagenet_stats")
PRESET, OF_THE_PRESET = "use_policy_training_preset", ("policy.optimizer_", "policy.scheduler_")


def without_effect(space: Space, typed: dict[str, str], cameras: bool) -> dict[str, str]:
    """The flags that would be searched for nothing, and why.

    Args:
        typed: The flags that hold for all trials.
        cameras: Whether the data set has any.
    """
    varied = {p.flag for p in space.parameters} - typed.keys()
    certain = {flag: value for flag, value in {**space.baseline, **typed}.items() if flag not in varied}
    off = {flag for flag, value in certain.items() if str(value).lower() == "false"}
    facts, idle = facts_of(space.policy), {}
    for p in space.parameters:
        name = p.flag.removeprefix("policy.")
        if p.drawn is None or p.flag in typed:
            continue
        if not cameras and (p.flag.startswith(IMAGES) or name in facts.idle_without_cameras):
            idle[p.flag] = "the data set has no cameras"
        for other, names in facts.idle_without.items():
            if f"policy.{other}" in off and name in names:
                idle[p.flag] = f"policy.{other} is false"
        if PRESET in off and p.flag.startswith(OF_THE_PRESET):
            idle[p.flag] = f"{PRESET} is false"
    # What others depend on is searched for their sake.
    needed = {flag for p in space.parameters if p.flag not in idle for flag in p.sources}
    needed |= {flag for _, rule in space.constraints for flag in constraints.names(rule)}
    return {flag: why for flag, why in idle.items() if flag not in needed}
