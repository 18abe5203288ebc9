"""From the command line to a recipe: LeRobot's own training config plus our few groups of options.

Flags of LeRobot's `TrainPipelineConfig` are parsed by LeRobot's draccus classes, never by a copy of them.
Ours have their own prefixes (`--ray.*`, `--data.*`, `--checkpoint.*`) and are parsed by draccus as well.
The recipe is resolved once, in the driver: `TrainPipelineConfig.validate` re-reads `sys.argv`, which a
worker does not share.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import re
import sys
import threading
from argparse import Action
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import draccus
import lerobot.policies  # noqa: F401  (registers every --policy.type)
from draccus.argparsing import ArgumentParser
from draccus.utils import DecodingError, DraccusException, ParsingError
from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from lerobot.configs import parser as lerobot_parser
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TRAIN_CONFIG_NAME, TrainPipelineConfig
from lerobot.utils.constants import CHECKPOINTS_DIR, LAST_CHECKPOINT_LINK, PRETRAINED_MODEL_DIR

import ray_jobs.part_sorting  # noqa: F401  (registers --env.type=part_sorting)
from ray_jobs.engine.checkpoint import checkpoint_steps, last_checkpoint
from ray_jobs.engine.checkpoint import fault as checkpoint_fault
from ray_jobs.engine.errors import InputError

OPTIONS_FILE = "options.json"  # our groups of options, beside LeRobot's checkpoints in the output folder
HUB_WAIT_S = 5  # how long the Hub may take to answer at all


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
        scratch = self.output_dir / f".{OPTIONS_FILE}.tmp"  # a kill must not leave half of it
        scratch.write_text(json.dumps(draccus.encode(self.options), indent=2) + "\n")
        scratch.replace(self.output_dir / OPTIONS_FILE)


# Flags of published recipes that today's LeRobot spells differently.
RENAMED = {"eval_freq": "env_eval_freq"}


def resolve(argv: Sequence[str]) -> Recipe:
    """Turn command-line arguments into a recipe.

    Args:
        argv: What follows `python -m ray_jobs.train`, as `--name=value` or `--name value`.

    Raises:
        InputError: A flag, a value or their combination is wrong; the message says what would be right.
    """
    flags, notices = _read_flags(argv)
    _check_flags(flags)
    prefixes = tuple(f"{group.name}." for group in dataclasses.fields(Options))
    ours = [f"--{name}={value}" for name, value in flags.items() if name.startswith(prefixes)]
    theirs = [f"--{name}={value}" for name, value in flags.items() if not name.startswith(prefixes)]
    asked_resume = flags.get("resume", "false").lower() in ("true", "yes", "1")
    saved_options = None
    if asked_resume:
        theirs, saved_options = _resume_arguments(theirs)
    _check_sources(theirs)

    options = _parse(lambda: draccus.parse(Options, config_path=saved_options, args=ours), flags)
    cfg = _lerobot_config(theirs, flags, options, asked_resume)

    device = None if flags.get("policy.device") == "null" else flags.get("policy.device")
    if device is not None and device != cfg.trainable_config.device:
        notices.append(f"No {device} device on this machine: the worker's own device decides.")
    idle = next((name for name in flags if name.startswith(("optimizer.", "scheduler."))), None)
    if idle and cfg.use_policy_training_preset and not cfg.resume:
        notices.append(
            f"--{idle} has no effect: the policy brings its own (--policy.optimizer_lr and its like), "
            "unless --use_policy_training_preset=false."
        )
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


# ---------------------------------------------------------------------- reading the command line


def _read_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Flags by name, those of older recipes renamed, and notices. The last of a repeated flag counts, as it
    does for argparse (LeRobot's own look-ups would take the first)."""
    flags, notices = {}, []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise InputError(
                f"'{word}' is not a flag. They look like --steps=1000; a value with spaces needs quotes."
            )
        name, equals, value = word[2:].partition("=")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        try:
            draccus.cfgparsing.parse_string(value)
        except Exception:
            raise InputError(
                f"--{name}={value}: cannot be read. Every bracket and quote must be closed, as in '[1,2]'."
            ) from None
        if name in RENAMED:
            notices.append(f"--{name} is called --{RENAMED[name]} today: understood as that.")
            name = RENAMED[name]
        flags.pop(name, None)
        flags[name] = value
    return flags, notices


