"""Everything that a training is made of, built as `lerobot-train` does and in the same order, so that the random numbers
are the same; from the last checkpoint if there is one."""

import contextlib
import copy
import json
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import broadcast_object_list
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDataset
from lerobot.optim.factory import make_optimizer_and_scheduler
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import PRETRAINED_MODEL_DIR, TRAINING_STATE_DIR, TRAINING_STEP
from lerobot.utils.random_utils import set_seed

from ray_jobs.config.errors import RunError
from ray_jobs.config.events import Doing, Event, Notice
from ray_jobs.config.recipe import Recipe
from ray_jobs.data import quantiles
from ray_jobs.data.dataset import (
    make_datasets,
    open_all_frames,
    reads_in_a_thread,
    samples_of,
    training_batches,
)
from ray_jobs.data.frame_cache import FrameCache
from ray_jobs.data.frames import add_resize_step
from ray_jobs.data.position import START, Position, Shards
from ray_jobs.data.stream import StreamedDataset, make_streamed_datasets, streamed_batches
from ray_jobs.policies import assets, kernels
from ray_jobs.policies.build import OF_TEXTS, build, make_processors
from ray_jobs.storage import bucket
from ray_jobs.storage.retry import patiently, storage_may_return
from ray_jobs.training import checkpoint, parallel
from ray_jobs.training.memory import MAIN, main_memory
from ray_jobs.training.simulator import ClosedLoop
from ray_jobs.training.validation import Validation

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


@dataclass
class Setup:
    """A training that is about to take its first step."""

    recipe: Recipe
    cfg: TrainPipelineConfig
    """What this process trains by."""
    written: TrainPipelineConfig
    """What train_config.json says: what was used, in terms that hold elsewhere."""
    accelerator: Accelerator
    shards: Shards
    dataset: LeRobotDataset | StreamedDataset
    eval_dataset: LeRobotDataset | None
    policy: torch.nn.Module
    """As accelerate has wrapped it."""
    model: PreTrainedPolicy
    """The bare policy, perhaps with adapters around it."""
    optimizer: AcceleratedOptimizer
    scheduler: AcceleratedScheduler | None
    average: "EMAModel | None"
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    batches: Generator[dict, None, None]
    validation: Validation | None
    closed_loop: ClosedLoop | None
    first_step: int
    """The one that is done already, of which the checkpoint is."""
    begin: Position
    """In the data, then."""
    each_time: tuple[int, int, int]
    """Samples of an epoch, of a batch, and shards (see `Position`)."""

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within, the model holds the averaged weights, if they are averaged."""
        return contextlib.nullcontext() if self.average is None else self._with(self.average)

    @contextlib.contextmanager
    def _with(self, average: "EMAModel") -> Iterator[None]:
        average.store(self.model.parameters())
        average.copy_to(self.model.parameters())
        try:
            yield
        finally:
            average.restore(self.model.parameters())

    @property
    def facts(self) -> dict[str, Any]:
        """What stands in the run's summary, however it ends."""
        accelerator, cfg, options = self.accelerator, self.cfg, self.recipe.options
        batch = cfg.batch_size * self.shards.count * options.ray.grad_accumulation
        to_come = (cfg.steps - self.first_step) * batch
        return {
            "policy": cfg.policy.type,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "learnable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "dataset": cfg.dataset.repo_id,
            "episodes": self.dataset.num_episodes,
            "frames": self.dataset.num_frames,
            "eval_episodes": self.eval_dataset.num_episodes if self.eval_dataset else 0,
            "device": str(accelerator.device),
            "precision": accelerator.mixed_precision,
            "num_workers": accelerator.num_processes,
            "batch_size": cfg.batch_size,
            "grad_accumulation": options.ray.grad_accumulation,
            "global_batch_size": batch,
            "steps": cfg.steps,
            "start_step": self.first_step,
            "epochs": round(self.begin.epoch + (self.begin.start_index + to_come) / self.each_time[0], 3),
        }


