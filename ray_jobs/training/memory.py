"""How much memory a worker's training will take, estimated before anything is built."""

import contextlib
import inspect
import math
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import PolicyFeature
from lerobot.optim import AdamConfig, AdamWConfig
from lerobot.policies import PreTrainedPolicy, get_policy_class
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch.multiprocessing.reductions import StorageWeakRef

from ray_jobs.training.parallel import gathered_kinds

if TYPE_CHECKING:
    from ray_jobs.config.recipe import Recipe

MEASURED_FRAMES = 2  # activations grow with the batch; this many are measured
# What stays of the activations when layers recompute them: the layers' inputs and one layer at work.
RECOMPUTED = 0.15
AUTOCAST = 0.6  # most activations take half the space, some stay float32


MAIN = "main memory"
HOPELESS = 2  # times as much as there is


def main_memory() -> int:
    """Bytes of this machine's main memory, or of its container's share of it."""
    found = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            found.append(int(Path(file).read_text()))
    return min(found)


@dataclass
class Memory:
    """Bytes per worker, while it trains. `activations` is rough, None where it could not be worked out.
    `building` is main memory, before all goes to the GPU: the policy and its file beside each other or, on resume, the
    optimizer's whole state."""

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    building: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        if self.activations is not None:
            parts["activations, roughly"] = self.activations
        listed = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items())
        more = "" if self.activations is not None else "; activations come on top"
        return f"about {self.total / 1e9:.2f} GB per worker ({listed}{more})"

    def warning(self, recipe: "Recipe", available: float, kind: str = "GPU memory") -> str | None:
        """What to change when there are but `available` bytes for a worker, of its GPU or its share of one, or of main
        memory; None if they will do."""
        if self.total <= available:
            return None
        return (
            f"warning: this needs {self}, and there are {available / 1e9:.2f} GB of {kind} for it.\n"
            f"What makes it less: {self.savings(recipe, available)}."
        )

    def without_hope(self, recipe: "Recipe", workers: int) -> str | None:
        """The same as a refusal, if it is so much more than the main memory of this machine, on which so many workers are,
        that the estimate need not be exact: such a training would swap for hours before its first step."""
        room = main_memory() / workers
        warning = self.warning(recipe, room, MAIN) if self.total > HOPELESS * room else None
        return warning and warning.removeprefix("warning: ")

    def savings(self, recipe: "Recipe", available: float | None = None) -> str:
        """The flags that make it less, which the recipe's others allow; the batch so much less that it fits, if that can be."""
        cfg, policy, options = recipe.lerobot, recipe.lerobot.policy, recipe.options.ray
        changes = []
        if getattr(policy, "dtype", None) == "float32":
            changes.append("--policy.dtype=bfloat16")
        if getattr(policy, "gradient_checkpointing", None) is False:
            changes.append("--policy.gradient_checkpointing=true")
        if cfg.batch_size > 1:
            parts, left = 2, (available or 0) - (self.total - (self.activations or 0))
            if self.activations and left > 0:
                parts = min(max(2, math.ceil(self.activations / left)), cfg.batch_size)
            changes.append(
                f"--batch_size={cfg.batch_size // parts} --ray.grad_accumulation={parts * options.grad_accumulation}"
            )
        acts = cfg.env is not None and cfg.env_eval_freq > 0
        whole = options.ema or options.min_workers or acts  # none of these goes with shares of a policy
        if (
            options.parallelism == "ddp"
            and not whole
            and self.total - (self.activations or 0) > self.total // 2
        ):
            workers = "--tune.workers_per_trial" if recipe.context.trainings > 1 else "--ray.num_workers"
            more = "" if options.num_workers > 1 else f" {workers}=2"
            changes.append(f"--ray.parallelism=fsdp{more}")
        # LeRobot knows where to put adapters if the policy says so.
        adaptable = "_get_default_peft_targets" in vars(get_policy_class(policy.type))
        if adaptable and policy.pretrained_path and cfg.peft is None and not (cfg.resume or options.ema):
            changes.append("--peft.method_type=LORA")
        if getattr(policy, "train_expert_only", None) is False:
            changes.append("--policy.train_expert_only=true")
        return "; ".join(changes) or "a smaller policy"


