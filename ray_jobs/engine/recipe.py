"""From the command line to a recipe: LeRobot's own training config plus our few groups of options.

Flags of LeRobot's `TrainPipelineConfig` are parsed by LeRobot's draccus classes, never by a copy of them.
Ours have their own prefixes (`--ray.*`, `--data.*`, `--checkpoint.*`) and are parsed by draccus as well.
The recipe is resolved once, in the driver: `TrainPipelineConfig.validate` re-reads `sys.argv`, which a
worker does not share.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
import lerobot.policies  # noqa: F401  (registers every --policy.type)
from draccus.argparsing import ArgumentParser
from lerobot.configs import parser as lerobot_parser
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TRAIN_CONFIG_NAME, TrainPipelineConfig
from lerobot.utils.constants import PRETRAINED_MODEL_DIR

import ray_jobs.part_sorting  # noqa: F401  (registers --env.type=part_sorting)
from ray_jobs.engine.checkpoint import fault as checkpoint_fault
from ray_jobs.engine.checkpoint import last_checkpoint
from ray_jobs.engine.errors import InputError

OPTIONS_FILE = "options.json"  # our groups of options, beside LeRobot's checkpoints in the output folder


@dataclass
class RayOptions:
    """How the run is spread over workers."""

    num_workers: int = 1
    """Training workers. 0 runs everything in this process, without a cluster (for a debugger)."""
    cpus_per_worker: int | None = None
    """CPUs each worker reserves. Default: its share of the machine, at most 8 beside a GPU."""
    gpus_per_worker: float | None = None
    """GPUs each worker reserves. Default: 1 where the cluster has GPUs and the recipe allows them."""
    address: str | None = None
    """`local` starts a cluster, `auto` or an address joins one. Default: join if there is one."""
    max_failures: int = 3
    """How often lost workers are replaced before the run is given up; -1 for ever."""
    grad_accumulation: int = 1
    """Batches whose gradients are added up for one optimizer step."""
    ema: bool = False
    """Keep an exponential moving average of the weights, validate with it and save it as the policy."""
    early_stopping: int = 0
    """Stop after so many validations without a better val/action_error; 0 never."""

    def __post_init__(self) -> None:
        _at_least("ray.num_workers", self.num_workers, 0)
        _at_least("ray.cpus_per_worker", self.cpus_per_worker, 1)
        _at_least("ray.gpus_per_worker", self.gpus_per_worker, 0)
        _at_least("ray.max_failures", self.max_failures, -1)
        _at_least("ray.grad_accumulation", self.grad_accumulation, 1)
        _at_least("ray.early_stopping", self.early_stopping, 0)


@dataclass
class DataOptions:
    """Which episodes are held out, and how they are scored."""

    eval_episodes: list[int] | None = None
    """Episodes held out for validation; takes the place of --dataset.eval_split."""
    eval_horizon: int | None = None
    """Steps of the predicted chunk that val/action_error compares. Default: the whole chunk."""

    def __post_init__(self) -> None:
        _at_least("data.eval_horizon", self.eval_horizon, 1)


@dataclass
class CheckpointOptions:
    """Which checkpoints stay on disk. The last and the best one always do."""

    keep_last: int | None = None
    """Newest checkpoints to keep. Default: all, as LeRobot does."""
    keep_best: int = 1
    """Checkpoints with the lowest val/action_error to keep, when there are held-out episodes."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.keep_last", self.keep_last, 1)
        _at_least("checkpoint.keep_best", self.keep_best, 1)


@dataclass
class Options:
    """Everything on the command line that is not LeRobot's."""

    ray: RayOptions = field(default_factory=RayOptions)
    data: DataOptions = field(default_factory=DataOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)


