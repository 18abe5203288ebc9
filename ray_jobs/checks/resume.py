"""Going on from a checkpoint: whether it is whole and not the last, and what becomes of the learning rate."""

import math
from pathlib import Path

import torch
from lerobot.configs.train import TrainPipelineConfig
from lerobot.utils.constants import (
    OPTIMIZER_PARAM_GROUPS,
    PRETRAINED_MODEL_DIR,
    SCHEDULER_STATE,
    TRAINING_STATE_DIR,
    TRAINING_STEP,
)

from ray_jobs.config.errors import InputError, first_line
from ray_jobs.config.recipe import Recipe
from ray_jobs.data.position import SAMPLER, Position
from ray_jobs.storage.records import read_metrics
from ray_jobs.storage.trust import read_json
from ray_jobs.training import checkpoint


def check(recipe: "Recipe") -> list[str]:
    """See that the checkpoint that a resumed run goes on from is whole and not its last; the notice tells what
    becomes of the learning rate.

    Raises:
        InputError: It is not.
    """
    cfg = recipe.lerobot
    if not cfg.resume:
        return []
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
    return [text] if text else []


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
