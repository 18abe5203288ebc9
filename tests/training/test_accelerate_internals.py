"""Canaries: what is private of accelerate and used here is still there, and still needed."""

import inspect

import pytest
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from ray_jobs.training.accelerate_internals import forget_state


def test_a_process_that_trains_again_may_change_its_precision():
    forget_state()
    Accelerator(cpu=True, mixed_precision="no")
    with pytest.raises(ValueError, match="already been initialized"):
        Accelerator(cpu=True, mixed_precision="bf16")
    forget_state()
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    forget_state()


def test_sharding_is_for_devices_only():
    """Where this fails, FSDP between CPUs may need no help any more."""
    assert "distributed_type" in PartialState._shared_state or PartialState(cpu=True)
    source = inspect.getsource(AcceleratorState.__init__)
    condition = source[: source.index("DistributedType.FSDP")]
    assert "MULTI_GPU" in condition and "MULTI_CPU" not in condition
