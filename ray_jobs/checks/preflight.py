"""Checks that turn a mistake into one or two lines before anything expensive is scheduled."""

import dataclasses
import json
import shlex
import shutil
import tempfile
import uuid
from pathlib import Path
from urllib.request import Request, urlopen

import draccus
import torch
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.configs.default import PeftConfig
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.optim import AdamConfig, AdamWConfig, SGDConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.constants import (
    ACTION,
    OBS_IMAGES,
    OBS_PREFIX,
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)
from lerobot.utils.feature_utils import dataset_to_policy_features
from safetensors import SafetensorError, safe_open

from ray_jobs.checks import idle, resume, stream
from ray_jobs.checks.columns import check_kinds
from ray_jobs.checks.dataset import (
    check_files,
    check_resize,
    check_statistics,
    misnamed,
    named,
    open_dataset,
    unfit,
    where_it_is,
    with_episodes,
)
from ray_jobs.checks.policy import check_rewards, check_type
from ray_jobs.config.errors import InputError, StorageError, StorageFull, first_line, no_room
from ray_jobs.config.recipe import Recipe
from ray_jobs.data import quantiles
from ray_jobs.data.dataset_cache import once, own_metadata
from ray_jobs.data.frames import set_frame_size
from ray_jobs.data.lerobot_internals import renamed_as_today
from ray_jobs.policies import assets
from ray_jobs.policies.build import outline, with_features
from ray_jobs.policies.facts import facts_of
from ray_jobs.storage import git_lfs, mirror
from ray_jobs.storage.bucket import is_uri
from ray_jobs.storage.hub import HUB_WAIT_S
from ray_jobs.storage.retry import may_pass
from ray_jobs.storage.trust import check_processor, read_json
from ray_jobs.training.memory import estimate
from ray_jobs.training.simulator import SimulatorOptions, check_eval
from ray_jobs.training.simulator import check as check_simulator
from ray_jobs.training.tracking import check_wandb
from ray_jobs.training.validation import check_scored, chunk_length, units

NAMED_TENSORS = 20  # of those that do not fit


def check(recipe: Recipe) -> Recipe:
    """Look over a resolved recipe, which stays as it is.

    Returns:
        A copy that is complete: with its episodes, its memory, notices, the run's id for W&B, and what its policy's own
        adapters and the size of its images make of its config.

    Raises:
        InputError: The data set, the policy, the output folder or the checkpoint to resume will not do.
    """
    stream.check_flags(recipe)
    dataset, held_out = recipe.lerobot.dataset, recipe.options.data.eval_episodes
    meta = own_metadata(once(dataset, "metadata", lambda: open_dataset(dataset)))
    recipe = with_episodes(recipe, meta)
    dataset = recipe.lerobot.dataset
    chosen = f"files of episodes {dataset.episodes} and {held_out}"
    once(dataset, chosen, lambda: check_files(dataset, meta, held_out))
    notices = stream.check_data(recipe, meta)
    features, network, more = check_policy(recipe, meta)
    notices += more + _simulator(recipe, features)
    _backbone(recipe.lerobot.policy, features, recipe.options.assets.dir)
    _weights(recipe, network)
    network = _adapters(recipe, network)
    if network is not None:
        memory = estimate(network, recipe, features)
        recipe = recipe.knowing(memory=memory)
        notices.append(f"memory: {memory}")
        here = recipe.options.ray.num_workers == 0 or recipe.options.ray.address == "local"
        if here and recipe.lerobot.policy.device == "cpu":
            workers = max(1, recipe.options.ray.num_workers)
            if text := memory.without_hope(recipe, workers):
                raise InputError(text)
    notices += resume.check(recipe) + idle.notices(recipe, meta)
    _output_dir(recipe, network)
    check_wandb(recipe.lerobot.wandb)
    if recipe.lerobot.wandb.enable and recipe.lerobot.wandb.run_id is None:
        recipe.lerobot.wandb.run_id = uuid.uuid4().hex[:8]
    return recipe.noting(*notices)


