"""The training loop: plain torch, LeRobot and accelerate. It knows nothing of Ray.

It reads top to bottom: build everything as `lerobot-train` does and in the same order (so that the random
numbers are the same), go on from the last checkpoint if there is one, then step, log, validate, save.
"""

import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import draccus
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from lerobot.common.train_utils import should_save_checkpoint
from lerobot.configs.train import TrainPipelineConfig
from lerobot.optim.factory import make_optimizer_and_scheduler
from lerobot.utils.constants import PRETRAINED_MODEL_DIR, TRAINING_STATE_DIR, TRAINING_STEP
from lerobot.utils.random_utils import set_seed
from lerobot.utils.utils import has_method
from torch.distributed.tensor import DTensor

from ray_jobs.config.busy import busy
from ray_jobs.config.errors import GO_ON, INTERRUPTED, PREEMPTED, PRUNED, RunError, first_line
from ray_jobs.config.events import Doing, Event, Log, Notice, Saved, Start, Step, Validated
from ray_jobs.config.recipe import Recipe
from ray_jobs.data import quantiles
from ray_jobs.data.dataset import (
    make_datasets,
    open_all_frames,
    reads_in_a_thread,
    samples_of,
    to_device,
    training_batches,
)
from ray_jobs.data.frame_cache import FrameCache
from ray_jobs.data.frames import add_resize_step
from ray_jobs.data.position import START, Position
from ray_jobs.data.stream import make_streamed_datasets, streamed_batches
from ray_jobs.policies import assets, kernels
from ray_jobs.policies.build import OF_TEXTS, build, make_processors
from ray_jobs.storage import bucket
from ray_jobs.storage.records import read_metrics
from ray_jobs.storage.retry import patiently, storage_may_return
from ray_jobs.training import checkpoint, parallel
from ray_jobs.training.memory import MAIN, main_memory
from ray_jobs.training.metrics import Scores, Window, check_validation
from ray_jobs.training.simulator import ClosedLoop
from ray_jobs.training.stop_flag import StopFlag
from ray_jobs.training.tracking import Tracker
from ray_jobs.training.validation import Validation

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
    options = recipe.options
    cfg = copy.deepcopy(recipe.lerobot)  # `recipe.lerobot` stays what train_config.json will say
    # The type alone: an index in a checkpoint's config is not understood everywhere.
    cfg.policy.device = recipe.lerobot.policy.device = torch.device(device).type
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    accelerator = parallel.make_accelerator(cfg, options.ray)
    shards = parallel.divide(accelerator, options.ray)
    main = accelerator.is_main_process

    def tell(text: str) -> None:
        report(Notice(text))

    patient = partial(patiently, tell=tell, stop=should_stop)

    # ------------------------------------------------------------------ where to go on from
    resume_dir = checkpoint.last_checkpoint(recipe.output_dir)
    if recipe.lerobot.resume and resume_dir is None:
        resume_dir = Path(recipe.lerobot.checkpoint_path)  # --config_path: a checkpoint of another run
    resume_dir = broadcast_object_list([resume_dir])[0]  # rank 0 holds the run's lock: what it saw is true
    resumed = None
    if resume_dir is not None:
        cfg.resume, cfg.checkpoint_path = True, resume_dir
        cfg.policy.pretrained_path = resume_dir / PRETRAINED_MODEL_DIR
        cfg.policy.use_peft = cfg.policy.use_peft or cfg.peft is not None
        resumed = json.loads((resume_dir / TRAINING_STATE_DIR / TRAINING_STEP).read_text())

    # ------------------------------------------------------------------ data, policy, optimizer
    report(Doing("opening the data set"))
    if cfg.seed is not None:
        set_seed(cfg.seed, accelerator=accelerator)
    torch.backends.cudnn.deterministic = cfg.cudnn_deterministic
    torch.backends.cudnn.benchmark = not cfg.cudnn_deterministic
    torch.backends.cuda.matmul.allow_tf32 = True

    if stream is None and bucket.is_uri(cfg.dataset.root):
        tell(f"fetching {cfg.dataset.root}, once per node")
        fetch = partial(bucket.fetch_whole, cfg.dataset.root)
        folder = patient(fetch, cfg.dataset.root, doing="read", passing=storage_may_return)
        cfg.dataset.root = str(folder)
    make = make_datasets if stream is None else make_streamed_datasets
    dataset, eval_dataset = make(cfg, options.data.eval_episodes, options.data.resize)
    frames, eval_frames = open_all_frames(recipe, dataset, eval_dataset, shards.count, report)
    if isinstance(frames, FrameCache) and dataset.meta.video_keys:
        recipe.lerobot.dataset.video_backend = "pyav"  # which has decoded them, whatever was asked for
    quantiles.complete(cfg.policy, dataset.meta)
    memory, room = recipe.memory, 0.0
    if memory and accelerator.device.type == "cuda":
        room = recipe.gpu_share * torch.cuda.get_device_properties(accelerator.device).total_memory
        if text := memory.warning(recipe, room):
            tell(text)
    elif memory and accelerator.device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if text := memory.without_hope(recipe, here):
            raise RunError(text)
        if text := memory.warning(recipe, main_memory() / here, MAIN):
            tell(text)
    report(Doing("building the policy"))
    sharded = accelerator.is_fsdp2
    # All of a policy is in main memory for a while. One that is sharded goes from there to the GPUs share by share.
    need, step = memory.building if memory else 0, 0
    with parallel.in_turns(need), assets.mounted(options.assets.dir, cfg.policy, weights=True):
        policy = build(cfg, dataset.meta, device="cpu" if sharded else cfg.policy.device, tell=tell)
        if not sharded:
            kernels.speed_up(policy)
        as_stock = accelerator.mixed_precision == "no" and not options.data.resize
        if accelerator.device.type == "cpu" and not as_stock:
            kernels.drop_quickly(policy)
        with checkpoint.readable(cfg.policy.pretrained_path or cfg.dataset.repo_id):
            preprocessor, postprocessor = make_processors(cfg, policy, dataset.meta.stats, accelerator.device)
        add_resize_step(preprocessor, options.data.resize)
        optimizer, scheduler = make_optimizer_and_scheduler(cfg, policy)
        if resume_dir:
            step = checkpoint.load(resume_dir, policy, None if sharded else optimizer, scheduler)
        average = make_average(policy, resume_dir, step) if options.ray.ema else None
        kernels.fuse(optimizer)
        model = policy  # the bare policy; `policy` will be the one accelerate has wrapped
        if sharded:
            policy, optimizer, scheduler = parallel.prepare(accelerator, policy, optimizer, scheduler)
            if resume_dir:
                parallel.load_sharded_optimizer(resume_dir, optimizer.optimizer)
    if not sharded:
        policy, optimizer, scheduler = parallel.prepare(accelerator, policy, optimizer, scheduler)
    policy.train()
    one_batch = shards.count == options.ray.grad_accumulation == 1
    if one_batch and not sharded and memory and stream is None and reads_in_a_thread(dataset):
        kernels.launch_as_one(model, memory.total, room)
    # LeRobot fills in the features from the data set, and what adapters need; lerobot-train saves both. Texts are prepared as the
    # processors were saved.
    for name in ("input_features", "output_features", "use_peft", *OF_TEXTS):
        if hasattr(cfg.policy, name):
            setattr(recipe.lerobot.policy, name, getattr(cfg.policy, name))

    samples = samples_of(cfg, dataset) if stream is None else dataset.num_samples
    each_time, begin, first_step = (samples, cfg.batch_size, shards.count), START, step
    if resumed is not None:
        begin = Position.of(resumed, *each_time)
    if stream is None:
        accumulated = options.ray.grad_accumulation
        how = {"shards": shards, "frames": frames, "batches_per_step": accumulated, "begin": begin}
        batches = training_batches(cfg, dataset, accelerator, **how)
    else:
        begin = Position(begin.epoch)  # which is begun again
        batches = streamed_batches(cfg, dataset, accelerator, stream, epoch=begin.epoch, step=step)
    validation = None
    if eval_dataset is not None and recipe.eval_steps > 0:
        validation = Validation.of(
            cfg, options.data, eval_dataset, eval_frames, timed=options.data.eval_timing
        )
    closed_loop = ClosedLoop(cfg) if cfg.env is not None and cfg.env_eval_freq > 0 else None

    # ------------------------------------------------------------------ tell
    if main:
        checkpoint.sweep(recipe.output_dir)
        used = {"eval_steps": recipe.eval_steps, **draccus.encode(options)}
        tracker = Tracker(recipe.lerobot, used, step, started, tell, should_stop)
    lost = {"lost_steps": tracker.lost_steps, "restarts": tracker.restarts} if main else {}
    learnable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = {
        "policy": cfg.policy.type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "learnable_parameters": learnable,
        "dataset": cfg.dataset.repo_id,
        "episodes": dataset.num_episodes,
        "frames": dataset.num_frames,
        "eval_episodes": eval_dataset.num_episodes if eval_dataset else 0,
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision,
        "num_workers": accelerator.num_processes,
        "batch_size": cfg.batch_size,
        "grad_accumulation": options.ray.grad_accumulation,
        "global_batch_size": cfg.batch_size * shards.count * options.ray.grad_accumulation,
        "steps": cfg.steps,
        "start_step": step,
        **lost,
    }
    to_come = (cfg.steps - step) * facts["global_batch_size"]
    facts["epochs"] = round(begin.epoch + (begin.start_index + to_come) / samples, 3)
    report(Start(step, facts))

    window = Window(shards.weight)
    stop_flag = StopFlag(accelerator, should_stop)
    scores = Scores([record for record in read_metrics(recipe.output_dir) if record["step"] <= step])
    status = GO_ON
    patience = options.ray.early_stopping
    if patience and scores.evaluations_since_best >= patience:
        patience += scores.evaluations_since_best  # the run was stopped early, and is continued on purpose

    @contextlib.contextmanager
    def averaged():
        """Within, the model holds the averaged weights."""
        average.store(model.parameters())
        average.copy_to(model.parameters())
        try:
            yield
        finally:
            average.restore(model.parameters())

    averaged_weights = averaged if average is not None else None

    @busy("saving")
    def save(*, only_best: bool) -> None:
        window.check_finite(accelerator)
        weights, moments = parallel.whole_state(accelerator, model, optimizer.optimizer)
        if main:
            write = partial(
                checkpoint.save,
                step,
                cfg=recipe.lerobot,
                policy=model,
                weights=weights,
                averaged=averaged_weights,
                optimizer=optimizer.optimizer,
                moments=moments,
                scheduler=scheduler,
                preprocessor=preprocessor,
                postprocessor=postprocessor,
                shards=shards.count,
                position=begin.after((step - first_step) * options.ray.grad_accumulation, *each_time),
                samples=samples,
            )
            patient(write, f"the checkpoint of step {step}")
            keep = partial(scores.keep, recipe.output_dir, step, options.checkpoint, only_best=only_best)
            patient(keep, "the folder of checkpoints")
        accelerator.wait_for_everyone()
        report(Saved(step))

    def summary(status: str, **more) -> dict:
        newest = checkpoint.last_checkpoint(recipe.output_dir)
        return {
            "status": status,
            **more,
            **facts,
            "step": step,
            "wall_s": round(tracker.wall_s if main else time.time() - started, 1),
            "last": scores.last_values,
            "best": scores.best,
            "checkpoint": str(newest or ""),
            "output_dir": str(recipe.output_dir),
            "wandb_run_id": cfg.wandb.run_id,
        }

    # ------------------------------------------------------------------ train
    try:
        while step < cfg.steps:
            window.begin_step()
            for number in range(len(shards.mine) * options.ray.grad_accumulation):
                with accelerator.accumulate(policy):
                    batch = to_device(next(batches), dataset.meta.camera_keys, accelerator.device)
                    if main and step == number == 0 and cfg.wandb.enable:
                        tracker.log_cameras(
                            {k: batch[k][:4].flatten(0, -4) for k in dataset.meta.camera_keys}, 0
                        )
                    with (
                        _first(cfg, batch, accelerator)
                        if step == facts["start_step"]
                        else contextlib.nullcontext()
                    ):
                        batch = preprocessor(batch)
                        window.data_ready()
                        with accelerator.autocast():
                            loss, outputs = policy(batch)
                    accelerator.backward(loss * shards.weight if shards.weight != 1 else loss)
                    window.add_loss(loss, outputs)
                    if accelerator.sync_gradients:
                        grad_norm = clip_gradients(policy, cfg.optimizer.grad_clip_norm, accelerator)
                    optimizer.step()
                    optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            if has_method(model, "update"):
                model.update()
            if average is not None:
                average.step(model.parameters())
            step += 1
            window.end_step(step, None if accelerator.scaler else grad_norm)
            if main:
                tracker.reached(step)
            report(Step(step))

            if step == cfg.steps or (step % cfg.log_freq == 0 if cfg.log_freq else step % CHECK_EVERY == 0):
                metrics = window.close(accelerator, facts["global_batch_size"])
                metrics["train/lr"] = optimizer.param_groups[0]["lr"]
                scores.add(step, metrics)
                if main and cfg.log_freq:
                    tracker.log(step, metrics)
                report(Log(step, metrics))

            improved = False
            end = step == cfg.steps
            evaluated = validation is not None and (end or step % recipe.eval_steps == 0)
            acted = closed_loop is not None and (end or step % cfg.env_eval_freq == 0)
            if evaluated or acted:
                window.check_finite(accelerator)
                values = {}
                with (averaged_weights or contextlib.nullcontext)():
                    if evaluated:
                        values |= validation(model, preprocessor, postprocessor, accelerator)
                    if acted:
                        values |= closed_loop(model, preprocessor, postprocessor, accelerator)
                if main:
                    tracker.log(step, values)
                check_validation(step, values)
                improved = scores.add(step, values)
                report(Validated(step, values))
                window.begin_step()

            status = stop_flag.reason() if step < cfg.steps else GO_ON
            if evaluated and patience and scores.evaluations_since_best >= patience:
                status = "stopped early"
            regular = status or should_save_checkpoint(step, cfg.save_freq, cfg.steps)
            if cfg.save_checkpoint and (regular or improved) and status != PRUNED:
                save(only_best=not regular)
            if status:
                break
    except Exception as error:
        if main:
            with contextlib.suppress(OSError):  # a full disk must not hide the error
                tracker.finish(summary("failed", error=str(error)), None)
        raise
    finally:
        batches.close()
        if closed_loop is not None:
            closed_loop.close()

    # ------------------------------------------------------------------ end
    result = summary(status or "finished")
    if main:
        tracker.finish(result, checkpoint.last_checkpoint(recipe.output_dir))
        if cfg.policy.push_to_hub and status not in (INTERRUPTED, PREEMPTED, PRUNED):
            with (averaged_weights or contextlib.nullcontext)():
                tell(push(cfg, model, preprocessor, postprocessor, dataset.meta))
    accelerator.wait_for_everyone()
    return result


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


