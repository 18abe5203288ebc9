"""Going on from a checkpoint: what it overrules of the command line, and what becomes of the learning rate.

LeRobot parses all flags again on resume, and writes them down. But optimizer, adapters, processors and random state come
out of the checkpoint, whatever the command line says of them. Such a flag is refused, unless it says what the run was begun with.
"""

import contextlib
import io
import math
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import draccus
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.utils.constants import (
    OPTIMIZER_PARAM_GROUPS,
    PRETRAINED_MODEL_DIR,
    SCHEDULER_STATE,
    TRAINING_STATE_DIR,
    TRAINING_STEP,
)

from ray_jobs.engine import checkpoint
from ray_jobs.engine.errors import InputError
from ray_jobs.engine.explain import first_line, parse
from ray_jobs.engine.flags import as_arguments
from ray_jobs.engine.position import SAMPLER, Position
from ray_jobs.engine.records import read_metrics
from ray_jobs.engine.trust import read_json

if TYPE_CHECKING:
    from ray_jobs.engine.recipe import Recipe

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


def check(recipe: "Recipe") -> None:
    """See that the checkpoint that a resumed run goes on from is whole and not its last; tells what becomes of the
    learning rate.

    Raises:
        InputError: It is not.
    """
    cfg = recipe.lerobot
    if not cfg.resume:
        return
    read_metrics(recipe.output_dir)  # what is damaged is told here, not by the workers
    newest = Path(checkpoint.last_checkpoint(recipe.output_dir) or cfg.checkpoint_path)
    fault = checkpoint.fault(newest, cfg.policy.type)
    if fault:
        raise InputError(f"cannot resume: {fault}.")
    counter = newest / TRAINING_STATE_DIR / TRAINING_STEP
    try:
        content = read_json(counter)
        step = int(content["step"])
        if step < 0 or min(int(content.get(name, 1)) for name in ("batch_size", "num_processes")) < 1:
            raise ValueError
        position = Position(**content.get(SAMPLER, {}))
        if min(int(position.epoch), int(position.start_index)) < 0:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputError(f"cannot resume: {counter} holds no step, the checkpoint is damaged.") from None
    if step >= cfg.steps:
        raise InputError(
            f"nothing to resume: {newest} has reached --steps={cfg.steps}. A larger --steps continues it."
        )
    before = TrainPipelineConfig.from_pretrained(newest / PRETRAINED_MODEL_DIR)
    try:
        text = _learning_rate(cfg, before, newest / TRAINING_STATE_DIR)
    except (OSError, LookupError, TypeError, ValueError) as error:
        schedule = newest / TRAINING_STATE_DIR / SCHEDULER_STATE
        raise InputError(f"cannot resume: {schedule} is missing or damaged ({first_line(error)}).") from None
    recipe.notices += [text] if text else []


def _learning_rate(cfg: TrainPipelineConfig, before: TrainPipelineConfig, state: Path) -> str | None:
    """What becomes of the learning rate where its schedule is another from here on, or over. Most of LeRobot's schedules are
    made for a number of steps: a run that was to end, and is made longer, is in the middle of another one."""
    if cfg.scheduler is None:
        return None
    saved = read_json(state / SCHEDULER_STATE)
    peak, step = saved["base_lrs"][0], saved["last_epoch"]
    if cfg.scheduler == before.scheduler and cfg.steps == before.steps:
        return None
    left_off = read_json(state / OPTIMIZER_PARAM_GROUPS, list)[0]["lr"]
    alone = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = cfg.scheduler.build(alone, cfg.steps).lr_lambdas[0]
    soon, end = peak * schedule(step + 1), peak * schedule(cfg.steps)
    told = f"learning rate: {left_off:.3g} where the checkpoint left off, "
    if not math.isclose(left_off, peak * schedule(step), rel_tol=1e-3):
        why = f"for {cfg.steps} steps instead of {before.steps}" if cfg.steps != before.steps else "another"
        return (
            f"{told}{soon:.3g} after the next step, {end:.3g} at the end: its schedule is {why} from here on."
        )
    if left_off < peak and math.isclose(left_off, end, rel_tol=1e-3):
        return f"{told}and no more than that to the end: its schedule is over."
    return None