@dataclass
class Recipe:
    """A resolved training recipe, ready to be shipped to workers.

    `lerobot` holds absolute paths and is what `train_config.json` will contain. `device` is what the user
    asked for (None: whatever the worker has); `lerobot.policy.device` cannot tell, since LeRobot rewrites it
    on a driver without a GPU.
    """

    lerobot: TrainPipelineConfig
    options: Options
    device: str | None = None
    eval_steps: int = 0
    notices: list[str] = field(default_factory=list)

    @property
    def output_dir(self) -> Path:
        return Path(self.lerobot.output_dir)

    @property
    def global_batch_size(self) -> int:
        """Samples in one optimizer step, over all workers and accumulated batches."""
        ray = self.options.ray
        return self.lerobot.batch_size * max(1, ray.num_workers) * ray.grad_accumulation

    def save_options(self) -> None:
        """Write our options beside the checkpoints, where `--resume` finds them."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / OPTIONS_FILE).write_text(json.dumps(draccus.encode(self.options), indent=2) + "\n")


# Flags of published recipes that today's LeRobot spells differently.
RENAMED = {"eval_freq": "env_eval_freq"}


def resolve(argv: Sequence[str]) -> Recipe:
    """Turn command-line arguments into a recipe.

    Args:
        argv: What follows `python -m ray_jobs.train`, as `--name=value` or `--name value`.

    Raises:
        InputError: A flag, a value or their combination is wrong; the message says what would be right.
    """
    ours, theirs, notices = _split(argv)
    asked_resume = (lerobot_parser.parse_arg("resume", theirs) or "false").lower() in ("true", "yes", "1")
    saved_options = None
    if asked_resume:
        theirs, saved_options = _resume_arguments(theirs)
    _check_flags(ours, theirs)

    options = _parse(lambda: draccus.parse(Options, config_path=saved_options, args=ours))
    cfg = _lerobot_config(theirs, options, asked_resume)

    device = lerobot_parser.parse_arg("policy.device", theirs)
    if device is not None and device != cfg.trainable_config.device:
        notices.append(f"No {device} device on this machine: the worker's own device decides.")
    # Workers run in folders of their own.
    cfg.output_dir = Path(cfg.output_dir).absolute()
    if cfg.dataset.root is not None:
        cfg.dataset.root = str(Path(cfg.dataset.root).absolute())
    eval_steps = cfg.eval_steps
    if options.data.eval_episodes is not None:
        # Stock LeRobot knows no list of held-out episodes and refuses eval_steps without eval_split, so the
        # saved config leaves it out and names the training episodes instead.
        cfg.eval_steps = 0
    return Recipe(cfg, options, device, eval_steps, notices)


def help_text() -> str:
    """Our options with their defaults, and where LeRobot's are shown."""
    lines = ["Every flag of lerobot-train, and:", ""]
    for group in dataclasses.fields(Options):
        group_type = group.default_factory
        lines.append(f"  {group_type.__doc__}")
        for option in dataclasses.fields(group_type):
            default = "" if option.default is None else f" [{json.dumps(option.default)}]"
            help_line = draccus.wrappers.docstring.get_attribute_docstring(
                group_type, option.name
            ).docstring_below
            lines.append(f"    --{group.name}.{option.name}{default}\n        {help_line}")
        lines.append("")
    lines.append("LeRobot's flags for one policy:  python -m ray_jobs.train --policy.type=act --help")
    return "\n".join(lines)


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"--{name}={value}: must be at least {least}.")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Sort arguments into ours and LeRobot's, renaming those of older recipes: (ours, theirs, notices)."""
    prefixes = tuple(f"--{group.name}." for group in dataclasses.fields(Options))
    ours, theirs, notices = [], [], []
    side = theirs
    for arg in argv:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            if name in RENAMED:
                notices.append(f"--{name} is called --{RENAMED[name]} today: understood as that.")
                arg = f"--{RENAMED[name]}{equals}{value}"
            side = ours if arg.startswith(prefixes) else theirs
        side.append(arg)
    return ours, theirs, notices


def _resume_arguments(theirs: list[str]) -> tuple[list[str], Path | None]:
    """Complete a `--resume=true` command with the checkpoint it means.

    LeRobot wants `--config_path`; the same command as at the start will do here, since its `--output_dir`
    leads to the newest checkpoint. A run that was killed before its first checkpoint starts over. Returns
    the arguments and, if there is one, the file of our saved options.
    """
    # The checkpoint already holds what --policy.path gave; LeRobot would take it before the checkpoint.
    config_path = lerobot_parser.parse_arg("config_path", theirs)
    if config_path is not None:
        pretrained_dir = Path(config_path) if Path(config_path).is_dir() else Path(config_path).parent
        run_dir = pretrained_dir.absolute().parent.parent.parent  # <run>/checkpoints/<step>/pretrained_model
        newest = last_checkpoint(run_dir)
        output_dir = lerobot_parser.parse_arg("output_dir", theirs)
        branches_off = output_dir is not None and Path(output_dir).resolve() != run_dir.resolve()
        if newest is not None and newest.resolve() != pretrained_dir.resolve().parent and not branches_off:
            raise InputError(
                f"--config_path={config_path}: the run has a newer checkpoint, {newest.name}, which would be "
                "overwritten. Resume from that one, or give another --output_dir to branch off here."
            )
        theirs = lerobot_parser.filter_arg("policy.path", theirs)
    else:
        output_dir = lerobot_parser.parse_arg("output_dir", theirs)
        if output_dir is None:
            raise InputError(
                "--resume=true needs --output_dir or --config_path to say which run to continue."
            )
        run_dir = Path(output_dir).absolute()
        newest = last_checkpoint(run_dir)
        if newest is not None:
            config_path = newest / PRETRAINED_MODEL_DIR / TRAIN_CONFIG_NAME
            fault = checkpoint_fault(newest)
            if fault:
                raise InputError(f"cannot resume: {fault}.")
            theirs = [*lerobot_parser.filter_arg("policy.path", theirs), f"--config_path={config_path}"]
        elif (run_dir / OPTIONS_FILE).is_file():
            theirs = lerobot_parser.filter_arg("resume", theirs)
        else:
            raise InputError(f"--resume=true: nothing to resume, there is no run in {output_dir}.")
    saved_options = run_dir / OPTIONS_FILE
    return theirs, saved_options if saved_options.is_file() else None