def _resume_arguments(theirs: list[str]) -> tuple[list[str], Path | None]:
    """Complete a `--resume=true` command with the checkpoint it means.

    LeRobot wants `--config_path`; the same command as at the start will do here, since its `--output_dir`
    leads to the newest checkpoint. A run that was killed before its first checkpoint starts over. Returns
    the arguments and, if there is one, the file of our saved options.
    """
    config_path = lerobot_parser.parse_arg("config_path", theirs)
    policy_type = lerobot_parser.get_type_arg("policy", theirs)
    # The checkpoint already holds what --policy.path gave; LeRobot would take it before the checkpoint.
    without_path = lerobot_parser.filter_arg("policy.path", theirs)
    if config_path is not None:
        file = Path(config_path).absolute()
        pretrained_dir = file if file.is_dir() else file.parent
        run_dir = pretrained_dir.parent.parent.parent  # <run>/checkpoints/<step>/pretrained_model
        newest = last_checkpoint(run_dir)
        output_dir = lerobot_parser.parse_arg("output_dir", theirs)
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
                theirs = [*theirs, f"--output_dir={run_dir}"]
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
            _check_checkpoint(newest, policy_type)
            theirs = [*without_path, f"--config_path={config_path}"]
        elif (run_dir / OPTIONS_FILE).is_file():
            theirs = lerobot_parser.filter_arg("resume", theirs)
        else:
            raise InputError(f"--resume=true: nothing to resume, there is no run in {output_dir}.")
    saved_options = run_dir / OPTIONS_FILE
    if not saved_options.is_file():
        return theirs, None
    try:
        json.loads(saved_options.read_text())
    except ValueError:
        raise InputError(
            f"cannot resume: {saved_options} is damaged. Remove it, and give the run's --ray, --data and "
            "--checkpoint flags again."
        ) from None
    return theirs, saved_options


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


def _check_flags(flags: dict[str, str]) -> None:
    """Refuse unknown flags and choices, naming the nearest right one: argparse would print 655 flags."""
    plugins = lerobot_parser.parse_plugin_args(
        lerobot_parser.PLUGIN_DISCOVERY_SUFFIX, [f"--{name}={value}" for name, value in flags.items()]
    )
    known = _known_flags(tuple(plugins.items()))
    for name, value in flags.items():
        choices = name in known and known[name].choices
        if choices and value not in choices:
            guess = _nearest(value, choices)
            meant = f"; did you mean {guess}?" if guess else "."
            raise InputError(
                f"--{name}={value}: there is none of that name{meant}\nIt can be {', '.join(sorted(choices))}."
            )
    policy_type = flags.get("policy.type")
    if policy_type:
        of_type = dataclasses.fields(PreTrainedConfig.get_choice_class(policy_type))
        known = [name for name in known if not name.startswith("policy.")]
        known += ["policy.type", "policy.path", *(f"policy.{f.name}" for f in of_type if f.init)]
    for name in flags:
        if name not in known and name not in plugins:
            whose = f" for {policy_type}" if policy_type and name.startswith("policy.") else ""
            guess = _nearest(name, known)
            see = (
                f"did you mean --{guess}?"
                if guess
                else f"--policy.type={policy_type or 'act'} --help lists them."
            )
            raise InputError(f"unknown flag --{name}{whose}; {see}")
        if not flags[name]:
            raise InputError(
                f"--{name}: its value is missing, as in --{name}=VALUE; a switch takes true or false."
            )
    device = flags.get("policy.device", "null")
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps|xpu|null", device):
        raise InputError(f"--policy.device={device}: must be cpu, cuda, mps or xpu (or cuda:1 and so on).")


