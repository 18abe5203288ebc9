"""Checkpoints in LeRobot's own layout, written so that a kill at any moment leaves a whole one or none.

    checkpoints/000200/{pretrained_model,training_state}/    by LeRobot's `save_checkpoint`
    checkpoints/last, checkpoints/best                       links, replaced atomically

A checkpoint is written under a hidden name, flushed to the disk, and renamed.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.constants import CONFIG_NAME
from lerobot.common.train_utils import get_step_checkpoint_dir, load_training_state, save_checkpoint
from lerobot.configs.train import TRAIN_CONFIG_NAME, TrainPipelineConfig
from lerobot.utils.constants import (
    CHECKPOINTS_DIR,
    LAST_CHECKPOINT_LINK,
    OPTIMIZER_PARAM_GROUPS,
    OPTIMIZER_STATE,
    PRETRAINED_MODEL_DIR,
    RNG_STATE,
    TRAINING_STATE_DIR,
    TRAINING_STEP,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model

from ray_jobs.config.errors import InputError, RunError, first_line
from ray_jobs.data.position import Position
from ray_jobs.storage import git_lfs
from ray_jobs.storage.hub import offline
from ray_jobs.storage.trust import check_processor, read_json

if TYPE_CHECKING:
    from lerobot.processor import PolicyProcessorPipeline
    from torch.optim.lr_scheduler import LRScheduler

BEST_CHECKPOINT_LINK = "best"
RAW_WEIGHTS = "raw_model.safetensors"  # in training_state: the trained weights behind a saved average


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. Does not trust the `last` link alone: a kill may have
    come between the checkpoint's rename and the link's."""
    steps = checkpoint_steps(output_dir)
    return steps[max(steps)] if steps else None


def pretrained_dir(path: Path, name: str | None = None) -> Path:
    """The `pretrained_model` folder that a run, a search, a checkpoint or such a folder itself stands for.

    Args:
        name: What it was called by the user, if not by its path.

    Raises:
        InputError: There is none.
    """
    for place in ("checkpoints/best", "checkpoints/last", "best/checkpoint", "."):
        for folder in (path / place / PRETRAINED_MODEL_DIR, path / place):
            if (folder / CONFIG_NAME).is_file():
                if notes := git_lfs.pointers(sorted(folder.iterdir())):
                    raise InputError(f"--checkpoint={name or path}: {git_lfs.fault(notes)}")
                return folder.resolve()
    raise InputError(f"--checkpoint={name or path}: there is no checkpoint, a {CONFIG_NAME} is missing.")


def checkpoint_steps(output_dir: Path) -> dict[int, Path]:
    """All whole checkpoints of a run by training step."""
    folder = output_dir / CHECKPOINTS_DIR
    if not folder.is_dir():
        return {}
    return {int(path.name): path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()}


