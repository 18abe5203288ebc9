"""The training loop: plain torch, LeRobot and accelerate. It knows nothing of Ray.

It reads top to bottom: build everything as `lerobot-train` does and in the same order (so that the random
numbers are the same), go on from the last checkpoint if there is one, then step, log, validate, save.
"""

import contextlib
import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, broadcast_object_list
from lerobot.common.train_utils import should_save_checkpoint
from lerobot.configs.train import TrainPipelineConfig
from lerobot.optim.factory import make_optimizer_and_scheduler
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.utils.constants import PRETRAINED_MODEL_DIR, TRAINING_STATE_DIR, TRAINING_STEP
from lerobot.utils.random_utils import set_seed
from lerobot.utils.utils import has_method

from ray_jobs.engine import checkpoint
from ray_jobs.engine.data import make_datasets, open_all_frames, to_device, training_batches
from ray_jobs.engine.explain import first_line
from ray_jobs.engine.frames import add_resize_step
from ray_jobs.engine.meters import Scores, Window
from ray_jobs.engine.objective import Validation
from ray_jobs.engine.recipe import Recipe
from ray_jobs.engine.stop_flag import StopFlag
from ray_jobs.engine.tracking import Tracker, read_metrics

CHECK_EVERY = 200  # steps between looks for NaN where nothing else asks for the loss