def estimate(network: torch.nn.Module, recipe: "Recipe", features: dict[str, PolicyFeature]) -> Memory:
    """Weigh a policy that was built on the meta device, adapters and frozen layers included.

    Args:
        features: What a batch holds, under the policy's names.
    """
    cfg, options = recipe.lerobot, recipe.options.ray
    workers, sharded = max(options.num_workers, 1), options.parallelism == "fsdp"
    mixed = getattr(cfg.policy, "dtype", None) == "bfloat16"
    building = sum(4 * p.numel() + p.numel() * p.element_size() for p in network.parameters())
    weights = gradients = 0
    for parameter in network.parameters():
        # accelerate keeps what FSDP trains in float32 where it computes with less.
        upcast = sharded and mixed and parameter.requires_grad and workers > 1
        size = parameter.numel() * (4 if upcast else parameter.element_size())
        weights += size
        gradients += size * parameter.requires_grad
    adam = isinstance(cfg.optimizer, AdamConfig | AdamWConfig)
    moments = gradients * (2 if adam else 1)
    building = max(building, moments)
    if sharded and workers > 1:
        weights, gradients, moments = (amount // workers for amount in (weights, gradients, moments))
        weights += _gathered(network)
    elif workers > 1:
        gradients *= 2  # DDP exchanges them in buckets of its own
    if options.ema:
        weights *= 2
    activations = _activations(network, features)
    if activations is not None:
        activations = activations * cfg.batch_size // MEASURED_FRAMES
        if getattr(cfg.policy, "gradient_checkpointing", False):
            activations = int(activations * RECOMPUTED)
        if cfg.policy.use_amp and not hasattr(cfg.policy, "dtype"):
            activations = int(activations * AUTOCAST)
    return Memory(weights, gradients, moments, activations, building)


def _gathered(network: torch.nn.Module) -> int:
    """Bytes of a sharded policy that are on a GPU as a whole at a time: its largest layer, and what is in no layer; or
    all of it."""
    kinds = tuple(gathered_kinds(network))
    layers = {
        id(p): p.numel() * p.element_size()
        for module in network.modules()
        if isinstance(module, kinds)
        for p in module.parameters(recurse=False)
    }
    rest = sum(p.numel() * p.element_size() for p in network.parameters() if id(p) not in layers)
    return rest + max(layers.values(), default=0)


def _storage_of(tensor: torch.Tensor) -> int:
    """What tells the memory of one tensor from another's on the meta device, where every address is 0."""
    return StorageWeakRef(tensor.untyped_storage()).cdata


def _activations(network: PreTrainedPolicy, features: dict[str, PolicyFeature]) -> int | None:
    """Bytes that a forward pass on MEASURED_FRAMES frames keeps for the backward pass.

    The pass runs without data, on the meta device; what autograd saves is counted. It ends where the policy asks
    for a number to log, after its loss is complete.
    """
    weights = {_storage_of(parameter) for parameter in network.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if _storage_of(tensor) not in weights:
            saved[_storage_of(tensor)] = tensor  # held, or its number would be given again
        return tensor

    base = network.get_base_model() if hasattr(network, "get_base_model") else network
    checkpointed = getattr(base.config, "gradient_checkpointing", False)
    if checkpointed and hasattr(base, "model"):
        base.model.gradient_checkpointing_disable()
    batch = _batch(base.config, features)
    training = network.training
    try:
        network.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(batch)
    except (NotImplementedError, RuntimeError) as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if f"{os.sep}torch{os.sep}" not in frame.filename
        ]
        if "meta tensor" not in str(error) or frames[-1].filename != inspect.getfile(type(base)):
            return None  # not the policy's own wish, but that of a model inside it
    except Exception:
        return None
    finally:
        network.train(training)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _batch(config: PreTrainedConfig, features: dict[str, PolicyFeature]) -> dict[str, torch.Tensor]:
    """A batch without data, as a policy's preprocessor would hand it on."""
    batch = {}
    for key, feature in features.items():
        deltas = config.action_delta_indices if key.startswith("action") else config.observation_delta_indices
        history = () if deltas is None or deltas == [0] else (len(deltas),)
        batch[key] = torch.empty(MEASURED_FRAMES, *history, *feature.shape, device="meta")
        if history:
            batch[f"{key}_is_pad"] = torch.empty(MEASURED_FRAMES, *history, dtype=torch.bool, device="meta")
    words = getattr(config, "tokenizer_max_length", None)
    if words:
        batch[OBS_LANGUAGE_TOKENS] = torch.empty(MEASURED_FRAMES, words, dtype=torch.long, device="meta")
        batch[OBS_LANGUAGE_ATTENTION_MASK] = torch.empty(
            MEASURED_FRAMES, words, dtype=torch.bool, device="meta"
        )
    return batch