def fault(checkpoint_dir: Path, policy_type: str | None = None) -> str | None:
    """What is wrong with a checkpoint, in one line; None if it can be resumed from.

    Reads headers only: a safetensors file states its own length, so a torn one is noticed at once.
    """
    pretrained, state = checkpoint_dir / PRETRAINED_MODEL_DIR, checkpoint_dir / TRAINING_STATE_DIR
    if notes := git_lfs.pointers(sorted(checkpoint_dir.glob("*/*.*"))):
        return git_lfs.fault(notes).rstrip(".")
    for path in (
        pretrained / "config.json",
        pretrained / TRAIN_CONFIG_NAME,
        state / TRAINING_STEP,
        state / OPTIMIZER_PARAM_GROUPS,
        state / OPTIMIZER_STATE,
        state / RNG_STATE,
    ):
        if not path.is_file():
            return f"{path} is missing: not a whole LeRobot training checkpoint"
        if path.suffix == ".json":
            try:
                content = read_json(path, list if path.name == OPTIMIZER_PARAM_GROUPS else dict)
            except ValueError as error:
                return f"{path} is not JSON as LeRobot writes it ({error}): the checkpoint is damaged"
            if path.name == "config.json" and policy_type not in (None, content.get("type")):
                return f"{checkpoint_dir} holds a policy of type {content.get('type')}, the command asks for {policy_type}"
    for path in pretrained.glob("policy_*processor.json"):
        try:
            check_processor(path)
        except ValueError as error:
            return f"{path} is damaged ({error})"
    weights = list(pretrained.glob("*model.safetensors"))
    if not weights:
        return f"{pretrained} holds no weights (model.safetensors)"
    for path in (*weights, *checkpoint_dir.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                strangers = [key for key in file.keys() if not key.startswith(("state/", "param_groups/"))]
                if path.name == OPTIMIZER_STATE and strangers:  # LeRobot would begin without moments
                    return f"{path} is damaged ({strangers[0]} is no state of an optimizer)"
        except (SafetensorError, OSError) as error:
            return f"{path} is damaged ({error})"
    return None


def save(
    step: int,
    *,
    cfg: TrainPipelineConfig,
    policy: torch.nn.Module,
    weights: dict[str, torch.Tensor] | None,
    averaged: Callable[[], AbstractContextManager] | None,
    optimizer: torch.optim.Optimizer,
    moments: dict,
    scheduler: "LRScheduler | None",
    preprocessor: "PolicyProcessorPipeline",
    postprocessor: "PolicyProcessorPipeline",
    shards: int,
    position: Position,
    samples: int,
) -> Path:
    """Write the checkpoint of `step`; call on the main process only.

    Args:
        cfg: Saved as `train_config.json`.
        policy: The unwrapped policy.
        weights, moments: Its weights, if it holds but a share of them, and the optimizer's state, as
            `parallel.whole_state` gives them.
        averaged: Makes the context in which `policy` holds averaged weights, if an average is kept. The
            average is then saved as the policy, the trained weights beside the optimizer.
        shards: Workers of the full group.
        position, samples: Where the run is in its data, and how many samples an epoch of it has.

    Returns:
        The checkpoint's folder.
    """
    target = get_step_checkpoint_dir(Path(cfg.output_dir), cfg.steps, step)
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with averaged() if averaged else nullcontext(), offline():  # peft would look the base up on the Hub
            save_checkpoint(
                checkpoint_dir=scratch,
                step=step,
                cfg=cfg,
                policy=policy,
                optimizer=optimizer,
                scheduler=scheduler,
                preprocessor=preprocessor,
                postprocessor=postprocessor,
                num_processes=shards,
                batch_size=cfg.batch_size,
                model_state_dict=weights,
                optim_state_dict=moments,
            )
        position.write(scratch, samples)
        if averaged:
            save_model(policy, str(scratch / TRAINING_STATE_DIR / RAW_WEIGHTS))
        for path in scratch.rglob("*"):
            _flush(path)
    except Exception:
        shutil.rmtree(scratch, ignore_errors=True)  # a disk that is full has room again
        raise
    if target.exists():  # the same step again, after a resume from an earlier one, or an error of storage
        _remove(target, now=scratch)
    else:
        scratch.rename(target)
    _flush(target.parent)
    link(target, LAST_CHECKPOINT_LINK)
    return target


def load(
    checkpoint_dir: Path,
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: "LRScheduler | None",
) -> int:
    """Bring optimizer, schedule, RNG and raw weights back to a checkpoint; returns its training step.

    The policy's own weights were loaded by LeRobot's `make_policy`. An optimizer that will be sharded is left to
    `parallel.load_sharded_optimizer`.
    """
    with readable(checkpoint_dir):
        step, _, _ = load_training_state(
            checkpoint_dir, optimizer, scheduler, load_optimizer=optimizer is not None
        )
    raw_weights = checkpoint_dir / TRAINING_STATE_DIR / RAW_WEIGHTS
    if raw_weights.is_file():
        load_model(policy, str(raw_weights))
    return step


@contextmanager
def readable(place: str | Path) -> Iterator[None]:
    """Within, what makes no sense in the files of a checkpoint is told as such, and not tried again.

    Raises:
        RunError: Something makes no sense.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ImportError, SafetensorError) as error:
        raise RunError(f"{place} is damaged: {type(error).__name__}: {first_line(error)[:300]}") from error


def link(checkpoint_dir: Path, name: str) -> None:
    """Point `checkpoints/<name>` at a checkpoint, in one step: there is no moment without the link."""
    scratch = checkpoint_dir.parent / f".{name}.tmp"
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(checkpoint_dir.name)
    scratch.replace(checkpoint_dir.parent / name)


def prune(output_dir: Path, keep: Iterable[int]) -> None:
    """Remove all checkpoints but those of the steps in `keep`; the newest always stays."""
    steps = checkpoint_steps(output_dir)
    for step in set(steps) - set(keep) - {max(steps, default=None)}:
        _remove(steps[step])


def _remove(checkpoint_dir: Path, now: Path | None = None) -> None:
    """Remove a checkpoint, which must not look whole when half of it is gone; `now` takes its place."""
    doomed = checkpoint_dir.with_name(f".{checkpoint_dir.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint_dir.rename(doomed)
    if now is not None:
        now.rename(checkpoint_dir)
    shutil.rmtree(doomed, ignore_errors=True)  # what is left is swept when the run goes on


def sweep(output_dir: Path) -> None:
    """Remove what a killed writer left behind."""
    for leftover in (output_dir / CHECKPOINTS_DIR).glob(".*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
