"""Checks that turn a mistake into one or two lines before anything expensive is scheduled."""

import copy
import json
import math
import os
import shutil
import uuid
from pathlib import Path

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.utils import BackwardCompatibilityError, ForwardCompatibilityError
from lerobot.policies import get_policy_class
from lerobot.utils.constants import ACTION
from lerobot.utils.feature_utils import dataset_to_policy_features

from ray_jobs.engine import checkpoint
from ray_jobs.engine.errors import InputError
from ray_jobs.engine.objective import chunk_length
from ray_jobs.engine.recipe import Recipe


def check(recipe: Recipe) -> None:
    """Look over a resolved recipe; completes it with the training episodes and the W&B run id.

    Raises:
        InputError: The data set, the policy, the output folder or the checkpoint to resume will not do.
    """
    meta = _dataset(recipe)
    _episodes(recipe, meta)
    _features(recipe, meta)
    _resume(recipe)
    _disk(recipe, meta)
    _wandb(recipe)


def _dataset(recipe: Recipe) -> LeRobotDatasetMetadata:
    dataset = recipe.lerobot.dataset
    root = Path(dataset.root) if dataset.root else None
    if root is not None:
        if not root.exists():
            raise InputError(f"--dataset.root={dataset.root}: there is no such folder.")
        info = root / "meta" / "info.json"
        if not info.is_file():
            raise InputError(
                f"--dataset.root={dataset.root}: not a LeRobot data set, it has no meta/info.json."
            )
        try:
            version = json.loads(info.read_text())["codebase_version"]
        except (ValueError, KeyError):
            raise InputError(f"--dataset.root={dataset.root}: meta/info.json is damaged.") from None
        if version.startswith("v2"):
            raise InputError(
                f"--dataset.root={dataset.root}: a LeRobot {version} data set; this LeRobot reads v3.0. Convert it:\n"
                f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={dataset.repo_id} --root={root}"
            )
    try:
        meta = LeRobotDatasetMetadata(dataset.repo_id, root=dataset.root, revision=dataset.revision)
    except (BackwardCompatibilityError, ForwardCompatibilityError) as error:
        raise InputError(f"data set {dataset.repo_id}: {str(error).strip().splitlines()[0]}") from None
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = (
            dataset.root or f"{dataset.repo_id} (no --dataset.root given: looked for locally and on the Hub)"
        )
        raise InputError(f"cannot open data set {where}: {reason}") from None
    if root is not None:
        for pattern in {meta.data_path, meta.video_path} - {None}:
            folder = pattern.split("/")[0]
            if not (root / folder).is_dir() and (folder != "videos" or meta.video_keys):
                raise InputError(f"--dataset.root={dataset.root}: the data set has no {folder} folder.")
    return meta


def _episodes(recipe: Recipe, meta: LeRobotDatasetMetadata) -> None:
    dataset, held_out = recipe.lerobot.dataset, recipe.options.data.eval_episodes
    everything = list(range(meta.total_episodes))
    for name, episodes in (("dataset.episodes", dataset.episodes), ("data.eval_episodes", held_out)):
        wrong = sorted(set(episodes or ()) - set(everything))
        if wrong:
            raise InputError(
                f"--{name}: no episode {wrong[0]}; the data set has 0 to {meta.total_episodes - 1}."
            )
    chosen = dataset.episodes if dataset.episodes is not None else everything
    if held_out is not None:
        if not held_out:
            raise InputError("--data.eval_episodes=[]: name at least one episode, or leave the flag out.")
        dataset.episodes = [episode for episode in chosen if episode not in set(held_out)]
        if not dataset.episodes:
            raise InputError(
                f"--data.eval_episodes holds out all {len(chosen)} episodes: none is left to train on."
            )
        if recipe.eval_steps == 0:
            recipe.eval_steps = (
                recipe.lerobot.save_freq if recipe.lerobot.save_freq > 0 else recipe.lerobot.steps
            )
    elif dataset.eval_split:
        per_task: dict = {}
        for episode, tasks in zip(everything, meta.episodes["tasks"], strict=True):
            if episode in set(chosen):
                per_task[tasks[0] if tasks else ""] = per_task.get(tasks[0] if tasks else "", 0) + 1
        left = sum(count - math.ceil(count * dataset.eval_split) for count in per_task.values())
        if left == 0:
            raise InputError(
                f"--dataset.eval_split={dataset.eval_split} leaves no training episode: LeRobot rounds up per task "
                f"({len(per_task)} task(s), {len(chosen)} episode(s)). A smaller share, or --data.eval_episodes."
            )
    horizon, longest = recipe.options.data.eval_horizon, chunk_length(recipe.lerobot.policy)
    if horizon is not None and horizon > longest:
        raise InputError(f"--data.eval_horizon={horizon}: the policy predicts {longest} actions from now on.")
    drop = getattr(recipe.lerobot.policy, "drop_n_last_frames", 0)
    if max(meta.episodes["length"][e] for e in dataset.episodes or everything) <= drop:
        raise InputError(f"every training episode is shorter than the {drop} frames the policy leaves out.")


