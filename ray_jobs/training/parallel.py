"""Several workers, one model: a copy on each (DDP) or a share on each (FSDP2), through accelerate.

Checkpoints are the same either way, so that a run may go on with the other, or with another number of workers.
"""

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from lerobot.configs.train import TrainPipelineConfig
from lerobot.optim import load_optimizer_state_dict
from lerobot.utils.constants import TRAINING_STATE_DIR
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ray_jobs.config.errors import InputError, RunError, first_line
from ray_jobs.config.options import RayOptions
from ray_jobs.data.position import Shards
from ray_jobs.policies.facts import facts_of
from ray_jobs.training.accelerate_internals import forget_state, shard_between_cpus


def make_accelerator(cfg: TrainPipelineConfig, options: RayOptions) -> Accelerator:
    """An Accelerator set up as `lerobot-train` does: the policy's `dtype` decides the precision, or
    `use_amp` where a policy has no `dtype`."""
    forget_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # left by a run that was sharded
    device = torch.device(cfg.policy.device)
    precision = "no"
    if hasattr(cfg.policy, "dtype"):
        precision = {"bfloat16": "bf16", "float16": "fp16"}.get(cfg.policy.dtype, "no")
    elif cfg.policy.use_amp:
        precision = "bf16" if torch.get_autocast_dtype(device.type) == torch.bfloat16 else "fp16"
    sharding = None
    if options.parallelism == "fsdp":
        # Weights are cast for a policy in bfloat16. Under `use_amp` autocast alone does it, as on one worker: batch norm
        # refuses weights of another precision than its statistics.
        cast = None if hasattr(cfg.policy, "dtype") else MixedPrecisionPolicy()
        sharding = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=cast)
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=device.type == "cpu",
        step_scheduler_with_optimizer=False,
        fsdp_plugin=sharding,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=options.grad_accumulation, adjust_scheduler=False, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                # Looking for parameters without gradient walks the graph in every step.
                find_unused_parameters=facts_of(cfg.policy.type).unused_parameters or cfg.peft is not None,
                gradient_as_bucket_view=True,
            )
        ],
    )
    if sharding and accelerator.distributed_type is DistributedType.MULTI_CPU:
        shard_between_cpus(accelerator, sharding)
        if precision != "no":
            sharding.set_mixed_precision(precision)
    return accelerator


def divide(accelerator: Accelerator, options: RayOptions) -> Shards:
    """Divide the shards of a full group among the workers there are, and have accelerate accumulate their batches."""
    workers = accelerator.num_processes
    count = max(options.num_workers, workers) if options.min_workers else workers
    mine = range(accelerator.process_index, count, workers)
    if count > workers:
        accelerator.gradient_accumulation_steps = len(mine) * options.grad_accumulation
    return Shards(count, mine, weight=workers * len(mine) / count)


def prepare(
    accelerator: Accelerator,
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
) -> tuple[torch.nn.Module, AcceleratedOptimizer, AcceleratedScheduler | None]:
    """`Accelerator.prepare`, with a policy that is sharded layer by layer where its code allows that."""
    if accelerator.is_fsdp2 and (kinds := gathered_kinds(policy)):
        plugin = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = [kind.__name__ for kind in kinds]
    prepared = accelerator.prepare(policy, optimizer, scheduler)
    if accelerator.is_fsdp2:
        register_fsdp_forward_method(prepared[0], "predict_action_chunk")
    return prepared


def gathered_kinds(policy: torch.nn.Module) -> list[type[torch.nn.Module]]:
    """The layers of a sharded policy that are gathered one by one, when they are at work; none: all of it together.

    Only a module that is called gathers its share. The large policies reach past their decoder layers to the
    linear layers in them, so these are the units; torch's MultiheadAttention reaches past its own linear layer,
    so a policy that has one is gathered whole.
    """
    kinds = {type(module) for module in policy.modules()}
    if torch.nn.MultiheadAttention in kinds:
        return []
    return [kind for kind in (torch.nn.Linear, torch.nn.Embedding) if kind in kinds]


def whole_state(
    accelerator: Accelerator, policy: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict | None, dict]:
    """The weights (None: those of `policy` are whole) and the optimizer's state, as a stock LeRobot run has them:
    contiguous, without our choice of kernel. Call on every rank; the main one gets the tensors.

    Stock LeRobot refuses to load groups whose `fused` differs from its own, and safetensors takes contiguous
    tensors only.
    """
    gathered: dict[int, torch.Tensor] = {}

    def whole(value: Any) -> Any:
        if isinstance(value, DTensor):
            if id(value) not in gathered:  # tied weights stay tied
                full = value.full_tensor()
                own = full.to("cpu", copy=True) if accelerator.is_main_process else full.new_empty(0)
                gathered[id(value)] = own.detach()
            return gathered[id(value)]
        return value.contiguous() if torch.is_tensor(value) else value

    weights = None
    if accelerator.is_fsdp2:
        weights = {name: whole(value) for name, value in policy.state_dict(keep_vars=True).items()}
    state = optimizer.state_dict()
    groups = copy.deepcopy(state["param_groups"])
    for group in groups:
        if "fused" in group:
            group["fused"] = None
    moments = {
        index: {name: whole(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return weights, {"state": moments, "param_groups": groups}


def load_sharded_optimizer(checkpoint_dir: Path, optimizer: torch.optim.Optimizer) -> None:
    """Give every rank its share of a checkpoint's optimizer state; call once the policy is sharded."""
    saved = load_optimizer_state_dict(checkpoint_dir / TRAINING_STATE_DIR)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in saved["state"].items():
        parameter = parameters[int(index)]
        optimizer.state[parameter] = {
            name: distribute_tensor(
                # Copies in bfloat16 have moments in it; a sharded policy's weights are float32.
                value.to(parameter.device, parameter.dtype),
                parameter.device_mesh,
                parameter.placements,
                src_data_rank=None,
            )
            if value.shape == parameter.shape and value.dim()
            else value.to(parameter.device)
            for name, value in values.items()
        }
    for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group |= {name: value for name, value in before.items() if name not in ("params", "fused")}


@contextmanager
def in_turns(need: int, free: int | None = None) -> Iterator[None]:
    """Let as many of a node's workers at a time into the block as its memory has room for.

    A policy is built and its checkpoint read in main memory before it goes to the GPU: N workers that did so side
    by side would need it N times. Within, workers must not wait for each other. When one fails there, all do: the
    others would wait for it until the time for a collective operation is up.

    Args:
        need: Bytes each of them takes for a while.
        free: Bytes there are; None asks the system.

    Raises:
        RunError, RuntimeError: Another worker failed within the block, with a RunError or with any other error.
    """
    rank = int(os.environ.get("LOCAL_RANK", 0))
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        yield
        return
    free = psutil.virtual_memory().available if free is None else free
    # The node with the least room decides for all, and nobody's reading but that one counts: a turn is everybody's.
    at_once = min(_gather(max(1, free // max(need, 1))))
    turns = max(_gather(math.ceil(workers / at_once)))
    failure = None
    for turn in range(turns):
        if turn == rank // at_once:
            try:
                yield
            except Exception as error:
                failure = error
        told = failure and (isinstance(failure, RunError | InputError), first_line(failure))
        failures = {number: one for number, one in enumerate(_gather(told)) if one}
        if failure:
            raise failure
        for number, (for_good, reason) in failures.items():
            raise (RunError if for_good else RuntimeError)(f"worker {number}: {reason}")


def _gather(value: Any) -> list:
    """The values of all ranks, on every rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