@functools.cache
def _known_flags(plugins: tuple[tuple[str, str], ...]) -> dict[str, Action]:
    """Every flag by name, of all policies, and of the packages that `--*.discover_packages_path` names."""
    for name, package in plugins:
        try:
            lerobot_parser.load_plugin(package)
        except lerobot_parser.PluginLoadError as error:
            raise InputError(f"--{name}={package}: {first_line(error)}") from None
    actions = {}
    for config in (Options, TrainPipelineConfig):
        actions |= ArgumentParser(config).parser._option_string_actions
    known = {option[2:]: action for option, action in actions.items() if option.startswith("--")}
    return known | {name: Action([], name) for name in ("policy.path", "reward_model.path")}


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one was probably meant to be, if there is one."""
    group, _, leaf = name.rpartition(".")
    # What the optimizer groups say is overruled by the policy's preset: never the flag to recommend.
    known = [k for k in known if not k.startswith(("optimizer.", "scheduler."))]
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group}
    for close in difflib.get_close_matches(leaf, siblings, n=1):
        return siblings[close]
    # The right name in the wrong group; without a group also its last part.
    before = r"(^|\.)" if group else r"(^|[._])"
    elsewhere = [k for k in known if re.search(f"{before}{re.escape(leaf)}$", k)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return min(elsewhere, key=len) if elsewhere else next(iter(close), None)


# Flags that name a file or a folder here, or else one on the Hub, and the file looked for in the folder.
SOURCES = {
    "config_path": TRAIN_CONFIG_NAME,
    "policy.path": "config.json",
    "policy.pretrained_path": "config.json",
}


def _check_sources(args: list[str]) -> None:
    """Refuse config files and checkpoints that are not there, and a command without data or policy."""
    for flag, file_name in SOURCES.items():
        value = lerobot_parser.parse_arg(flag, args)
        if value is not None:
            _check_source(flag, value, file_name)
    names = {arg[2:].partition("=")[0] for arg in args}
    if "config_path" in names:
        return  # the file may hold what follows
    if "dataset.repo_id" not in names:
        raise InputError(
            "--dataset.repo_id is missing: the data set's name, as in --dataset.repo_id=user/name "
            "(with --dataset.root=FOLDER any name will do)."
        )
    if not names & {"policy.type", "policy.path", "reward_model.type", "reward_model.path"}:
        raise InputError(
            "--policy.type is missing: --policy.type=act (or diffusion, smolvla, pi05 ...) trains a new policy, "
            "--policy.path=FOLDER goes on from a trained one."
        )
    for group in ("env", "optimizer", "scheduler"):
        flag = next((name for name in names if name.startswith(f"{group}.")), None)
        if flag and f"{group}.type" not in names:
            raise InputError(f"--{group}.type is missing: --{flag} alone does not say of which {group}.")


def _check_source(flag: str, value: str, file_name: str) -> None:
    path = Path(value)
    if not path.exists():
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", value) and not value.endswith((".json", ".yaml", ".yml")):
            return  # may be a name on the Hub
        raise InputError(f"--{flag}={value}: there is no such file or folder.")
    file = path if flag == "config_path" and path.is_file() else path / file_name
    if not file.is_file():
        places = [
            Path(PRETRAINED_MODEL_DIR),
            Path(CHECKPOINTS_DIR, LAST_CHECKPOINT_LINK, PRETRAINED_MODEL_DIR),
        ]
        inside = [path / place for place in places if (path / place / file_name).is_file()]
        hint = f" Did you mean {inside[0]}?" if inside else ""
        raise InputError(f"--{flag}={value}: there is no {file_name} in it.{hint}")
    if file.suffix == ".json":
        try:
            json.loads(file.read_text())
        except ValueError as error:
            raise InputError(f"--{flag}={value}: {file.name} is damaged ({error}).") from None


# ---------------------------------------------------------------------- parsing with LeRobot's classes


def _lerobot_config(
    theirs: list[str], flags: dict[str, str], options: Options, asked_resume: bool
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
            _check_output_dir(Path(output_dir))
        if not cfg.resume:
            cfg.output_dir = None  # validate() would refuse a run that was killed before its first checkpoint
        cfg.validate()
        cfg.output_dir = output_dir or cfg.output_dir
        cfg.eval_steps = eval_steps
        return cfg

    values = ((flag, lerobot_parser.parse_arg(flag, theirs)) for flag in ("config_path", "policy.path"))
    from_hub = next(
        (f"--{flag}={value}" for flag, value in values if value and not Path(value).exists()), None
    )
    with _sys_argv(theirs), hub_or_cache() if from_hub else contextlib.nullcontext():
        cfg = _parse(parse_and_validate, flags, from_hub)
    for name in ("steps", "batch_size", "prefetch_factor"):
        _at_least(name, getattr(cfg, name), 1)
    for name in ("num_workers", "log_freq", "eval_steps", "max_eval_samples", "tolerance_s", "seed"):
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


def _check_output_dir(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"--output_dir={folder}: is a file, not a folder.")
    if folder.exists():
        holds_run = (folder / OPTIONS_FILE).exists() or last_checkpoint(folder) is not None
        resume = ", or --resume=true to continue the run in it" if holds_run else ""
        raise InputError(
            f"--output_dir={folder} already exists, and nothing in it is overwritten. Give another folder{resume}."
        )


def _parse[T](parse: Callable[[], T], flags: dict[str, str], from_hub: str | None = None) -> T:
    """Call a draccus parser; what it raises becomes one or two readable lines.

    Args:
        flags: What the user typed, to be named in the message.
        from_hub: The flag whose value is looked for on the Hub, if there is one.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            return parse()
    except InputError:
        raise
    except SystemExit as stop:  # argparse, or LeRobot's wrapper around a DecodingError
        if stop.__context__ is None:
            message = printed.getvalue().strip().splitlines()[-1].partition("error: ")[2]
            # The overrides of a --policy.path are parsed without their prefix.
            unknown = "the policy of --policy.path knows no --policy."
            raise InputError(message.replace("unrecognized arguments: --", unknown)) from None
        raise InputError(_explain(stop.__context__, flags)) from None
    except Exception as error:
        if from_hub and any(isinstance(link, HUB_ERRORS) for link in _chain(error)):
            raise InputError(f"{from_hub}: there is no such folder here, and {hub_answer(error)}") from None
        raise InputError(_explain(error, flags)) from None


