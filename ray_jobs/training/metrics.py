"""The numbers of a run: what happened since the last log step, and which validation was the best. What a validation measures
is in `validation`."""

import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ray_jobs.config.errors import RunError
from ray_jobs.config.options import CheckpointOptions
from ray_jobs.storage.records import METRIC
from ray_jobs.training import checkpoint

HELPS = (
    "A lower learning rate or gradient clipping usually helps, unless the data set has NaN (ray_jobs.doctor tells); what "
    "has been saved is intact."
)


class Meter:
    """What happened since the last log step. Losses stay on the device until somebody asks."""

    def __init__(self, weight: float = 1.0) -> None:
        """weight: Of this worker's losses, see `position.Shards`."""
        self.weight = weight
        self.steps: list[int] = []
        self._clear()

    def _clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.outputs: list[dict[str, float]] = []
        self.loss_steps: list[int] = []
        self.step_s = self.data_s = 0.0
        self.count = 0

    def begin_step(self) -> None:
        self._begin = self._lap = time.perf_counter()
        self._data = 0.0
        self._batch_losses: list[torch.Tensor] = []

    def data_ready(self) -> None:
        self._data += time.perf_counter() - self._lap

    def add_loss(self, loss: torch.Tensor, outputs: dict | None) -> None:
        self._batch_losses.append(loss.detach())
        self.outputs.append({k: v for k, v in (outputs or {}).items() if isinstance(v, int | float)})
        self._lap = time.perf_counter()

    def end_step(self, step: int, grad_norm: torch.Tensor | None) -> None:
        self.losses.append(torch.stack(self._batch_losses).mean() * self.weight)
        self.norms.append(self.losses[-1] if grad_norm is None else torch.as_tensor(grad_norm))
        self.loss_steps.append(step)
        self.step_s += time.perf_counter() - self._begin
        self.data_s += self._data
        self.count += 1

    def check_finite(self, accelerator: Accelerator) -> None:
        """Raise, on every rank alike, if a loss or gradient norm since then is NaN or infinite."""
        if not self.losses:
            return
        values = torch.stack(
            [torch.stack(self.losses), torch.stack(self.norms).to(self.losses[0])]
        )  # (2, steps)
        bad = (~values.isfinite()).any(0).to(torch.int32)
        bad = accelerator.reduce(bad).nonzero()[:, 0].tolist()
        if bad:
            first = self.loss_steps[bad[0]]
            loss, norm = values[:, bad[0]].tolist()
            raise RunError(
                f"step {first}: the loss is {loss:.4g} and the gradient norm {norm:.4g}; training cannot go on. "
                + HELPS
            )

    def close(self, accelerator: Accelerator, global_batch_size: int) -> dict[str, float]:
        """Averages over steps and ranks (times: the slowest rank), ready to be logged."""
        self.check_finite(accelerator)
        keys = sorted(set().union(*self.outputs)) if self.outputs else []
        means = [torch.stack(self.losses).mean().item(), torch.stack(self.norms).float().mean().item()]
        for key in keys:
            values = [output[key] for output in self.outputs if key in output]
            means.append(sum(values) / len(values))
        times = [self.step_s / self.count, self.data_s / self.count]
        if accelerator.num_processes > 1:
            device = accelerator.device
            means = accelerator.reduce(torch.tensor(means, device=device), reduction="mean").tolist()
            times = accelerator.gather(torch.tensor([times], device=device)).amax(0).tolist()
        metrics = {"train/loss": means[0], "train/grad_norm": means[1]}
        metrics |= {f"train/{key}": value for key, value in zip(keys, means[2:], strict=True)}
        metrics |= {"train/step_s": times[0], "train/data_s": times[1]}
        metrics["train/samples_per_s"] = global_batch_size / times[0]
        self._clear()
        return metrics


def check_validation(step: int, values: dict) -> None:
    """Raise if a validation gives no number: no other could be compared with it."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(
                f"step {step}: {name} is {value}, what the policy predicts are no finite numbers; training cannot go on. "
                + HELPS
            )


class Scores:
    """The newest value of every metric, the best validation, and which checkpoints that makes worth keeping."""

    def __init__(self, history: list[dict]):
        self.last_values: dict = {}
        self.values: dict[int, float] = {}  # step -> METRIC
        self.only_best: set[int] = set()  # checkpoints saved for nothing but their validation
        for record in history:
            self.add(record["step"], {key: value for key, value in record.items() if key != "step"})

    def add(self, step: int, metrics: dict) -> bool:
        """Note the metrics of a step; True if it is the best validation so far."""
        self.last_values |= metrics
        if metrics.get(METRIC) is None:
            return False
        improved = not self.values or metrics[METRIC] < min(self.values.values())
        self.values[step] = metrics[METRIC]
        return improved

    @property
    def best(self) -> dict | None:
        if not self.values:
            return None
        step = min(self.values, key=self.values.__getitem__)
        return {"step": step, METRIC: self.values[step]}

    @property
    def evaluations_since_best(self) -> int:
        best = self.best
        return sum(step > best["step"] for step in self.values) if best else 0

    def keep(self, output_dir: Path, step: int, options: CheckpointOptions, *, only_best: bool) -> None:
        """After the checkpoint of `step`: set the `best` link, remove the checkpoints nobody asked to keep.

        Args:
            only_best: The checkpoint was saved for its validation alone, and goes once others are better.
        """
        if only_best:
            self.only_best.add(step)
        saved = checkpoint.checkpoint_steps(output_dir)
        scored = sorted((s for s in saved if s in self.values), key=self.values.__getitem__)
        best = scored[: options.keep_best]
        if best:
            checkpoint.link(saved[best[0]], checkpoint.BEST_CHECKPOINT_LINK)
        newest = sorted(s for s in saved if s not in self.only_best or s == step)
        if options.keep_last is not None:
            newest = newest[-options.keep_last :]
        checkpoint.prune(output_dir, {*best, *newest})