def train(
    recipe: Recipe,
    *,
    device: str,
    report: Callable[[dict], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Train the recipe's policy to its last step, from its last checkpoint if it has one.

    Args:
        device: `cpu`, `cuda`, `cuda:1` ...: what this worker trains on.
        report: Called on every rank with dicts that have a `kind`: `start`, `step`, `log`, `eval`,
            `checkpoint`, `notice`. All ranks make the same `eval` and `checkpoint` calls.
        should_stop: Asked after every step on every rank; once one rank says yes, all ranks save a
            checkpoint and stop at the same step.

    Returns:
        The run's summary, as written to summary.json.

    Raises:
        RunError: The loss became NaN or infinite, or a file of the data set cannot be read.
    """
    started = time.time()
    options = recipe.options
    cfg = copy.deepcopy(recipe.lerobot)  # `recipe.lerobot` stays what train_config.json will say
    # The type alone: an index in a checkpoint's config is not understood everywhere.
    cfg.policy.device = recipe.lerobot.policy.device = torch.device(device).type
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    accelerator = make_accelerator(cfg, options.ray.grad_accumulation)
    main = accelerator.is_main_process

    # ------------------------------------------------------------------ where to go on from
    resume_dir = checkpoint.last_checkpoint(recipe.output_dir)
    if recipe.lerobot.resume and resume_dir is None:
        resume_dir = Path(recipe.lerobot.checkpoint_path)  # --config_path: a checkpoint of another run
    resume_dir = broadcast_object_list([resume_dir])[0]  # rank 0 holds the run's lock: what it saw is true
    resumed = None
    if resume_dir is not None:
        cfg.resume, cfg.checkpoint_path = True, resume_dir
        cfg.policy.pretrained_path = resume_dir / PRETRAINED_MODEL_DIR
        resumed = json.loads((resume_dir / TRAINING_STATE_DIR / TRAINING_STEP).read_text())

    # ------------------------------------------------------------------ data, policy, optimizer
    if cfg.seed is not None:
        set_seed(cfg.seed, accelerator=accelerator)
    torch.backends.cudnn.deterministic = cfg.cudnn_deterministic
    torch.backends.cudnn.benchmark = not cfg.cudnn_deterministic
    torch.backends.cuda.matmul.allow_tf32 = True

    dataset, eval_dataset = make_datasets(cfg, options.data.eval_episodes, options.data.resize)
    frames, eval_frames = open_all_frames(recipe, dataset, eval_dataset, accelerator.num_processes, report)
    policy = make_policy(cfg.policy, ds_meta=dataset.meta, rename_map=cfg.rename_map)
    # make_policy fills the features in from the data set; lerobot-train saves them in train_config.json.
    recipe.lerobot.policy.input_features = cfg.policy.input_features
    recipe.lerobot.policy.output_features = cfg.policy.output_features
    if cfg.peft is not None and not has_method(policy, "merge_and_unload"):
        policy = policy.wrap_with_peft(peft_cli_overrides=dataclasses.asdict(cfg.peft))
    preprocessor, postprocessor = make_processors(cfg, policy, dataset.meta.stats, accelerator.device)
    add_resize_step(preprocessor, options.data.resize)
    optimizer, scheduler = make_optimizer_and_scheduler(cfg, policy)

    step = checkpoint.load(resume_dir, policy, optimizer, scheduler) if resume_dir else 0
    average = make_average(policy, resume_dir, step) if options.ray.ema else None
    use_fast_kernels(policy, optimizer, channels_last=accelerator.mixed_precision != "no")

    batches = training_batches(
        cfg,
        dataset,
        accelerator,
        frames=frames,
        batches_per_step=options.ray.grad_accumulation,
        resumed=resumed,
    )
    validation = None
    if eval_dataset is not None and recipe.eval_steps > 0:
        validation = Validation(
            eval_dataset,
            cfg.policy,
            horizon=options.data.eval_horizon,
            max_frames=cfg.max_eval_samples,
            threads=cfg.num_workers,
            frames=eval_frames,
        )
    model = policy  # the bare policy; `policy` is the one accelerate has wrapped
    accelerator.wait_for_everyone()
    policy, optimizer, scheduler = accelerator.prepare(policy, optimizer, scheduler)
    policy.train()

    # ------------------------------------------------------------------ tell
    if main:
        checkpoint.sweep(recipe.output_dir)
        tracker = Tracker(recipe.lerobot, step)
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
        "global_batch_size": cfg.batch_size * accelerator.num_processes * options.ray.grad_accumulation,
        "steps": cfg.steps,
        "start_step": step,
    }
    facts["epochs"] = round(cfg.steps * facts["global_batch_size"] / dataset.num_frames, 3)
    report({"kind": "start", **facts})

    window = Window()
    stop_flag = StopFlag(accelerator, should_stop)
    scores = Scores([record for record in read_metrics(recipe.output_dir) if record["step"] <= step])
    status = "finished"
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

    def save(*, only_best: bool) -> None:
        window.check_finite(accelerator)
        if main:
            checkpoint.save(
                step,
                cfg=recipe.lerobot,
                policy=model,
                averaged=averaged_weights,
                optimizer=optimizer.optimizer,
                scheduler=scheduler,
                preprocessor=preprocessor,
                postprocessor=postprocessor,
                accelerator=accelerator,
            )
            scores.keep(recipe.output_dir, step, options.checkpoint, only_best=only_best)
        accelerator.wait_for_everyone()
        report({"kind": "checkpoint", "step": step})

    def summary(status: str, **more) -> dict:
        newest = checkpoint.last_checkpoint(recipe.output_dir)
        return {
            "status": status,
            **more,
            **facts,
            "step": step,
            "wall_s": round(time.time() - started, 1),
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
            for number in range(options.ray.grad_accumulation):
                with accelerator.accumulate(policy):
                    batch = to_device(next(batches), dataset.meta.camera_keys, accelerator.device)
                    if main and step == number == 0 and cfg.wandb.enable:
                        tracker.log_cameras(
                            {k: batch[k][:4].flatten(0, -4) for k in dataset.meta.camera_keys}, 0
                        )
                    batch = preprocessor(batch)
                    window.data_ready()
                    with accelerator.autocast():
                        loss, outputs = policy.forward(batch)
                    accelerator.backward(loss)
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
            report({"kind": "step", "step": step})

            if step == cfg.steps or (step % cfg.log_freq == 0 if cfg.log_freq else step % CHECK_EVERY == 0):
                metrics = window.close(accelerator, facts["global_batch_size"])
                metrics["train/lr"] = optimizer.param_groups[0]["lr"]
                scores.add(step, metrics)
                if main and cfg.log_freq:
                    tracker.log(step, metrics)
                report({"kind": "log", "step": step, **metrics})

            improved = False
            evaluated = validation is not None and (step % recipe.eval_steps == 0 or step == cfg.steps)
            if evaluated:
                window.check_finite(accelerator)
                with (averaged_weights or contextlib.nullcontext)():
                    values = validation(model, preprocessor, postprocessor, accelerator)
                improved = scores.add(step, values)
                if main:
                    tracker.log(step, values)
                report({"kind": "eval", "step": step, **values})
                window.begin_step()

            stopping = stop_flag.raised() and step < cfg.steps
            if evaluated and patience and scores.evaluations_since_best >= patience:
                stopping, status = True, "stopped early"
            elif stopping:
                status = "interrupted"
            regular = stopping or should_save_checkpoint(step, cfg.save_freq, cfg.steps)
            if cfg.save_checkpoint and (regular or improved):
                save(only_best=not regular)
            if stopping:
                break
    except Exception as error:
        if main:
            tracker.finish(summary("failed", error=str(error)), None)
        raise
    finally:
        batches.close()

    # ------------------------------------------------------------------ end
    result = summary(status)
    if main:
        tracker.finish(result, checkpoint.last_checkpoint(recipe.output_dir))
        if cfg.policy.push_to_hub and status != "interrupted":
            with (averaged_weights or contextlib.nullcontext)():
                report(
                    {"kind": "notice", "text": push(cfg, model, preprocessor, postprocessor, dataset.meta)}
                )
    accelerator.wait_for_everyone()
    return result


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


def make_accelerator(cfg: TrainPipelineConfig, grad_accumulation: int) -> Accelerator:
    """An Accelerator set up as `lerobot-train` does: the policy's `dtype` decides the precision, or
    `use_amp` where a policy has no `dtype`."""
    # A process that trains more than once (tests, trials) may change its precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    device = torch.device(cfg.policy.device)
    precision = "no"
    if hasattr(cfg.policy, "dtype"):
        precision = {"bfloat16": "bf16", "float16": "fp16"}.get(cfg.policy.dtype, "no")
    elif cfg.policy.use_amp:
        precision = "bf16" if torch.get_autocast_dtype(device.type) == torch.bfloat16 else "fp16"
    return Accelerator(
        mixed_precision=precision,
        cpu=device.type == "cpu",
        step_scheduler_with_optimizer=False,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=grad_accumulation, adjust_scheduler=False, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                # Looking for parameters without gradient walks the graph in every step. ACT has none.
                find_unused_parameters=cfg.policy.type != "act" or cfg.peft is not None,
                gradient_as_bucket_view=True,
            )
        ],
    )


def make_processors(cfg: TrainPipelineConfig, policy, stats: dict, device: torch.device):
    """Pre- and postprocessor: new ones for a new policy, a checkpoint's own with the data set's statistics
    for a pretrained one, a checkpoint's own untouched on resume."""
    pretrained = cfg.policy.pretrained_path
    if pretrained is None:
        return make_pre_post_processors(cfg.policy, dataset_stats=stats)
    norm_map, outputs = policy.config.normalization_mapping, policy.config.output_features
    features = {**policy.config.input_features, **outputs}
    before = {
        "device_processor": {"device": device.type},
        "normalizer_processor": {"features": features, "norm_map": norm_map},
        "rename_observations_processor": {"rename_map": cfg.rename_map},
    }
    after = {"unnormalizer_processor": {"features": outputs, "norm_map": norm_map}}
    kwargs = {}
    if not cfg.resume:
        before["normalizer_processor"]["stats"] = after["unnormalizer_processor"]["stats"] = stats
        kwargs["dataset_stats"] = stats
    if getattr(cfg.policy, "use_relative_actions", False):
        before["relative_actions_processor"] = {
            "enabled": True,
            "exclude_joints": getattr(cfg.policy, "relative_exclude_joints", []),
            "action_names": getattr(cfg.policy, "action_feature_names", None),
        }
        after["absolute_actions_processor"] = {"enabled": True}
    return make_pre_post_processors(
        cfg.policy,
        pretrained_path=pretrained,
        pretrained_revision=cfg.policy.pretrained_revision,
        preprocessor_overrides=before,
        postprocessor_overrides=after,
        **kwargs,
    )


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


def use_fast_kernels(
    policy: torch.nn.Module, optimizer: torch.optim.Optimizer, *, channels_last: bool
) -> None:
    """Fused Adam always (its losses are equal to the last digit), channels_last with reduced precision.

    The kernel is chosen per parameter group, after a checkpoint was loaded: LeRobot's optimizer configs have
    no field for it, and its loader refuses groups that differ from those it saved.
    """
    if channels_last:
        policy.to(memory_format=torch.channels_last)
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one, too
        return
    for group in optimizer.param_groups:
        group["fused"] = True
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            value = value.to(parameter.device)
            # The fused kernel walks memory: the moments must lie as their parameter does.
            like = torch.empty_like(parameter) if value.shape == parameter.shape else value
            state[name] = like.copy_(value) if like is not value else value


def clip_gradients(policy: torch.nn.Module, max_norm: float, accelerator: Accelerator) -> torch.Tensor:
    """Clip to `max_norm` (0 measures only); returns the norm before, still on the device."""
    return accelerator.clip_grad_norm_(policy.parameters(), max_norm if max_norm > 0 else math.inf)
