"""All of accelerate that is used here and is not public: what for, and which public way is missing.

Seen in accelerate 1.15. At the next version `test_accelerate_internals.py` tells which name has gone.
"""

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState


def forget_state() -> None:
    """Let a process that trains more than once (tests, trials) make an accelerator of another precision.

    Missing: a public way; accelerate's own tests do it like this.
    """
    AcceleratorState._reset_state(reset_partial_state=True)


def shard_between_cpus(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Turn FSDP on for an accelerator of several processes on CPUs, between which all of it works.

    Missing: accelerate turns it on between GPUs only; its own code sets the state like this.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
