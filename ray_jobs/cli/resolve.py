"""From the command line to a recipe: LeRobot's own training config plus our few groups of options.

Flags of LeRobot's `TrainPipelineConfig` are parsed by LeRobot's draccus classes, never by a copy of them;
ours have their own prefixes. The recipe is resolved once, in the driver: `TrainPipelineConfig.validate`
re-reads `sys.argv`, which a worker does not share.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import get_token, try_to_load_from_cache
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import parser as lerobot_parser
from lerobot.configs.train import TRAIN_CONFIG_NAME, TrainPipelineConfig
from lerobot.utils.constants import CHECKPOINTS_DIR, PRETRAINED_MODEL_DIR

from ray_jobs.checks.output_dir import RUN, check_output_dir
from ray_jobs.cli import resume
from ray_jobs.cli.command_line import asked_device, asks_to_resume, parse_options, read_flags, split_flags
from ray_jobs.cli.flags import LEAST, as_arguments, check_flags, check_sources, plugins_of
from ray_jobs.cli.parse_errors import parse
from ray_jobs.cli.translations import translate
from ray_jobs.config.errors import InputError, all_mistakes
from ray_jobs.config.options import ASKED, OPTIONS_FILE, Options, at_least
from ray_jobs.config.recipe import Recipe
from ray_jobs.policies import assets
from ray_jobs.storage import mirror
from ray_jobs.storage.bucket import check_address, is_uri
from ray_jobs.storage.hub import hub_or_cache
from ray_jobs.storage.trust import check_links, read_json
from ray_jobs.training.checkpoint import checkpoint_steps, last_checkpoint
from ray_jobs.training.checkpoint import fault as checkpoint_fault


def resolve(argv: Sequence[str]) -> Recipe:
    """Turn command-line arguments into a recipe.

    Args:
        argv: What follows `python -m ray_jobs.train`, as `--name=value` or `--name value`.

    Raises:
        InputError: A flag, a value or their combination is wrong; the message says what would be right.
    """
    flags, notices = read_flags(argv)
    check_flags(flags)
    typed_now = dict(flags)
    asked_resume = asks_to_resume(flags)
    remote = flags.get("output_dir") if is_uri(flags.get("output_dir")) else None
    if remote:
        flags["output_dir"] = str(_place_for(remote, asked_resume))
    _, theirs = split_flags(flags)
    saved: dict = {}
    if asked_resume:
        theirs, saved = _resume_flags(theirs)
    asked = saved.pop(ASKED, {})
    check_sources(theirs)
    if is_uri(flags.get("dataset.root")):
        check_address(flags["dataset.root"])

    options = parse_options(flags, saved)
    options.assets.dir = options.assets.dir.absolute()  # workers run in folders of their own
    names = ("policy.path", "policy.pretrained_path")
    start: dict[str, str] = {flag: theirs[flag] for flag in names if flag in theirs}
    start |= assets.read_at_once(flags)
    start = {flag: name for flag, name in start.items() if name != "null" and not Path(name).exists()}
    if not asked_resume and not {"policy.repo_id", "policy.push_to_hub", "config_path"} & set(flags):
        # As in most of the published commands, which LeRobot refuses for it today.
        theirs = {**theirs, "policy.push_to_hub": "false"}
        notices.append("The policy will not be uploaded: no --policy.repo_id names a place on the Hub.")
    with assets.configs_mounted(options.assets.dir, start):
        # Which policy a checkpoint holds shows now: flags of older recipes may be meant for it.
        theirs, more = translate(theirs, _type_of_start(theirs))
        notices += more
        if asked_resume and Path(theirs.get("config_path", "")).is_file():
            begun = asked.get("typed", {})
            theirs = resume.without_the_same(theirs, begun)
            changed = {
                name: value
                for name, value in flags.items()
                if theirs.get(name) == value or name in resume.STARTS
            }
            resume.refuse_overruled(Path(theirs["config_path"]).absolute().parent, changed, begun)
        cfg = _lerobot_config(theirs, flags, options, asked_resume)

    if options.data.eval_episodes is not None and "eval_steps" not in flags:
        cfg.eval_steps = asked.get("eval_steps", cfg.eval_steps)
    if cfg.wandb.run_id is None:
        cfg.wandb.run_id = asked.get("wandb_run_id")
    device = asked_device(flags) if "policy.device" in flags else asked.get("device")
    if device is not None and device != cfg.trainable_config.device:
        notices.append(f"No {device} device on this machine: the worker's own device decides.")
    if (device or "").startswith("cuda:") and options.ray.num_workers:
        notices.append(
            f"--policy.device={device}: Ray gives every worker a GPU of its own, whatever its number."
        )
    if cfg.policy.push_to_hub and (reason := _no_upload(cfg.policy.repo_id, options)):
        cfg.policy.push_to_hub = False
        notices.append(f"The policy will not be uploaded to --policy.repo_id={cfg.policy.repo_id}: {reason}.")
    # Workers run in folders of their own.
    cfg.output_dir = Path(cfg.output_dir).absolute()
    for owner, name in ((cfg.policy, "pretrained_path"), (cfg, "checkpoint_path")):
        path = getattr(owner, name)
        if path is not None and Path(path).exists():
            setattr(owner, name, Path(path).absolute())
    if cfg.dataset.root is not None and not is_uri(cfg.dataset.root):
        cfg.dataset.root = str(Path(cfg.dataset.root).absolute())
    eval_steps = cfg.eval_steps
    if options.data.eval_episodes is not None:
        # Stock LeRobot knows no list of held-out episodes and refuses eval_steps without eval_split, so the
        # saved config leaves it out and names the training episodes instead.
        cfg.eval_steps = 0
    recipe = Recipe(
        cfg,
        options,
        device,
        eval_steps,
        tuple(notices),
        remote=remote,
        plugins=tuple(plugins_of(flags).values()),
        typed=asked.get("typed", {} if asked_resume else typed_now),
        command=typed_now,
    )
    return replace(recipe, id=asked["id"]) if "id" in asked else recipe


def _place_for(remote: str, resume: bool) -> Path:
    """The folder of this node where a run lives that is copied to a bucket; on resume with what is there."""
    folder = mirror.folder_of(remote)
    if not resume:
        mirror.check_new(remote)
        return folder
    mirror.pull(remote, folder)
    if last_checkpoint(folder) is None and not (folder / OPTIONS_FILE).is_file():
        raise InputError(f"--resume=true: nothing to resume, there is no run in {remote}.")
    return folder


def _resume_flags(theirs: dict[str, str]) -> tuple[dict[str, str], dict]:
    """Complete a `--resume=true` command with the checkpoint it means.

    LeRobot wants `--config_path`; the same command as at the start will do here, since its `--output_dir`
    leads to the newest checkpoint. A run that was killed before its first checkpoint starts over. Returns
    the flags and what `tracking.save_options` wrote, if it did.
    """
    config_path, output_dir = theirs.get("config_path"), theirs.get("output_dir")
    policy_type = theirs.get("policy.type")
    # The checkpoint already holds what --policy.path gave; LeRobot would take it before the checkpoint.
    without_path = {name: value for name, value in theirs.items() if name != "policy.path"}
    if config_path is not None:
        file = Path(config_path).absolute()
        pretrained_dir = file if file.is_dir() else file.parent
        run_dir = pretrained_dir.parent.parent.parent  # <run>/checkpoints/<step>/pretrained_model
        newest = last_checkpoint(run_dir)
        branches_off = output_dir is not None and Path(output_dir).resolve() != run_dir.resolve()
        if newest is not None and newest.resolve() != pretrained_dir.resolve().parent and not branches_off:
            raise InputError(
                f"--config_path={config_path}: the run has a newer checkpoint, {newest.name}, which would be "
                "overwritten. Resume from that one, or give another --output_dir to branch off here."
            )
        theirs = without_path
        if file.exists():
            _check_checkpoint(pretrained_dir.parent, policy_type)
            if output_dir is None and pretrained_dir.parent.parent.name == CHECKPOINTS_DIR:
                # The saved config names the folder it was trained in: another one, once a run was moved.
                theirs = {**theirs, "output_dir": str(run_dir)}
    else:
        if output_dir is None:
            raise InputError(
                "--resume=true needs --output_dir or --config_path to say which run to continue."
            )
        run_dir = Path(output_dir).absolute()
        newest = last_checkpoint(run_dir)
        if newest is not None:
            config_path = newest / PRETRAINED_MODEL_DIR / TRAIN_CONFIG_NAME
            _check_checkpoint(newest, policy_type)
            theirs = {**without_path, "config_path": str(config_path)}
        elif (run_dir / OPTIONS_FILE).is_file():
            theirs = {name: value for name, value in theirs.items() if name != "resume"}
        else:
            raise InputError(f"--resume=true: nothing to resume, there is no run in {output_dir}.")
    check_links(run_dir)
    saved_options = run_dir / OPTIONS_FILE
    if not saved_options.is_file():
        return theirs, {}
    try:
        saved = read_json(saved_options)
        if not all(isinstance(group, dict) for group in saved.values()):
            raise ValueError
        return theirs, saved
    except ValueError:
        raise InputError(
            f"cannot resume: {saved_options} is damaged. Remove it, and give the run's --ray, --data and "
            "--checkpoint flags again."
        ) from None


def _type_of_start(theirs: dict[str, str]) -> str | None:
    """The type of the policy that `--policy.path` or `--config_path` names; None if that does not show."""
    name = theirs.get("policy.path") or theirs.get("config_path")
    if name is None:
        return None
    place = Path(name)
    folder = place.parent if place.is_file() else place
    with contextlib.suppress(
        AttributeError, TypeError, OSError, ValueError, RecursionError
    ):  # what is wrong with it, LeRobot's parser will find
        file = folder / CONFIG_NAME if folder.is_dir() else try_to_load_from_cache(name, CONFIG_NAME)
        if isinstance(file, str | Path):
            return json.loads(Path(file).read_text()).get("type")
    return None


def _check_checkpoint(folder: Path, policy_type: str | None) -> None:
    damage = checkpoint_fault(folder)
    if damage:
        steps = checkpoint_steps(folder.resolve().parent.parent)
        older = [path.name for path in steps.values() if path.name < folder.resolve().name]
        hint = f"\nWithout {folder} the run would go on from {max(older)}." if older else ""
        raise InputError(f"cannot resume: {damage}.{hint}")
    mismatch = checkpoint_fault(folder, policy_type)
    if mismatch:
        raise InputError(f"cannot resume: {mismatch}.")


def _lerobot_config(
    theirs: dict[str, str], flags: dict[str, str], options: Options, asked_resume: bool
) -> TrainPipelineConfig:
    """Parse and validate with LeRobot's own entry point, which reads `sys.argv` in several places."""

    @lerobot_parser.wrap()
    def parse_and_validate(cfg: TrainPipelineConfig) -> TrainPipelineConfig:
        eval_steps = cfg.eval_steps
        if options.data.eval_episodes is not None:
            if cfg.dataset.eval_split:
                raise InputError(
                    f"--data.eval_episodes={options.data.eval_episodes} and "
                    f"--dataset.eval_split={cfg.dataset.eval_split} exclude each other; give one."
                )
            cfg.eval_steps = 0  # validate() would ask for eval_split
        elif eval_steps > 0 and not cfg.dataset.eval_split:
            raise InputError(
                f"--eval_steps={eval_steps} needs held-out episodes: --data.eval_episodes='[0,1]' names them, "
                "--dataset.eval_split=0.1 takes the last tenth of every task."
            )
        output_dir = cfg.output_dir
        if not (cfg.resume or asked_resume) and output_dir is not None:
            check_output_dir(Path(output_dir), RUN)
        if not cfg.resume:
            cfg.output_dir = None  # validate() would refuse a run that was killed before its first checkpoint
        cfg.validate()
        cfg.output_dir = output_dir or cfg.output_dir
        cfg.eval_steps = eval_steps
        return cfg

    values = ((flag, theirs.get(flag)) for flag in ("config_path", "policy.path"))
    from_hub = next(
        (f"--{flag}={value}" for flag, value in values if value and not Path(value).exists()), None
    )
    with _sys_argv(as_arguments(theirs)), hub_or_cache() if from_hub else contextlib.nullcontext():
        cfg = parse(parse_and_validate, flags, from_hub)
    with all_mistakes() as mistakes:  # in a config file; what was typed has been looked at
        for name, least in LEAST.items():
            mistakes += at_least(name, getattr(cfg, name), least)
    if cfg.is_reward_model_training:
        raise InputError(
            "--reward_model: only policies are trained here; lerobot-train trains reward models."
        )
    if cfg.dataset.streaming:
        raise InputError("--dataset.streaming=true: not supported; --data.source=stream is ours.")
    if cfg.sample_weighting is not None:
        raise InputError("--sample_weighting: not supported here; lerobot-train has it.")
    if cfg.save_checkpoint_to_hub:
        raise InputError(
            "--save_checkpoint_to_hub=true: not supported; --policy.push_to_hub uploads the trained policy."
        )
    if cfg.job.is_remote:
        raise InputError(
            f"--job.target={cfg.job.target}: runs go to Ray here; lerobot-train submits to HF Jobs."
        )
    return cfg


def _no_upload(repo_id: str, options: Options) -> str | None:
    """Why a policy cannot be uploaded, as far as it shows before the training."""
    if options.ray.parallelism == "fsdp":
        return "no worker holds all of it (`hf upload` takes its checkpoint)"
    if repo_id.lower() in ("none", "null"):
        return "that is no name"
    return None if get_token() else "there is no Hub login here (`hf auth login`)"


@contextlib.contextmanager
def _sys_argv(args: Sequence[str]) -> Iterator[None]:
    saved, sys.argv = sys.argv, [sys.argv[0], *args]
    try:
        yield
    finally:
        sys.argv = saved