def _check_flags(ours: list[str], theirs: list[str]) -> None:
    """Refuse unknown flags, naming the nearest right one: argparse would print 655 of them."""
    policy_type = lerobot_parser.get_type_arg("policy", theirs)
    known_types = PreTrainedConfig.get_known_choices()
    if policy_type is not None and policy_type not in known_types:
        raise InputError(
            f"--policy.type={policy_type}: LeRobot has no such policy{_nearest(policy_type, known_types)}\n"
            f"It has {', '.join(sorted(known_types))}."
        )
    known = set(ArgumentParser(Options).parser._option_string_actions)
    known |= set(ArgumentParser(TrainPipelineConfig).parser._option_string_actions)
    known |= {"--policy.path", "--reward_model.path"}
    if policy_type is not None:
        fields = {f"--policy.{f.name}" for f in dataclasses.fields(known_types[policy_type]) if f.init}
        known = {k for k in known if not k.startswith("--policy.")} | fields
        known |= {"--policy.type", "--policy.path"}
    for arg in (*ours, *theirs):
        name = arg.split("=", 1)[0]
        if not name.startswith("--") and name.startswith("-") and not _is_number(name):
            raise InputError(f"{arg}: flags start with two dashes.")
        if name.startswith("--") and name not in known and not name.endswith("discover_packages_path"):
            raise InputError(f"unknown flag {name}{_nearest(name, known)}")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _lerobot_config(theirs: list[str], options: Options, asked_resume: bool) -> TrainPipelineConfig:
    """Parse and validate with LeRobot's own entry point, which reads `sys.argv` in several places."""

    @lerobot_parser.wrap()
    def parse_and_validate(cfg: TrainPipelineConfig) -> TrainPipelineConfig:
        eval_steps = cfg.eval_steps
        if options.data.eval_episodes is not None:
            if cfg.dataset.eval_split:
                raise InputError(
                    "--data.eval_episodes and --dataset.eval_split exclude each other; give one."
                )
            cfg.eval_steps = 0  # validate() would ask for eval_split
        output_dir = cfg.output_dir
        if not (cfg.resume or asked_resume) and output_dir is not None and Path(output_dir).exists():
            raise InputError(
                f"--output_dir={output_dir} already exists, and nothing in it is overwritten. "
                "Give another folder, or --resume=true to continue the run in it."
            )
        if not cfg.resume:
            cfg.output_dir = None  # validate() would refuse a run that was killed before its first checkpoint
        cfg.validate()
        cfg.output_dir = output_dir or cfg.output_dir
        cfg.eval_steps = eval_steps
        return cfg

    with _sys_argv(theirs):
        cfg = _parse(parse_and_validate)
    for name in ("steps", "batch_size"):
        _at_least(name, getattr(cfg, name), 1)
    for name in ("num_workers", "log_freq", "eval_steps", "max_eval_samples"):
        _at_least(name, getattr(cfg, name), 0)
    if cfg.is_reward_model_training:
        raise InputError(
            "--reward_model: only policies are trained here; lerobot-train trains reward models."
        )
    if cfg.dataset.streaming:
        raise InputError("--dataset.streaming=true: not supported; data sets are read from local files here.")
    if cfg.sample_weighting is not None:
        raise InputError("--sample_weighting: not supported here; lerobot-train has it.")
    if cfg.job.is_remote:
        raise InputError(
            f"--job.target={cfg.job.target}: runs go to Ray here; lerobot-train submits to HF Jobs."
        )
    return cfg


def _parse(parse: Any) -> Any:
    """Call a draccus parser; what it raises becomes one or two readable lines."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            return parse()
    except InputError:
        raise
    except SystemExit as stop:  # argparse, or LeRobot's wrapper around a DecodingError
        reason = stop.__context__
        raise InputError(
            _explain(reason) if reason else printed.getvalue().strip().splitlines()[-1]
        ) from None
    except Exception as error:
        raise InputError(_explain(error)) from None


def _explain(error: BaseException) -> str:
    """The innermost reason of a parsing error, on one line."""
    message = str(error)
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
        if isinstance(error, (ValueError, InputError, FileNotFoundError)) and str(error):
            message = str(error)
            break
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    keep = [line for line in lines if "Could not decode the value into any of the given types" not in line]
    path = "".join(line.split("`")[1] + "." for line in lines if line not in keep and line.startswith("`"))
    text = " ".join(keep or lines).removeprefix("PreTrainedConfig: ")
    return f"--{path}{text[1:].replace('`', '', 1)}" if text.startswith("`") else text


@contextlib.contextmanager
def _sys_argv(args: Sequence[str]) -> Iterator[None]:
    saved, sys.argv = sys.argv, [sys.argv[0], *args]
    try:
        yield
    finally:
        sys.argv = saved
