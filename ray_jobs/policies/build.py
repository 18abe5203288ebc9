"""Policies and their processors, built as LeRobot builds them: for the training, and without memory for checks."""

import contextlib
import copy
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies import PreTrainedPolicy, get_policy_class, make_policy, make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline, TokenizerProcessorStep
from lerobot.utils.constants import (
    ACTION,
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)
from lerobot.utils.utils import has_method

from ray_jobs.config.errors import InputError, RunError, first_line
from ray_jobs.policies.facts import facts_of
from ray_jobs.storage.trust import check_processor

# Flags of policies, and what they are in the processor that prepares texts.
OF_TEXTS = {"tokenizer_max_length": "max_length", "pad_language_to": "padding"}


def build(
    cfg: TrainPipelineConfig, meta: LeRobotDatasetMetadata, *, device: str, tell: Callable[[str], None]
) -> torch.nn.Module:
    """The policy with its weights, and adapters if `--peft.*` asks for them.

    Args:
        device: Where it is put; `cfg.policy.device` still names the one it is trained on.
        tell: Called with what cannot be honoured.

    Raises:
        RunError: Its weights do not fit it.
    """
    uncompiled = getattr(cfg.policy, "compile_model", False) and why_not_compiled(cfg.policy.device)
    if uncompiled:
        tell(f"--policy.compile_model=true: this machine cannot compile ({uncompiled}); going on uncompiled.")
        cfg.policy.compile_model = False
    trained_on, cfg.policy.device = cfg.policy.device, device
    with loading(cfg.policy), contextlib.redirect_stdout(io.StringIO()) as printed:
        policy = make_policy(cfg.policy, ds_meta=meta, rename_map=cfg.rename_map)
    cfg.policy.device = trained_on
    if uncompiled:
        cfg.policy.compile_model = True  # another machine may
    check_loaded(cfg.policy.pretrained_path, printed.getvalue())
    if cfg.peft is not None and not has_method(policy, "merge_and_unload"):
        policy = policy.wrap_with_peft(peft_cli_overrides=dataclasses.asdict(cfg.peft))
    return policy


@contextlib.contextmanager
def loading(policy: PreTrainedConfig) -> Iterator[None]:
    """Within, a policy that is built from a checkpoint does without torchvision's weights, which LeRobot would fetch
    for ACT and Diffusion before it puts the checkpoint's in their place."""
    saved = getattr(policy, "pretrained_backbone_weights", None)
    if saved and policy.pretrained_path:
        policy.pretrained_backbone_weights = None
    try:
        yield
    finally:
        if saved:
            policy.pretrained_backbone_weights = saved


def check_loaded(path: str | Path | None, printed: str) -> None:
    """pi0 and pi0.5 print that their weights do not fit or are not there, and go on with random ones.

    Raises:
        RunError: They did.
    """
    for sign in ("Warning: Could not load state dict: ", "Could not load state dict from remote files: "):
        if sign in printed:
            reason = printed.partition(sign)[2].splitlines()
            raise RunError(f"{path} cannot be loaded: {' '.join(reason[:4])}")


def why_not_compiled(device: str) -> str | None:
    """What keeps `torch.compile` from working on this machine, found out with a function of one line."""
    try:
        torch.compile(lambda x: (x * 2).relu() + 1)(torch.ones(8, device=device))
    except Exception as error:
        torch.compiler.reset()
        return first_line(error).rstrip(".")
    return None


def with_features(policy: PreTrainedConfig, features: dict[str, PolicyFeature]) -> PreTrainedConfig:
    """A copy of the policy's config with the data set's features, as `make_policy` will fill them in."""
    config = copy.deepcopy(policy)
    config.output_features = {ACTION: features[ACTION]}
    if not config.input_features:
        config.input_features = {k: f for k, f in features.items() if f.type is not FeatureType.ACTION}
    return config


def outline(policy: PreTrainedConfig, features: dict[str, PolicyFeature]) -> torch.nn.Module:
    """The policy without memory behind its weights, to be counted and compared. Its tokenizer must be at hand."""
    config = with_features(policy, features)
    config.pretrained_path = None
    config.device = "meta"
    for name, value in (
        ("pretrained_backbone_weights", None),
        ("compile_model", False),
        ("load_vlm_weights", False),
    ):
        if hasattr(config, name):
            setattr(config, name, value)
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        network = get_policy_class(config.type)(config).to("meta")  # what was made from numpy, too
    part = facts_of(policy.type).bfloat16_part
    if part and policy.load_vlm_weights:
        network.get_submodule(part).to(torch.bfloat16)  # as they are loaded
    config.pretrained_path = policy.pretrained_path
    return network


def _check_steps(start: str, name: str, revision: str | None) -> None:
    """See that one of a checkpoint's pipelines has LeRobot's steps only, also if it comes from the Hub just now."""
    file = Path(start) / name
    if not Path(start).is_dir():
        file = Path(hf_hub_download(start, name, revision=revision))  # LeRobot takes the same copy
    try:
        check_processor(file)
    except (ValueError, OSError) as error:
        raise InputError(f"cannot start from {start}: {name} is damaged ({error}).") from None


def make_processors(
    cfg: TrainPipelineConfig, policy: PreTrainedPolicy, stats: dict | None, device: torch.device
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Pre- and postprocessor: new ones for a new policy, a checkpoint's own with the data set's statistics
    for a pretrained one, a checkpoint's own untouched on resume.

    Raises:
        InputError: A checkpoint's would run something else.
    """
    pretrained = cfg.policy.pretrained_path
    if pretrained is None:
        return make_pre_post_processors(cfg.policy, dataset_stats=stats)
    for name in (POLICY_PREPROCESSOR_DEFAULT_NAME, POLICY_POSTPROCESSOR_DEFAULT_NAME):
        _check_steps(str(pretrained), f"{name}.json", cfg.policy.pretrained_revision)
    norm_map, outputs = policy.config.normalization_mapping, policy.config.output_features
    features = {**policy.config.input_features, **outputs}
    before = {
        "device_processor": {"device": device.type},
        "normalizer_processor": {"features": features, "norm_map": norm_map},
        "rename_observations_processor": {"rename_map": cfg.rename_map},
    }
    after = {"unnormalizer_processor": {"features": outputs, "norm_map": norm_map}}
    kwargs = {}
    if not cfg.resume:
        before["normalizer_processor"]["stats"] = after["unnormalizer_processor"]["stats"] = stats
        kwargs["dataset_stats"] = stats
    if getattr(cfg.policy, "use_relative_actions", False):
        before["relative_actions_processor"] = {
            "enabled": True,
            "exclude_joints": getattr(cfg.policy, "relative_exclude_joints", []),
            "action_names": getattr(cfg.policy, "action_feature_names", None),
        }
        after["absolute_actions_processor"] = {"enabled": True}
    try:
        preprocessor, postprocessor = make_pre_post_processors(
            cfg.policy,
            pretrained_path=pretrained,
            pretrained_revision=cfg.policy.pretrained_revision,
            preprocessor_overrides=before,
            postprocessor_overrides=after,
            **kwargs,
        )
    except ImportError as error:  # a step that LeRobot does not have
        raise InputError(f"cannot start from {pretrained}: {first_line(error)[:300]}") from None
    # Which go on as they are, whatever the flags say: so that is what is written down.
    for step in preprocessor.steps:
        for name, used in OF_TEXTS.items():
            if isinstance(step, TokenizerProcessorStep) and hasattr(cfg.policy, name):
                setattr(cfg.policy, name, getattr(step, used))
    return preprocessor, postprocessor