@busy("uploading")
def push(cfg: TrainPipelineConfig, policy, preprocessor, postprocessor, meta) -> str:
    """Upload the trained policy to the Hub, as `lerobot-train` does. Returns what to tell about it: a trained
    policy is none the worse for a network that failed."""
    try:
        policy.push_model_to_hub(
            cfg, dataset_meta=meta, **({"peft_model": policy} if cfg.policy.use_peft else {})
        )
        preprocessor.push_to_hub(cfg.policy.repo_id)
        postprocessor.push_to_hub(cfg.policy.repo_id)
    except Exception as error:
        return f"not uploaded to {cfg.policy.repo_id}: {first_line(error)}"
    return f"uploaded to {cfg.policy.repo_id}"


def make_average(policy: torch.nn.Module, resume_dir: Path | None, step: int):
    """Exponential moving average of the weights with Diffusion Policy's warm-up (power 3/4, at most 0.9999).

    A checkpoint's `pretrained_model` is the average; its raw weights lie in `training_state`.
    """
    from diffusers.training_utils import EMAModel

    parameters = list(policy.parameters())
    average = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    if resume_dir is not None:
        saved = copy.deepcopy(policy)
        checkpoint.load_model(saved, str(resume_dir / PRETRAINED_MODEL_DIR / "model.safetensors"))
        average.shadow_params = [p.detach().clone() for p in saved.parameters()]
        average.optimization_step = step
    return average


def clip_gradients(policy: torch.nn.Module, max_norm: float, accelerator: Accelerator) -> torch.Tensor:
    """Clip to `max_norm` (0 measures only); returns the norm before, still on the device."""
    norm = accelerator.clip_grad_norm_(policy.parameters(), max_norm if max_norm > 0 else math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
