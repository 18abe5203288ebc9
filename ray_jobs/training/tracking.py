"""What a run leaves for people to read: metrics.jsonl, summary.json, TensorBoard's events and, if asked for, a W&B run.

Only the main process tracks. `metrics.jsonl` holds one JSON object per log or validation step; after a
resume the lines behind the checkpoint are dropped, so that every step stands in it once. TensorBoard and W&B see the same
values under the same names; W&B in one run with one id however often the training was restarted. `.progress` holds how
far the run had come, and in what time, written in every step, so that after a kill of whatever is counted what it has cost.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import draccus
import torch
from lerobot.common.wandb_utils import cfg_to_group, get_safe_wandb_artifact_name
from lerobot.configs.default import WandBConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.utils.constants import PRETRAINED_MODEL_DIR
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from ray_jobs.config.busy import busy
from ray_jobs.config.errors import InputError
from ray_jobs.config.options import ASKED, OPTIONS_FILE
from ray_jobs.config.recipe import Recipe
from ray_jobs.storage.records import METRICS_FILE, SUMMARY_FILE, json_text, read_metrics, write_json
from ray_jobs.storage.retry import patiently

if TYPE_CHECKING:
    import wandb

PROGRESS_FILE = ".progress"


def read_progress(output_dir: Path) -> tuple[int | None, int, int, float]:
    """The step that a run had reached (None: it was never begun), the steps it had to do again, how often it was taken up
    again, and the seconds that it had taken."""
    try:
        reached, lost, restarts, *seconds = (output_dir / PROGRESS_FILE).read_text().split()
        return int(reached), int(lost), int(restarts), float(seconds[0]) if seconds else 0.0
    except (OSError, ValueError):
        return None, 0, 0, 0.0


def check_wandb(wandb_cfg: WandBConfig) -> None:
    """See that W&B can be reached as asked.

    Raises:
        InputError: The mode is none, or there is no login for it.
    """
    if not wandb_cfg.enable:
        return
    if wandb_cfg.mode not in (None, "online", "offline", "disabled"):
        raise InputError(f"--wandb.mode={wandb_cfg.mode}: must be online, offline or disabled.")
    if wandb_cfg.mode in (None, "online") and not _wandb_login():
        raise InputError(
            "--wandb.enable=true: there is no W&B login here. Run `wandb login`, set WANDB_API_KEY, "
            "or add --wandb.mode=offline."
        )


def _wandb_login() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or wandb.api.api_key)


class Board:
    """TensorBoard's events, each written at once. (tensorboardX's own writer has a thread, which dies of the first error of
    storage, unheard, and a queue, which is lost with a killed process.)

    Args:
        first_step: Of this session; of an earlier one, TensorBoard leaves out what lies behind.
        patient: Writes, and tries again (see `patiently`).
    """

    def __init__(self, folder: Path, first_step: int, patient: Callable[[Callable, str], None]):
        self.patient = patient
        self.writer = EventsWriter(str(folder / "events"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: dict[str, float]) -> None:
        summaries = (scalar(name, value) for name, value in values.items())
        self._write(*(Event(step=step, wall_time=time.time(), summary=each) for each in summaries))

    def close(self) -> None:
        self.writer.close()

    def _write(self, *events: Event) -> None:
        for event in events:
            self.writer.write_event(event)
        self.patient(self.writer.flush, "TensorBoard's file")  # until then it stays in its buffer


class Tracker:
    """Writes a run's metrics.

    Args:
        cfg: LeRobot's training config; `cfg.wandb.run_id` must be set when W&B is enabled.
        used: What W&B's config says beside it, or otherwise.
        start_step: Training step the run goes on from; later lines are dropped.
        started: When this session began, in seconds since 1970.
        tell, stop: Of `patiently`, for when storage fails.
    """

    def __init__(
        self,
        cfg: TrainPipelineConfig,
        used: dict[str, Any],
        start_step: int,
        started: float,
        tell: Callable[[str], None] = lambda text: None,
        stop: Callable[[], object] = lambda: False,
    ):
        self.cfg, self.started = cfg, started
        self.patient = partial(patiently, tell=tell, stop=stop)
        self.output_dir = Path(cfg.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(self.output_dir) if record["step"] <= start_step]
        scratch = self.output_dir / f".{METRICS_FILE}.tmp"
        scratch.write_text("".join(json_text(record) + "\n" for record in kept))
        scratch.replace(self.output_dir / METRICS_FILE)
        self.history = kept
        reached, self.lost_steps, self.restarts, self.earlier_s = read_progress(self.output_dir)
        if reached is not None:
            self.lost_steps += max(0, reached - start_step)
            self.restarts += 1
        self.progress = os.open(self.output_dir / PROGRESS_FILE, os.O_WRONLY | os.O_CREAT, 0o644)
        self.reached(start_step)
        self.file = (self.output_dir / METRICS_FILE).open("a")
        self.board = Board(self.output_dir, start_step + 1, self.patient)
        self.wandb = _init_wandb(cfg, used) if cfg.wandb.enable and cfg.wandb.project else None

    @busy("writing")
    def reached(self, step: int) -> None:
        """Note that a step is done: in place, a microsecond's work."""
        with contextlib.suppress(OSError):  # the next one will
            line = b"%-12d %-12d %-12d %-12.1f\n" % (step, self.lost_steps, self.restarts, self.wall_s)
            os.pwrite(self.progress, line, 0)

    @property
    def wall_s(self) -> float:
        """Seconds that the run has taken in all its sessions."""
        return self.earlier_s + time.time() - self.started

    @busy("writing")
    def log(self, step: int, metrics: dict[str, Any]) -> None:
        record = {"step": step, **metrics}
        self.history.append(record)
        self.file.write(json_text(record) + "\n")
        self.patient(self.file.flush, METRICS_FILE)  # what could not be written stays in its buffer
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        self.board.log(step, numbers)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    @busy("writing")
    def log_cameras(self, images: dict[str, torch.Tensor], step: int) -> None:
        """Show W&B what the cameras of the first batch see, as a sanity check: float (B, C, H, W) in [0, 1]."""
        if self.wandb:
            import wandb

            self.wandb.log(
                {f"cameras/{key}": [wandb.Image(image) for image in batch] for key, batch in images.items()},
                step=step,
            )

    @busy("writing")
    def finish(self, summary: dict[str, Any], checkpoint_dir: Path | None) -> None:
        """Write summary.json, hand the final checkpoint to W&B and close its run."""
        write_json(self.output_dir / SUMMARY_FILE, summary)
        self.file.close()
        self.board.close()
        os.close(self.progress)
        if self.wandb:
            self.wandb.summary.update(
                {k: v for k, v in summary.items() if isinstance(v, int | float | str | dict)}
            )
            if checkpoint_dir is not None and summary["status"] != "failed":
                self._log_artifact(checkpoint_dir)
            self.wandb.finish(exit_code=0 if summary["status"] != "failed" else 1)

    def _log_artifact(self, checkpoint_dir: Path) -> None:
        if self.cfg.wandb.disable_artifact:
            return
        import wandb

        name = get_safe_wandb_artifact_name(f"{cfg_to_group(self.cfg)}-{checkpoint_dir.name}")
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", name)[-128:], type="model")
        artifact.add_dir(str(checkpoint_dir / PRETRAINED_MODEL_DIR))
        assert self.wandb is not None
        self.wandb.log_artifact(artifact)


def _init_wandb(cfg: TrainPipelineConfig, used: dict[str, Any]) -> "wandb.Run":
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb.init(
        id=cfg.wandb.run_id,
        resume="allow",
        project=cfg.wandb.project,
        entity=cfg.wandb.entity,
        name=cfg.job_name,
        notes=cfg.wandb.notes,
        tags=cfg_to_group(cfg, return_list=True, truncate_tags=True) if cfg.wandb.add_tags else None,
        dir=cfg.output_dir,
        config=cfg.to_dict() | used,
        job_type="train_eval",
        mode=cfg.wandb.mode or "online",
        settings=wandb.Settings(console="off"),
    )


def save_options(recipe: Recipe) -> None:
    """Write our options beside the checkpoints, where `--resume` finds them."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    asked = {
        "device": recipe.device,
        "eval_steps": recipe.eval_steps,
        "wandb_run_id": recipe.lerobot.wandb.run_id,
        "id": recipe.id,
        "typed": recipe.typed,
        "threads": torch.get_num_threads(),  # the last digits of what a CPU computes depend on it
    }
    content = {**draccus.encode(recipe.options), ASKED: asked}
    write_json(recipe.output_dir / OPTIONS_FILE, content)