# What a value must be, by what draccus says about one that it cannot decode (its own text taken out).
EXPECTED = {
    r"Expected \d+ items": "a list with as many entries as its default has",
    r"\bdict\b|attribute": """a mapping, as in '{"a": "b"}'""",
    r"\blist\b|\btuple\b": "a list, as in '[1,2]'",
    r"\bint\b": "a whole number",
    r"\bfloat\b": "a number",
    r"\bbool\b": "true or false",
}

# LeRobot's messages that leave one guessing, and what is said instead.
CLEARER = {
    r"'repo_id' argument missing.*": "policies are pushed to the Hub unless told otherwise: "
    "add --policy.push_to_hub=false, or --policy.repo_id=user/name.",
    r".*Got (\d+) for `n_action_steps` and (\d+) for `chunk_size`.*": r"--policy.n_action_steps=\1 must not exceed "
    r"--policy.chunk_size=\2: only what is predicted can be executed.",
    r".*Got self.horizon=(\d+) and self.down_dims=(.*)": r"--policy.horizon=\1 must be a multiple of "
    r"2 ** (number of --policy.down_dims), and these are \2.",
    r"`rename_map` requires.*": "--rename_map needs --policy.path: a new policy takes its names from the data set.",
    r"Optimizer and Scheduler must be set.*": "--use_policy_training_preset=false needs --optimizer.type and "
    "--scheduler.type.",
    r"eval_split must be in .* got (.*)": r"--dataset.eval_split=\1 must be at least 0 and less than 1.",
    r"Episode indices (.*)": r"--dataset.episodes \1.",
}


def _explain(error: BaseException, flags: dict[str, str]) -> str:
    """What a parser means, on one line and in terms of the flags that were typed."""
    chain = _chain(error)
    ours = next((link for link in chain if isinstance(link, InputError)), None)
    if ours:
        return str(ours)
    decoding = [link for link in chain if isinstance(link, DecodingError) and link.key_path]
    for link in decoding:
        path = ".".join(link.key_path)
        for name, value in flags.items():
            found = re.fullmatch(rf"(policy\.)?{re.escape(name.removeprefix('policy.'))}(\.\d+)?", path)
            if found:
                text = "list" if found[2] else link.message.replace(f"'{value}'", "")
                what = next((what for pattern, what in EXPECTED.items() if re.search(pattern, text)), None)
                return f"--{name}={value}: " + (f"must be {what}." if what else " ".join(text.split()))
    # A value of a config file is named here; a class that refuses its values has its reason behind it.
    named = decoding and not decoding[-1].message.startswith("Could not decode")
    if named and not any(type(link) is ParsingError for link in chain):
        message = f"--{'.'.join(decoding[-1].key_path)}: {decoding[-1].message}"
    else:
        message = str(next((e for e in chain if not isinstance(e, DraccusException | SystemExit)), error))
    message = " ".join(message.split())
    for pattern, clearer in CLEARER.items():
        message = re.sub(f"^{pattern}$", clearer, message)
    typed = {name.rpartition(".")[2]: f"--{name}" for name in flags}
    message = re.sub(r"(?<![.\w-])\w+_\w+", lambda word: typed.get(word[0], word[0]), message).replace(
        "`", ""
    )
    return message if "--" in message or not decoding else f"--{'.'.join(decoding[-1].key_path)}: {message}"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what caused it, outermost first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


# ---------------------------------------------------------------------- the Hub, which may be out of reach

HUB_ERRORS = (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled)


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within, the Hub's cache answers where there is no network. huggingface_hub itself tries again for half
    a minute, and for several where packets are dropped."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answer(error: BaseException) -> str:
    """The end of a sentence: why something cannot be had from the Hub."""
    if any(isinstance(link, OfflineModeIsEnabled | LocalEntryNotFoundError) for link in _chain(error)):
        return f"{constants.ENDPOINT} cannot be reached (or HF_HUB_OFFLINE is set)."
    return f"{constants.ENDPOINT} answers: {first_line(error)}"


def _hub_answers() -> bool:
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            get_session().head(constants.ENDPOINT, timeout=HUB_WAIT_S)
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a look-up of its name knows no time-out
    asking.start()
    asking.join(HUB_WAIT_S)
    return answered.is_set()


def first_line(error: BaseException) -> str:
    """An error's message, as far as it belongs on a terminal."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _sys_argv(args: Sequence[str]) -> Iterator[None]:
    saved, sys.argv = sys.argv, [sys.argv[0], *args]
    try:
        yield
    finally:
        sys.argv = saved