def check_policy(
    recipe: Recipe, meta: LeRobotDatasetMetadata
) -> tuple[dict[str, PolicyFeature], torch.nn.Module | None, list[str]]:
    """The part of `check` that depends on the policy's flags alone; a search asks it of many configurations. Lets the
    config, and the metadata, tell of the size that images are resized to.

    Returns:
        The data set's features under the policy's names, its network without memory if that can be had, and notices.
    """
    check_type(recipe.lerobot.policy)
    check_rewards(recipe.lerobot.policy, meta, where_it_is(recipe.lerobot.dataset)[0])
    _lengths(recipe.lerobot.policy)
    _agree_on_size(recipe, meta)
    _validation(recipe)
    features, notices = check_features(recipe, meta)
    if recipe.eval_steps:
        units(meta)
    network = _network(recipe, features)
    _optimizer(recipe)
    return features, network, notices


def _agree_on_size(recipe: Recipe, meta: LeRobotDatasetMetadata) -> None:
    """Let data set and policy agree on the size of images."""
    size, policy = recipe.options.data.resize, recipe.lerobot.policy
    check_resize(size, meta, recipe.lerobot.rename_map)
    set_frame_size(meta, size)
    if not size:
        return
    for key, feature in (policy.input_features or {}).items():
        if feature.type is FeatureType.VISUAL:
            policy.input_features[key] = PolicyFeature(feature.type, (feature.shape[0], *size))


def _simulator(recipe: Recipe, features: dict[str, PolicyFeature]) -> list[str]:
    """See that the environment that the policy is to act in while it is trained can be made, and fits it; returns notices."""
    cfg = recipe.lerobot
    if cfg.env is None or cfg.env_eval_freq <= 0:
        return []
    if recipe.options.ray.parallelism == "fsdp":
        raise InputError(
            f"--env.type={cfg.env.type}: with --ray.parallelism=fsdp no worker holds a whole policy to act with; "
            "--env_eval_freq=0, and `ray_jobs.evaluate` afterwards."
        )
    check_eval(cfg.eval)
    options = SimulatorOptions(cfg.env, cfg.eval)
    policy = with_features(cfg.policy, features)
    what = f"environment {draccus.encode(options)} for {policy.input_features}"
    found = once(cfg.dataset, what, lambda: check_simulator(options, policy, cfg.rename_map))
    return [] if recipe.options.data.resize else found


def _validation(recipe: Recipe) -> None:
    """Refuse what validation cannot do, or what cannot do without validation."""
    held_out = recipe.options.data.eval_episodes is not None or recipe.lerobot.dataset.eval_split
    if held_out and recipe.eval_steps > 0:
        check_scored(recipe.lerobot.policy)
    horizon, longest = recipe.options.data.eval_horizon, chunk_length(recipe.lerobot.policy)
    if horizon is not None and horizon > longest:
        raise InputError(f"--data.eval_horizon={horizon}: the policy predicts {longest} actions from now on.")
    patience = recipe.options.ray.early_stopping
    if patience and recipe.eval_steps == 0:
        raise InputError(
            f"--ray.early_stopping={patience} needs validation: --data.eval_episodes='[0,1]', "
            "or --dataset.eval_split and --eval_steps."
        )


# ---------------------------------------------------------------------- the policy


def _lengths(policy: PreTrainedConfig) -> None:
    """Refuse lengths that LeRobot takes without a word."""
    facts = facts_of(policy.type)
    for name in ("n_obs_steps", "n_action_steps", *facts.chunk_fields):
        value = getattr(policy, name, None)
        if isinstance(value, int) and value < 1:
            raise InputError(f"--policy.{name}={value}: must be at least 1.")
    if facts.predicts_past and policy.n_action_steps > chunk_length(policy):
        raise InputError(
            f"--policy.n_action_steps={policy.n_action_steps}: the policy predicts {chunk_length(policy)} actions "
            "from now on (horizon - n_obs_steps + 1)."
        )


