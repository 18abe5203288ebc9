"""What is known of single policies: an entry for each in `FACTS`, and nothing of the kind anywhere else.

What a policy's config says itself (its chunk, its cameras, the models that it names) is read there; here is what LeRobot
has in its code alone, or what was tried out. A policy without an entry, one of a plugin's for example, is treated as
`PolicyFacts` has it by default: with care. Imports nothing: what LeRobot need not import is asked here before it is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

OPTIONAL = ("transformers", "diffusers", "peft")  # packages that LeRobot imports if they are there
PALIGEMMA = "google/paligemma-3b-pt-224"


@dataclass(frozen=True)
class PolicyFacts:
    """What the program asks of a policy. `*_field`: names of fields of its config, without `policy.`."""

    title: str = ""
    """Its name in a sentence."""

    # What it is built from.
    imports: tuple[str, ...] = OPTIONAL
    """Those of the OPTIONAL packages that a training of it needs."""
    tokenizer: str | None = None
    """The tokenizer's Hub repo, where LeRobot's code names it and no field of the config does."""
    tokenizer_fields: tuple[str, ...] = ()
    """Those that name a tokenizer on the Hub. Like the next ones they are asked of every policy: plugins call theirs alike."""
    model_fields: Mapping[str, str | None] = field(default_factory=dict)
    """Those that name a model on the Hub, and the field, if there is one, that says whether its weights are asked for."""
    parsed_field: str | None = None
    """The one of them that the config itself reads, while it is parsed."""
    gated: tuple[str, ...] = ()
    """Hub repos whose licence must be accepted first."""
    network_field: str | None = None
    """Describes the network where no checkpoint does, and is empty by default; the config's `get_<field>` reads it."""

    # What it takes.
    needs_state: bool = False
    """Whether there must be an `observation.state`."""
    needs_camera_or_environment: bool = False
    """Whether there must be a camera or an `observation.environment_state`; LeRobot does not say so itself."""
    casts_numbers: bool = True
    """Whether it makes float32 of numbers that are not normalized."""
    size_field: str = "image_resolution"
    """Says to which size its own code resizes images; absent or empty: it leaves them as they are."""
    width_first: bool = False
    """Whether that is (width, height)."""
    keeps_aspect: bool = True
    """Whether it resizes in proportion, and adds a border."""

    # What it predicts.
    chunk_fields: tuple[str, ...] = ("chunk_size", "horizon", "n_obs_steps")
    """Those on which the number of actions depends that it predicts from now on, as far as it has them."""
    predicts_past: bool = False
    """Whether its `horizon` begins at the oldest of `n_obs_steps` observations, and LeRobot cuts what it predicts to
    `n_action_steps`."""
    scored: bool = True
    """Whether it predicts from a batch; if not, from queues alone that a robot fills: it cannot be validated."""

    # How it is trained.
    counted: bool = False
    """Whether it can be built without memory behind its weights, to be counted and compared."""
    bfloat16_part: str | None = None
    """The part of its network whose weights LeRobot loads in bfloat16, if `load_vlm_weights` asks for them."""
    unused_parameters: bool = True
    """Whether a step may leave parameters without a gradient."""
    graphed_field: str | None = None
    """What must be true for a GPU to replay its passes (see `kernels.launch_as_one`); None: it cannot."""

    # What has no effect, so that it is not searched.
    idle_without_cameras: tuple[str, ...] = ()
    """Fields on data without cameras."""
    idle_without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Fields once another one is false, by that one."""

    # What an export to LeRobot 0.4.4 has to mind.
    exported: bool = False
    """Whether there is an export of it."""
    kept_fields: tuple[str, ...] = ()
    """Those that it has there, too, though others' must be dropped."""
    other_border: bool = False
    """Whether images which are not square get a border of another colour there."""
    forked_transformers: bool = False
    """Whether a fork of transformers is needed there."""
    loaded_weights_only: bool = False
    """Whether it acts otherwise there if it was trained with `load_vlm_weights=false`."""


