"""The training loop: plain torch, LeRobot and accelerate. It knows nothing of Ray.

Everything is built (`setup`); then step (`step`), log, validate, save, until somebody asks to stop or the last step is done.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import draccus
from lerobot.common.train_utils import should_save_checkpoint

from ray_jobs.config.busy import busy
from ray_jobs.config.errors import GO_ON, INTERRUPTED, PREEMPTED, PRUNED, first_line
from ray_jobs.config.events import Event, Log, Notice, Saved, Start, Step, Validated
from ray_jobs.config.recipe import Recipe
from ray_jobs.storage.records import read_metrics
from ray_jobs.storage.retry import patiently
from ray_jobs.training import checkpoint, parallel
from ray_jobs.training.metrics import Meter, Scores, check_validation
from ray_jobs.training.setup import Setup, set_up
from ray_jobs.training.step import training_step
from ray_jobs.training.stop_flag import StopFlag
from ray_jobs.training.tracking import Tracker

CHECK_EVERY = 200  # steps between looks for NaN where nothing else asks for the loss


def train(
    recipe: Recipe,
    *,
    device: str,
    report: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], str] = lambda: GO_ON,
    stream: Callable[[int], Iterator[dict]] | None = None,
) -> dict:
    """Train the recipe's policy to its last step, from its last checkpoint if it has one.

    Args:
        device: `cpu`, `cuda`, `cuda:1` ...: what this worker trains on.
        report: Called on every rank with the run's events. All ranks tell of the same validations and checkpoints.
        should_stop: Asked after every step on every rank; once one rank says INTERRUPTED, PREEMPTED or
            PRUNED, all ranks stop at the same step, with a checkpoint unless the run was pruned.
        stream: Under `--data.source=stream`, a function of a seed: this rank's batches of one epoch.

    Returns:
        The run's summary, as written to summary.json.

    Raises:
        RunError: The loss or a validation became NaN or infinite, or a file of the data set cannot be read.
    """
    started = time.time()
    setup = set_up(recipe, device, report, should_stop, stream)
    return _Training(setup, report, should_stop, started).run()


class _Training:
    """A training that goes on."""

    def __init__(
        self,
        setup: Setup,
        report: Callable[[Event], None],
        should_stop: Callable[[], str],
        started: float,
    ):
        self.setup, self.report, self.started = setup, report, started
        self.step = setup.first_step
        """The last one done."""
        recipe, options = setup.recipe, setup.recipe.options
        self.patient = partial(patiently, tell=self.tell, stop=should_stop)
        self.tracker = None
        lost = {}
        if setup.accelerator.is_main_process:
            checkpoint.sweep(recipe.output_dir)
            used = {"eval_steps": recipe.eval_steps, **draccus.encode(options)}
            self.tracker = Tracker(setup.written, used, self.step, started, self.tell, should_stop)
            lost = {"lost_steps": self.tracker.lost_steps, "restarts": self.tracker.restarts}
        self.facts = setup.facts | lost
        self.meter = Meter(setup.shards.weight)
        self.stop_flag = StopFlag(setup.accelerator, should_stop)
        history = [record for record in read_metrics(recipe.output_dir) if record["step"] <= self.step]
        self.scores = Scores(history)
        self.patience = options.ray.early_stopping
        if self.patience and self.scores.evaluations_since_best >= self.patience:
            # The run was stopped early, and is continued on purpose.
            self.patience += self.scores.evaluations_since_best

    def run(self) -> dict:
        """Train to the last step; returns the run's summary."""
        setup, cfg = self.setup, self.setup.cfg
        self.report(Start(self.step, self.facts))
        status = GO_ON
        try:
            while self.step < cfg.steps and not status:
                self.meter.begin_step()
                grad_norm = training_step(setup, self.step, self.meter, self.tracker)
                self.step += 1
                self.meter.end_step(self.step, None if setup.accelerator.scaler else grad_norm)
                if self.tracker:
                    self.tracker.reached(self.step)
                self.report(Step(self.step))
                if self.is_last or self.step % (cfg.log_freq or CHECK_EVERY) == 0:
                    self.log()
                evaluated, improved = self.validate()
                status = GO_ON if self.is_last else self.stop_flag.reason()
                if evaluated and self.patience and self.scores.evaluations_since_best >= self.patience:
                    status = "stopped early"
                regular = status or should_save_checkpoint(self.step, cfg.save_freq, cfg.steps)
                if cfg.save_checkpoint and (regular or improved) and status != PRUNED:
                    self.save(only_best=not regular)
        except Exception as error:
            if self.tracker:
                with contextlib.suppress(OSError):  # a full disk must not hide the error
                    self.tracker.finish(self.summary("failed", error=str(error)), None)
            raise
        finally:
            setup.batches.close()
            if setup.closed_loop is not None:
                setup.closed_loop.close()
        summary = self.summary(status or "finished")
        if self.tracker:
            self.tracker.finish(summary, checkpoint.last_checkpoint(setup.recipe.output_dir))
            if cfg.policy.push_to_hub and status not in (INTERRUPTED, PREEMPTED, PRUNED):
                with setup.averaged():
                    self.tell(push(setup))
        setup.accelerator.wait_for_everyone()
        return summary

    @property
    def is_last(self) -> bool:
        return self.step == self.setup.cfg.steps

    def tell(self, text: str) -> None:
        self.report(Notice(text))

    def log(self) -> None:
        """Tell what happened since the last time; raises RunError, on every rank alike, if a loss is NaN."""
        metrics = self.meter.close(self.setup.accelerator, self.facts["global_batch_size"])
        metrics["train/lr"] = self.setup.optimizer.param_groups[0]["lr"]
        self.scores.add(self.step, metrics)
        if self.tracker and self.setup.cfg.log_freq:
            self.tracker.log(self.step, metrics)
        self.report(Log(self.step, metrics))

    def validate(self) -> tuple[bool, bool]:
        """Validate where that is due. Returns whether held-out episodes were scored, and better than ever before."""
        setup, every = self.setup, self.setup.recipe.eval_steps
        evaluated = setup.validation is not None and (self.is_last or self.step % every == 0)
        acted = setup.closed_loop is not None and (self.is_last or self.step % setup.cfg.env_eval_freq == 0)
        if not (evaluated or acted):
            return False, False
        self.meter.check_finite(setup.accelerator)
        how = setup.model, setup.preprocessor, setup.postprocessor, setup.accelerator
        values: dict[str, Any] = {}
        with setup.averaged():
            if evaluated:
                assert setup.validation is not None
                values |= setup.validation(*how)
            if acted:
                assert setup.closed_loop is not None
                values |= setup.closed_loop(*how)
        if self.tracker:
            self.tracker.log(self.step, values)
        check_validation(self.step, values)
        improved = self.scores.add(self.step, values)
        self.report(Validated(self.step, values))
        return evaluated, improved

    @busy("saving")
    def save(self, *, only_best: bool) -> None:
        """Save a checkpoint and let go of those that nobody asked to keep.

        Args:
            only_best: It is saved for its validation alone.
        """
        setup, step, recipe = self.setup, self.step, self.setup.recipe
        accelerator, optimizer = setup.accelerator, setup.optimizer.optimizer
        self.meter.check_finite(accelerator)
        weights, moments = parallel.whole_state(accelerator, setup.model, optimizer)
        if self.tracker:
            batches = (step - setup.first_step) * recipe.options.ray.grad_accumulation
            write = partial(
                checkpoint.save,
                step,
                cfg=setup.written,
                policy=setup.model,
                weights=weights,
                averaged=None if setup.average is None else setup.averaged,
                optimizer=optimizer,
                moments=moments,
                scheduler=setup.scheduler,
                preprocessor=setup.preprocessor,
                postprocessor=setup.postprocessor,
                shards=setup.shards.count,
                position=setup.begin.after(batches, *setup.each_time),
                samples=setup.each_time[0],
            )
            self.patient(write, f"the checkpoint of step {step}")
            options = recipe.options.checkpoint
            keep = partial(self.scores.keep, recipe.output_dir, step, options, only_best=only_best)
            self.patient(keep, "the folder of checkpoints")
        accelerator.wait_for_everyone()
        self.report(Saved(step))

    def summary(self, status: str, **more: Any) -> dict:
        """What stands in summary.json."""
        recipe, wall_s = self.setup.recipe, time.time() - self.started
        newest = checkpoint.last_checkpoint(recipe.output_dir)
        return {
            "status": status,
            **more,
            **self.facts,
            "step": self.step,
            "wall_s": round(self.tracker.wall_s if self.tracker else wall_s, 1),
            "last": self.scores.last_values,
            "best": self.scores.best,
            "checkpoint": str(newest or ""),
            "output_dir": str(recipe.output_dir),
            "wandb_run_id": self.setup.cfg.wandb.run_id,
        }


@busy("uploading")
def push(setup: Setup) -> str:
    """Upload the trained policy to the Hub, as `lerobot-train` does. Returns what to tell about it: a trained
    policy is none the worse for a network that failed."""
    cfg, policy = setup.cfg, setup.model
    try:
        adapters = {"peft_model": policy} if cfg.policy.use_peft else {}
        policy.push_model_to_hub(cfg, dataset_meta=setup.dataset.meta, **adapters)
        setup.preprocessor.push_to_hub(cfg.policy.repo_id)
        setup.postprocessor.push_to_hub(cfg.policy.repo_id)
    except Exception as error:
        return f"not uploaded to {cfg.policy.repo_id}: {first_line(error)}"
    return f"uploaded to {cfg.policy.repo_id}"
