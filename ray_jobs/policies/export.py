"""A trained policy for an older LeRobot: a copy of a checkpoint that LeRobot 0.4 loads."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies import get_policy_class
from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME
from peft import PeftModel
from safetensors.torch import load_file, save_file, save_model

from ray_jobs.config.errors import InputError
from ray_jobs.policies import assets
from ray_jobs.policies.build import check_loaded, loading
from ray_jobs.policies.facts import FACTS, facts_of
from ray_jobs.storage.records import parse_json

# Fields of today's configs that 0.4.4 refuses, and whether it does without what they ask for. All of its own exist
# today, with the same meaning.
DROPPED = {
    "pretrained_revision": lambda value: True,  # where the training started
    "gradient_checkpointing": lambda value: True,  # how it saved memory
    "use_relative_actions": lambda value: not value,
    "relative_exclude_joints": lambda value: True,  # say nothing without the one above
    "action_feature_names": lambda value: True,
}


# Steps of today's processors that 0.4.4 has not; without effect unless they are enabled.
DROPPED_STEPS = ("relative_actions_processor", "absolute_actions_processor")


def export(source: Path, target: Path, *, assets_dir: Path) -> str:
    """Copy a policy for LeRobot 0.4; returns its type. `target` appears whole or not at all.

    Raises:
        InputError: The policy uses what 0.4 has not, a file is missing or damaged, or what its adapters adapt is
            nowhere to be had.
    """
    config = _read(source / "config.json")
    kind = config.get("type")
    exported = [policy for policy, facts in FACTS.items() if facts.exported]
    if kind not in exported:
        raise InputError(f"{source} holds a policy of type {kind}; {', '.join(exported)} can be exported.")
    facts = facts_of(kind)
    for name, dispensable in DROPPED.items():
        if name in config and name not in facts.kept_fields and not dispensable(config.pop(name)):
            raise InputError(f"{source} was trained with --policy.{name}=true, which LeRobot 0.4 has not.")
    if facts.loaded_weights_only and not config["load_vlm_weights"]:
        raise InputError(
            f"{source} was trained with --policy.load_vlm_weights=false, so its vision tower computes in float32. "
            "There the\ntransformers of LeRobot 0.4 counts an image's patches differently: the actions would be others."
        )
    # A folder of this machine means nothing on another.
    config |= {"pretrained_path": None, "use_peft": False}
    processors = {path.name: _processor(path, source) for path in source.glob("policy_*processor.json")}
    if len(processors) < 2:
        raise InputError(f"{source} lacks policy_preprocessor.json or policy_postprocessor.json.")
    there = target.is_dir()  # and empty
    scratch = (target if there else target.parent) / f".{target.name}.{os.getpid()}.tmp"
    scratch.mkdir(parents=True)
    try:
        for name, content in {"config.json": config, **processors}.items():
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n")
        for path in source.glob("policy_*.safetensors"):
            shutil.copy(path, scratch)
        if (source / "adapter_config.json").is_file():
            _merge(source, scratch, assets_dir)
        elif (source / "model.safetensors").is_file():
            shutil.copy(source / "model.safetensors", scratch)
        else:
            raise InputError(f"{source} holds no weights (model.safetensors).")
        if facts.other_border:
            _shift_images(scratch, config)
        if there:
            for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
                path.rename(target / path.name)  # that which makes it a policy comes last
        else:
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return kind


def _processor(path: Path, source: Path) -> dict:
    content = _read(path)
    kept = []
    for step in content["steps"]:
        if step.get("registry_name") not in DROPPED_STEPS:
            kept.append(step)
        elif step.get("config", {}).get("enabled"):
            raise InputError(f"{source}: its {step['registry_name']} is enabled, which LeRobot 0.4 has not.")
    return content | {"steps": kept}


def _shift_images(folder: Path, config: dict) -> None:
    """Make up for another colour of the border that pi0 gives to images which are not square.

    Today it is 0 (black) on a scale of 0 to 1; in 0.4.4 it is -1, which none of the trained weights has seen. So the
    copy's normalizer takes 1 from every pixel, which puts black there, and the first layer of the vision
    tower adds what it thereby lacks: 2 on the model's own scale of -1 to 1.
    """
    cameras = {key: f["shape"] for key, f in config["input_features"].items() if f["type"] == "VISUAL"}
    file = folder / f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json"
    content = _read(file)
    (normalizer,) = (step for step in content["steps"] if step["registry_name"] == "normalizer_processor")
    if normalizer["config"]["norm_map"]["VISUAL"] != "IDENTITY":
        raise InputError(f"{folder}: images are normalized, and LeRobot 0.4 gives theirs another border.")
    normalizer["config"]["norm_map"]["VISUAL"] = "MEAN_STD"
    normalizer["config"]["features"] |= {k: {"type": "VISUAL", "shape": s} for k, s in cameras.items()}
    file.write_text(json.dumps(content, indent=2) + "\n")
    stats = load_file(folder / normalizer["state_file"])
    stats = {key: value for key, value in stats.items() if key.rpartition(".")[0] not in cameras}
    for key in cameras:
        stats[f"{key}.mean"] = stats[f"{key}.std"] = torch.ones(3, 1, 1)
    save_file({key: value.clone() for key, value in stats.items()}, folder / normalizer["state_file"])

    weights = load_file(folder / "model.safetensors")
    (layer,) = (key.removesuffix(".weight") for key in weights if key.endswith("patch_embedding.weight"))
    weight, bias = weights[f"{layer}.weight"].double(), weights[f"{layer}.bias"]
    weights[f"{layer}.bias"] = (bias.double() + 2 * weight.sum((1, 2, 3))).to(bias.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _merge(source: Path, target: Path, assets_dir: Path) -> None:
    """Adapters become part of the weights: what loads the copy needs neither peft nor the policy they adapt."""
    config = PreTrainedConfig.from_pretrained(source)
    base = _read(source / "adapter_config.json")["base_model_name_or_path"]
    config.pretrained_path, config.device = source, "cpu"
    printed = io.StringIO()
    with (
        assets.mounted(assets_dir, config, weights=True),
        loading(config),
        contextlib.redirect_stdout(printed),
    ):
        policy = get_policy_class(config.type).from_pretrained(base, config=config)
    check_loaded(base, printed.getvalue())
    merged = PeftModel.from_pretrained(policy, source).merge_and_unload()
    save_model(merged, str(target / "model.safetensors"))


def _read(path: Path) -> dict:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