def set_up(
    recipe: Recipe,
    device: str,
    report: Callable[[Event], None],
    should_stop: Callable[[], str],
    stream: Callable[[int], Iterator[dict]] | None,
) -> Setup:
    """Build a training (see `loop.train` for the arguments).

    Raises:
        RunError: A file of the data set cannot be read, or no memory holds the training.
    """

    def tell(text: str) -> None:
        report(Notice(text))

    options = recipe.options
    # The type alone: an index in a checkpoint's config is not understood everywhere.
    written = copy.deepcopy(recipe.lerobot)
    written.policy.device = torch.device(device).type
    cfg = copy.deepcopy(written)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    accelerator = parallel.make_accelerator(cfg, options.ray)
    shards = parallel.divide(accelerator, options.ray)

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
        folder = patiently(
            fetch, cfg.dataset.root, tell, doing="read", passing=storage_may_return, stop=should_stop
        )
        cfg.dataset.root = str(folder)
    make = make_datasets if stream is None else make_streamed_datasets
    dataset, eval_dataset = make(cfg, options.data.eval_episodes, options.data.resize)
    frames, eval_frames = open_all_frames(recipe, dataset, eval_dataset, shards.count, report)
    if isinstance(frames, FrameCache) and dataset.meta.video_keys:
        written.dataset.video_backend = "pyav"  # which has decoded them, whatever was asked for
    quantiles.complete(cfg.policy, dataset.meta)
    memory, room = recipe.context.memory, 0.0
    if memory and accelerator.device.type == "cuda":
        room = recipe.context.gpu_share * torch.cuda.get_device_properties(accelerator.device).total_memory
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
            setattr(written.policy, name, getattr(cfg.policy, name))

    samples = samples_of(cfg, dataset) if stream is None else dataset.num_samples
    each_time, begin = (samples, cfg.batch_size, shards.count), START
    if resumed is not None:
        begin = Position.of(resumed, *each_time)
    if stream is None:
        accumulated = options.ray.grad_accumulation
        batches = training_batches(
            cfg,
            dataset,
            accelerator,
            shards=shards,
            frames=frames,
            batches_per_step=accumulated,
            begin=begin,
        )
    else:
        begin = Position(begin.epoch)  # which is begun again
        batches = streamed_batches(cfg, dataset, accelerator, stream, epoch=begin.epoch, step=step)
    validation = None
    if eval_dataset is not None and recipe.eval_steps > 0:
        validation = Validation.of(
            cfg, options.data, eval_dataset, eval_frames, timed=options.data.eval_timing
        )
    closed_loop = ClosedLoop(cfg) if cfg.env is not None and cfg.env_eval_freq > 0 else None
    return Setup(
        recipe=recipe,
        cfg=cfg,
        written=written,
        accelerator=accelerator,
        shards=shards,
        dataset=dataset,
        eval_dataset=eval_dataset,
        policy=policy,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        average=average,
        preprocessor=preprocessor,
        postprocessor=postprocessor,
        batches=batches,
        validation=validation,
        closed_loop=closed_loop,
        first_step=step,
        begin=begin,
        each_time=each_time,
    )


def make_average(policy: torch.nn.Module, resume_dir: Path | None, step: int) -> "EMAModel":
    """Exponential moving average of the weights with Diffusion Policy's warm-up (power 3/4, at most 0.9999).

    A checkpoint's `pretrained_model` is the average; its raw weights lie in `training_state`.
    """
    from diffusers.training_utils import EMAModel  # 1 s, for those who average

    parameters = list(policy.parameters())
    average = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    if resume_dir is not None:
        saved = copy.deepcopy(policy)
        checkpoint.load_model(saved, str(resume_dir / PRETRAINED_MODEL_DIR / "model.safetensors"))
        average.shadow_params = [p.detach().clone() for p in saved.parameters()]
        average.optimization_step = step
    return average