def check_features(
    recipe: Recipe, meta: LeRobotDatasetMetadata
) -> tuple[dict[str, PolicyFeature], list[str]]:
    """See that the data set holds what the policy takes; returns its features under the policy's names, and notices."""
    cfg, policy, (name, _) = recipe.lerobot, recipe.lerobot.policy, where_it_is(recipe.lerobot.dataset)
    features = dataset_to_policy_features(meta.features)
    taken = policy.input_features or features
    if ACTION not in features or any(k in taken and not k.startswith(OBS_PREFIX) for k in meta.camera_keys):
        raise InputError(f"{name}: {misnamed(meta)}")
    notices = check_statistics(recipe, meta)
    check_kinds(name, policy, meta, cfg.batch_size)
    if where_it_is(cfg.dataset)[1] is not None and not is_uri(
        cfg.dataset.root
    ):  # else the workers do, who fetch it
        quantiles.complete(policy, meta)

    features = {cfg.rename_map.get(key, key): feature for key, feature in features.items()}
    wanted = policy.input_features or {}
    wanted = {key: f for key, f in wanted.items() if not key.startswith(f"{OBS_IMAGES}.empty_camera")}
    required = set(wanted)
    cameras, seen = (
        {key for key, f in some.items() if f.type is FeatureType.VISUAL} for some in (wanted, features)
    )
    # Such policies fill in for absent cameras; LeRobot allows it if no other camera takes part unnamed.
    if hasattr(policy, "empty_cameras") and cameras & seen and (seen <= cameras or cfg.rename_map):
        required -= cameras
    missing = sorted(required - set(features))
    if missing:
        rename = {theirs: ours for theirs, ours in cfg.rename_map.items() if theirs in meta.features}
        unused = [key for key in features if key not in wanted and key != ACTION]
        for key in missing:
            alike = [theirs for theirs in unused if features[theirs].type is wanted[key].type]
            if not alike:
                if wanted[key].type is FeatureType.VISUAL and hasattr(policy, "empty_cameras"):
                    continue  # it is filled in for, once another one is there
                rename = {}  # no renaming helps
                break
            rename[alike[0]] = key
            unused.remove(alike[0])
        if policy.pretrained_path is None:  # LeRobot renames for those alone
            rename = {}
        hint = f" If names differ only: --rename_map={shlex.quote(json.dumps(rename))}" if rename else ""
        raise InputError(
            f"the policy takes {named(wanted)}; the data set has {named(features)}.\n"
            f"It lacks {', '.join(missing)}.{hint}"
        )
    for key, feature in {**wanted, **(policy.output_features or {})}.items():
        ours, theirs = tuple(feature.shape), tuple(features[key].shape if key in features else feature.shape)
        # The large policies pad both to a common length.
        if feature.type is not FeatureType.VISUAL and ours != theirs and not hasattr(policy, "max_state_dim"):
            raise InputError(f"{key}: the policy has shape {ours}, the data set {theirs}.")
    if reason := unfit(policy, features):
        raise InputError(f"{policy.type} cannot train on this data set: {reason}")
    return features, notices


def _network(recipe: Recipe, features: dict[str, PolicyFeature]) -> torch.nn.Module | None:
    """The policy without memory behind its weights, to be counted and compared; None for those that cannot be
    built so. Everything pretrained that it starts from must be here, or on the Hub."""
    policy = recipe.lerobot.policy
    with assets.mounted(recipe.options.assets.dir, policy, weights=False):
        if not facts_of(policy.type).counted:
            return None
        try:
            return outline(policy, features)
        except NotImplementedError:  # an operation that needs memory
            return None
        except Exception as error:
            raise InputError(f"{policy.type} cannot be built like this: {first_line(error)}.") from None


def _adapters(recipe: Recipe, network: PreTrainedPolicy | None) -> torch.nn.Module | None:
    """The network with the adapters of `--peft.*`, as far as one can be put together."""
    cfg = recipe.lerobot
    if cfg.policy.use_peft and not cfg.resume:
        _own_adapters(recipe)
    if cfg.peft is None:
        return network
    if recipe.options.ray.ema:
        raise InputError("--ray.ema=true does not go with --peft.*: an average of adapters is not kept.")
    if cfg.policy.pretrained_path is None:
        raise InputError(
            f"--peft.method_type={cfg.peft.method_type}: adapters fine-tune a pretrained policy; --policy.path or "
            "--policy.pretrained_path names it."
        )
    try:
        return network and network.wrap_with_peft(peft_cli_overrides=dataclasses.asdict(cfg.peft))
    except Exception as error:
        raise InputError(f"--peft.*: {first_line(error)}") from None