_PI0 = PolicyFacts(
    title="pi0",
    tokenizer=PALIGEMMA,
    gated=(PALIGEMMA,),
    counted=True,
    exported=True,
    kept_fields=("gradient_checkpointing",),
    other_border=True,
    forked_transformers=True,
)

FACTS: dict[str, PolicyFacts] = {
    # Trained, validated, searched, sharded and exported by the tests.
    "act": PolicyFacts(
        title="ACT",
        imports=(),
        needs_state=True,
        casts_numbers=False,
        counted=True,
        unused_parameters=False,
        graphed_field="use_vae",
        idle_without_cameras=(
            "vision_backbone",
            "pretrained_backbone_weights",
            "replace_final_stride_with_dilation",
            "optimizer_lr_backbone",  # of a group of weights in which there are none
        ),
        idle_without={"use_vae": ("kl_weight", "n_vae_encoder_layers")},
        exported=True,
    ),
    "diffusion": PolicyFacts(
        title="Diffusion Policy",
        imports=("diffusers",),
        casts_numbers=False,
        size_field="resize_shape",
        keeps_aspect=False,
        predicts_past=True,
        counted=True,
        idle_without_cameras=(
            "vision_backbone",
            "pretrained_backbone_weights",
            "use_group_norm",
            "spatial_softmax_num_keypoints",
            "resize_shape",
            "crop_ratio",
            "crop_shape",
            "crop_is_random",
            "use_separate_rgb_encoder_per_camera",
        ),
        exported=True,
    ),
    "pi0": _PI0,
    "pi05": replace(_PI0, title="pi0.5"),
    "smolvla": PolicyFacts(
        title="SmolVLA",
        tokenizer_fields=("vlm_model_name",),
        model_fields={"vlm_model_name": "load_vlm_weights"},
        size_field="resize_imgs_with_padding",
        width_first=True,
        counted=True,
        bfloat16_part="model.vlm_with_expert.vlm",
        exported=True,
        loaded_weights_only=True,
    ),
    # Trained by the tests, and that is all.
    "multi_task_dit": PolicyFacts(
        title="Multi-Task DiT",
        model_fields={"vision_encoder_name": None, "text_encoder_name": None},
        scored=False,
    ),
    "tdmpc": PolicyFacts(title="TD-MPC", imports=(), needs_camera_or_environment=True, scored=False),
    "vqbet": PolicyFacts(title="VQ-BeT", imports=(), scored=False),
    # Known only so far that what they lack is told before a training. (evo1 names its model as smolvla does.)
    "eo1": PolicyFacts(model_fields={"vlm_base": None}, parsed_field="vlm_base"),
    "fastwam": PolicyFacts(
        tokenizer_fields=("tokenizer_model_id",), model_fields={"text_encoder_model_id": "load_text_encoder"}
    ),
    "groot": PolicyFacts(model_fields={"base_model_path": None}),
    "lingbot_va": PolicyFacts(model_fields={"wan_pretrained_path": None}),
    "molmoact2": PolicyFacts(model_fields={"checkpoint_path": None}),
    "pi0_fast": PolicyFacts(tokenizer_fields=("text_tokenizer_name", "action_tokenizer_name")),
    "vla_jepa": PolicyFacts(
        model_fields={"qwen_model_name": None, "jepa_encoder_name": "enable_world_model"}
    ),
    "wall_x": PolicyFacts(
        tokenizer_fields=("action_tokenizer_path",), model_fields={"pretrained_name_or_path": None}
    ),
    "xvla": PolicyFacts(tokenizer_fields=("tokenizer_name",), network_field="florence_config"),
}


def facts_of(policy: str) -> PolicyFacts:
    """What is known of a policy, by its type."""
    return FACTS.get(policy, PolicyFacts())


def why_unscored(policy: str) -> str | None:
    """Why what a policy predicts cannot be compared with recordings; None if it can."""
    if facts_of(policy).scored:
        return None
    return f"{policy} predicts only from what a robot has shown it so far, so val/action_error cannot be measured."