def _features(recipe: Recipe, meta: LeRobotDatasetMetadata) -> None:
    cfg = recipe.lerobot
    features = dataset_to_policy_features(meta.features)
    if ACTION not in features:
        raise InputError(f"the data set has no '{ACTION}'; it has {', '.join(sorted(features))}.")
    renamed = {cfg.rename_map.get(key, key) for key in features}
    wanted = {
        k for k in (cfg.policy.input_features or {}) if not k.startswith("observation.images.empty_camera")
    }
    missing = sorted(wanted - renamed)
    if missing:
        raise InputError(
            f"the policy needs {', '.join(missing)}, which the data set lacks. It has "
            f'{", ".join(sorted(renamed - {ACTION}))}; --rename_map=\'{{"theirs": "policy\'s"}}\' can match names.'
        )
    trial = _with_features(cfg.policy, features)
    try:
        trial.validate_features()
    except Exception as error:
        raise InputError(
            f"{cfg.policy.type} cannot train on this data set: {error} "
            f"It has {', '.join(sorted(set(features) - {ACTION})) or 'no observations'}."
        ) from None


def _with_features(policy: PreTrainedConfig, features: dict) -> PreTrainedConfig:
    """A copy of the policy's config with the data set's features, as `make_policy` will fill them in."""
    trial = copy.deepcopy(policy)
    trial.output_features = {ACTION: features[ACTION]}
    if not trial.input_features:
        trial.input_features = {k: f for k, f in features.items() if k not in trial.output_features}
    return trial


def _resume(recipe: Recipe) -> None:
    cfg = recipe.lerobot
    if not cfg.resume:
        return
    newest = checkpoint.last_checkpoint(recipe.output_dir) or cfg.checkpoint_path
    fault = checkpoint.fault(Path(newest), cfg.policy.type)
    if fault:
        raise InputError(f"cannot resume: {fault}.")
    step = int(json.loads((Path(newest) / "training_state" / "training_step.json").read_text())["step"])
    if step >= cfg.steps:
        raise InputError(
            f"nothing to resume: {newest} has reached --steps={cfg.steps}. More steps continue it."
        )


def _disk(recipe: Recipe, meta: LeRobotDatasetMetadata) -> None:
    """One checkpoint holds the weights and Adam's two moments: three times the weights."""
    if not recipe.lerobot.save_checkpoint:
        return
    folder = recipe.output_dir
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"--output_dir={recipe.output_dir}: {folder} is not a folder.")
    need = 3 * _weight_bytes(recipe.lerobot.policy, dataset_to_policy_features(meta.features))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"--output_dir={recipe.output_dir}: {free / 1e9:.2f} GB are free there, "
            f"one checkpoint needs about {need / 1e9:.2f} GB."
        )


def _weight_bytes(policy: PreTrainedConfig, features: dict) -> int:
    """Bytes of a policy's parameters, from a model without memory behind it; 0 where that is not possible."""
    config = _with_features(policy, features)
    config.pretrained_path = None
    if hasattr(config, "pretrained_backbone_weights"):
        config.pretrained_backbone_weights = None  # nothing is downloaded to be counted
    if config.type not in ("act", "diffusion"):
        return 0
    with torch.device("meta"):
        model = get_policy_class(config.type)(config)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _wandb(recipe: Recipe) -> None:
    wandb_cfg = recipe.lerobot.wandb
    if not wandb_cfg.enable:
        return
    if wandb_cfg.mode not in (None, "online", "offline", "disabled"):
        raise InputError(f"--wandb.mode={wandb_cfg.mode}: must be online, offline or disabled.")
    if wandb_cfg.mode in (None, "online") and not _wandb_login():
        raise InputError(
            "--wandb.enable=true: there is no W&B login here. Run `wandb login`, set WANDB_API_KEY, "
            "or add --wandb.mode=offline."
        )
    if wandb_cfg.run_id is None:
        wandb_cfg.run_id = uuid.uuid4().hex[:8]


def _wandb_login() -> bool:
    import requests.utils

    base_url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(base_url))
