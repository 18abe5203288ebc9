"""Going on from a checkpoint: what it overrules of the command line, and what becomes of the learning rate.

LeRobot parses all flags again on resume, and writes them down. But optimizer, adapters, processors and random state come
out of the checkpoint, whatever the command line says of them. Such a flag is refused, unless it says what the run was begun with.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig

from ray_jobs.cli.flags import as_arguments
from ray_jobs.cli.parse_errors import parse
from ray_jobs.config.errors import InputError

STARTS = {"policy.path", "policy.pretrained_path"}  # what a run begins from
# Clipping and a schedule's other numbers are read in every step. Texts and relative actions are the saved processors'.
OVERRULED = re.compile(
    r"optimizer\.(?!grad_clip_norm).*|scheduler\.(type|peak_lr)|use_policy_training_preset|seed"
    r"|policy\.(optimizer_|scheduler_|\w*_lr_|use_peft|pretrained_|tokenizer_|pad_language_to|use_relative_actions).*"
    r"|peft\..*|dataset\.use_imagenet_stats"
)
IDLE_AGAIN = ("optimizer.", "scheduler.")  # without effect at the start of most runs: LeRobot says nothing


def without_the_same(theirs: dict[str, str], begun_with: dict[str, str]) -> dict[str, str]:
    """The flags of a resumed run without those that say of its optimizer and the like what it was begun with. What
    became of them stands in the checkpoint; some had no effect, and must not begin to have one."""
    kept = {}
    for name, value in theirs.items():
        of_the_kind = _overruled(name) or name.startswith(IDLE_AGAIN) or name in STARTS
        if not (of_the_kind and begun_with.get(name) == value):
            kept[name] = value
    return kept


def refuse_overruled(folder: Path, typed: dict[str, str], begun_with: dict[str, str]) -> None:
    """Refuse flags that will have no effect, all at once.

    Args:
        folder: The checkpoint's `pretrained_model`.
        typed: LeRobot's flags by name.
        begun_with: The flags that the run was begun with, as far as that is known.

    Raises:
        InputError: There are some.
    """
    before = parse(lambda: TrainPipelineConfig.from_pretrained(folder), typed)
    overruled = {}
    for flag in (
        STARTS & typed.keys() if begun_with else ()
    ):  # of a run that is resumed, a checkpoint has forgotten it
        came_from = begun_with.get(flag)
        if Path(typed[flag]).resolve() not in (Path(came_from or "").resolve(), folder.resolve()):
            overruled[flag] = came_from
    asked = {f: v for f, v in typed.items() if f not in STARTS and (f.startswith("policy.") or _overruled(f))}
    together = _parsed(folder, asked)
    for flag, text in asked.items():
        value = _value(before, flag)
        if together and _value(together, flag) == value:
            continue
        now = _parsed(folder, {flag: text})
        if now and _value(now, flag) == value:
            continue
        if _overruled(flag) or (now and _presets(now.policy) != _presets(before.policy)):
            overruled[flag] = value
    if overruled:
        told = [f"--{flag}={typed[flag]} (the checkpoint has {value})" for flag, value in overruled.items()]
        weights = not any(flag in STARTS or flag.startswith("peft.") for flag in overruled)
        more = f" and --policy.path={shlex.quote(str(folder))}" if weights else ""
        raise InputError(
            f"{', '.join(told)}: without effect on a resumed run, which goes on as its checkpoint says.\n"
            f"Leave {'it' if len(told) == 1 else 'them'} out, or begin another run: without --resume, with another "
            f"--output_dir{more}"
        )


def _overruled(flag: str) -> bool:
    return OVERRULED.fullmatch(flag) is not None


def _parsed(folder: Path, flags: dict[str, str]) -> TrainPipelineConfig | None:
    """The checkpoint's config with flags on top, None if they do not go together."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return TrainPipelineConfig.from_pretrained(folder, cli_args=as_arguments(flags))
    except (Exception, SystemExit):
        return None


def _value(config: TrainPipelineConfig, flag: str) -> Any:
    """What a flag is in a config; None where there is no such thing."""
    inner = draccus.encode(config)
    for name in flag.split("."):
        inner = inner.get(name) if isinstance(inner, dict) else None
    return inner


def _presets(policy: PreTrainedConfig) -> tuple:
    """What a run's optimizer and schedule are made from at its start."""
    return policy.get_optimizer_preset(), policy.get_scheduler_preset()