def _own_adapters(recipe: Recipe) -> None:
    """Of a policy that comes with adapters these are trained on, whatever `--peft.*` says; so that is what they are. (Without
    `--peft.*` LeRobot would leave the policy's config out of the checkpoints.)"""
    cfg, folder = recipe.lerobot, _folder_of_start(recipe)
    file = folder and folder / "adapter_config.json"
    if not file or not file.is_file():
        return
    saved = json.loads(file.read_text())
    names = {"method_type": "peft_type", "full_training_modules": "modules_to_save"}
    there = {f.name: saved.get(names.get(f.name, f.name)) for f in dataclasses.fields(PeftConfig)}
    typed = [flag for flag in recipe.command if flag.startswith("peft.") and cfg.peft is not None]
    others = [flag for flag in typed if getattr(cfg.peft, flag[5:]) != there[flag[5:]]]
    if others:
        told = ", ".join(f"--{flag}={recipe.command[flag]} (there {there[flag[5:]]})" for flag in others)
        raise InputError(
            f"{told}: without effect, for {folder} has adapters, which are trained on as they are.\n"
            f"Leave {'it' if len(others) == 1 else 'them'} out; new adapters begin from the policy that those are for, "
            f"{saved.get('base_model_name_or_path')}."
        )
    cfg.peft = PeftConfig(**{name: value for name, value in there.items() if value is not None})


def _optimizer(recipe: Recipe) -> None:
    """Build optimizer and schedule for a single number: values that they refuse show at once."""
    cfg = recipe.lerobot
    if not isinstance(cfg.optimizer, AdamConfig | AdamWConfig | SGDConfig):
        return  # the others want parameters by name
    try:
        optimizer = cfg.optimizer.build([torch.nn.Parameter(torch.zeros(1))])
        if cfg.scheduler is not None:
            cfg.scheduler.build(optimizer, cfg.steps)
    except Exception as error:
        raise InputError(
            f"the optimizer or its schedule cannot be built: {first_line(error)}\n"
            f"They are {cfg.optimizer} and {cfg.scheduler}."
        ) from None


def _backbone(policy: PreTrainedConfig, features: dict[str, PolicyFeature], folder: Path) -> None:
    """See that torchvision's weights that a new policy starts from are here or can be downloaded."""
    url = assets.backbone_url(policy)
    cameras = any(feature.type is FeatureType.VISUAL for feature in features.values())
    if url is None or policy.pretrained_path is not None or not cameras:
        return
    name = Path(url).name
    for file in (folder / name, Path(torch.hub.get_dir()) / "checkpoints" / name):
        if file.is_file():
            if git_lfs.pointers([file]):
                raise InputError(git_lfs.fault([file]))
            try:
                torch.load(file, map_location="cpu", weights_only=True)
            except Exception:
                raise InputError(f"{file} holds no weights of torchvision's; {url} does.") from None
            return
    try:
        urlopen(Request(url, method="HEAD"), timeout=HUB_WAIT_S).close()
    except OSError:
        raise InputError(
            f"--policy.pretrained_backbone_weights={policy.pretrained_backbone_weights} (LeRobot's default) is not here and cannot be "
            f"downloaded.\nPut {url} into {folder}, or start untrained: --policy.pretrained_backbone_weights=null"
        ) from None


# ---------------------------------------------------------------------- checkpoints and the output folder


