"""What has no effect: searched all the same, it would cost trials, and what it seems to matter would be chance.

A policy's own module is where it shows which of its flags it does not look at; the tests train with both ends of each of these
flags and get the same weights.
"""

from ray_jobs.search import constraints
from ray_jobs.search.space import Space

# Without cameras. The backbone's learning rate is that of a group of weights in which there are none.
IMAGES = ("dataset.image_transforms.", "dataset.use_imagenet_stats")
OF_CAMERAS = {
    "act": ("vision_backbone", "pretrained_backbone_weights", "replace_final_stride_with_dilation", "optimizer_lr_backbone"),
    "diffusion": (
        "vision_backbone", "pretrained_backbone_weights", "use_group_norm", "spatial_softmax_num_keypoints", "resize_shape",
        "crop_ratio", "crop_shape", "crop_is_random", "use_separate_rgb_encoder_per_camera",
    ),
}  # fmt: skip
# Once another flag is false.
BESIDE = {"policy.use_vae": {"act": ("kl_weight", "n_vae_encoder_layers")}}
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
    idle: dict[str, str] = {}
    for p in space.parameters:
        name = p.flag.removeprefix("policy.")
        if p.drawn is None or p.flag in typed:
            continue
        if not cameras and (p.flag.startswith(IMAGES) or name in OF_CAMERAS.get(space.policy, ())):
            idle[p.flag] = "the data set has no cameras"
        for other, of_policies in BESIDE.items():
            if other in off and name in of_policies.get(space.policy, ()):
                idle[p.flag] = f"{other} is false"
        if PRESET in off and p.flag.startswith(OF_THE_PRESET):
            idle[p.flag] = f"{PRESET} is false"
    # What others depend on is searched for their sake.
    needed = {flag for p in space.parameters if p.flag not in idle for flag in p.sources}
    needed |= {flag for _, rule in space.constraints for flag in constraints.names(rule)}
    return {flag: why for flag, why in idle.items() if flag not in needed}
