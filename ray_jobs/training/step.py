"""One training step: batches to gradients to new weights."""

import contextlib
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from lerobot.configs.train import TrainPipelineConfig
from lerobot.utils.utils import has_method
from torch.distributed.tensor import DTensor

from ray_jobs.config.errors import RunError, first_line
from ray_jobs.data.dataset import (
    to_device,
)
from ray_jobs.training.metrics import Meter
from ray_jobs.training.setup import Setup
from ray_jobs.training.tracking import Tracker


def training_step(setup: Setup, step: int, meter: Meter, tracker: Tracker | None) -> torch.Tensor:
    """Take one step: all that changes is in `setup`.

    Args:
        step: The last one done.
        tracker: On the main rank; is shown the cameras of the run's first batch.

    Returns:
        The gradients' norm before they were clipped, on the device.
    """
    cfg, accelerator, policy = setup.cfg, setup.accelerator, setup.policy
    cameras, accumulated = setup.dataset.meta.camera_keys, setup.recipe.options.ray.grad_accumulation
    for number in range(len(setup.shards.mine) * accumulated):
        with accelerator.accumulate(policy):
            batch = to_device(next(setup.batches), cameras, accelerator.device)
            if tracker and step == number == 0 and cfg.wandb.enable:
                tracker.log_cameras({k: batch[k][:4].flatten(0, -4) for k in cameras}, 0)
            with _first(cfg, batch, accelerator) if step == setup.first_step else contextlib.nullcontext():
                batch = setup.preprocessor(batch)
                meter.data_ready()
                with accelerator.autocast():
                    loss, outputs = policy(batch)
            weight = setup.shards.weight
            accelerator.backward(loss * weight if weight != 1 else loss)
            meter.add_loss(loss, outputs)
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(policy, cfg.optimizer.grad_clip_norm, accelerator)
            setup.optimizer.step()
            setup.optimizer.zero_grad()
    if setup.scheduler is not None:
        setup.scheduler.step()
    if has_method(setup.model, "update"):
        setup.model.update()
    if setup.average is not None:
        setup.average.step(setup.model.parameters())
    return grad_norm


@contextlib.contextmanager
def _first(cfg: TrainPipelineConfig, batch: dict, accelerator: Accelerator) -> Iterator[None]:
    """Within, what fails on the first batch fails for what the data are, and would on every other."""
    held = ", ".join(
        f"{key} {tuple(v.shape)}"
        for key, v in batch.items()
        if key in cfg.policy.input_features | cfg.policy.output_features and torch.is_tensor(v)
    )
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        of_the_machine = torch.OutOfMemoryError, torch.AcceleratorError, NotImplementedError
        if isinstance(error, of_the_machine) or (
            isinstance(error, RuntimeError) and accelerator.num_processes > 1
        ):
            raise  # perhaps another rank's end
        reason = (
            first_line(error)
            if isinstance(error, RuntimeError)
            else f"{type(error).__name__}: {first_line(error)}"
        )
        raise RunError(
            f"{cfg.policy.type} cannot compute a loss from {cfg.dataset.repo_id}: {reason}\nIts batches hold {held}."
        ) from error


def clip_gradients(policy: torch.nn.Module, max_norm: float, accelerator: Accelerator) -> torch.Tensor:
    """Clip to `max_norm` (0 measures only); returns the norm before, still on the device."""
    norm = accelerator.clip_grad_norm_(policy.parameters(), max_norm if max_norm > 0 else math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