def _weights(recipe: Recipe, network: torch.nn.Module | None) -> None:
    """See that the weights to start from are whole and fit the flags, as far as their headers show."""
    policy, folder = recipe.lerobot.policy, _folder_of_start(recipe)
    if folder is None:
        return
    needed = [f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json", f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json"]
    if not any(folder.glob("*model.safetensors")):
        needed.append("model.safetensors")
    if notes := git_lfs.pointers(sorted(folder.iterdir())):
        raise InputError(f"cannot start from {folder}: {git_lfs.fault(notes)}")
    saved: dict[str, torch.Tensor] = {}
    for path in (*(folder / name for name in needed), *folder.glob("*.json"), *folder.glob("*.safetensors")):
        if not path.is_file():
            raise InputError(f"cannot start from {folder}: it has no {path.name}.")
        try:
            if path.suffix == ".json":
                if path.name in needed[:2]:
                    check_processor(path)
                if path.name != CONFIG_NAME:
                    json.loads(path.read_text())
                    continue
                content = read_json(path)
                kind = content.get("type", policy.type)
                if kind != policy.type:
                    raise InputError(
                        f"cannot start from {folder}: it holds a policy of type {kind}, not {policy.type}."
                    )
                continue
            with safe_open(path, framework="pt") as file:
                if path.name == SAFETENSORS_SINGLE_FILE:
                    saved = {
                        key: torch.empty(file.get_slice(key).get_shape(), device="meta")
                        for key in file.keys()
                    }
        except (ValueError, SafetensorError, OSError) as error:
            raise InputError(f"cannot start from {folder}: {path.name} is damaged ({error}).") from None
    if network is not None and saved:
        _fit(folder, network, saved)


def _folder_of_start(recipe: Recipe) -> Path | None:
    """Where the policy lies that the training begins from; None if there is none, or the workers download it."""
    start = recipe.lerobot.policy.pretrained_path
    if start is None or Path(start).is_dir():
        return start and Path(start)
    return assets.find(recipe.options.assets.dir, str(start))


def _fit(folder: Path, network: torch.nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """See that a checkpoint's tensors are those of the policy. LeRobot would start those that are missing from
    random values, and pi0 and pi0.5 altogether, without an error."""
    saved = renamed_as_today(network, saved)
    wanted = network.state_dict(keep_vars=True)
    tied = {id(value) for key, value in wanted.items() if key in saved}
    faults = {
        "other shapes there": [
            f"{key} {tuple(saved[key].shape)} instead of {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in saved and saved[key].shape != value.shape
        ],
        "missing there": [key for key, value in wanted.items() if key not in saved and id(value) not in tied],
    }
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - NAMED_TENSORS} more" if len(names) > NAMED_TENSORS else ""
            raise InputError(
                f"cannot start from {folder}, with these flags the policy is another: {fault} are "
                f"{', '.join(names[:NAMED_TENSORS])}{more}.\nLeave out the --policy flags that change the network."
            )


def _output_dir(recipe: Recipe, network: torch.nn.Module | None) -> None:
    """See that the output folder can be written, and has room for a checkpoint."""
    if recipe.remote:
        mirror.check_writable(recipe.remote)
    folder = recipe.output_dir
    try:
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise InputError(f"--output_dir={recipe.output_dir}: {folder} is not a folder.")
        tempfile.TemporaryFile(dir=folder).close()
        room = shutil.disk_usage(folder)
    except OSError as error:
        kind = StorageFull if no_room(error) else StorageError if may_pass(error) else InputError
        told = f"--output_dir={recipe.output_dir}: {folder} cannot be written ({error.strerror})."
        raise kind(told) from None
    if network is None or not recipe.lerobot.save_checkpoint:
        return
    # The weights and Adam's two moments, and the trained weights behind an average.
    copies = 4 if recipe.options.ray.ema else 3
    need = copies * sum(p.numel() * p.element_size() for p in network.parameters())
    if need > room.free:
        kind = InputError if need > room.total else StorageFull  # another configuration may fit; or none will
        raise kind(
            f"--output_dir={recipe.output_dir}: {room.free / 1e9:.2f} GB are free there, "
            f"one checkpoint needs about {need / 1e9:.2f} GB. Make room, or give another folder."
        )


# ---------------------------------------------------------------------- Weights & Biases
