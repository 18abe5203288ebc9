"""A LeRobot plugin (`--discover_packages_path=faulty`) for faults that a test cannot make from outside: there is no GPU here
whose memory could run out, no mount whose server could be stopped, and a stopped process does not answer. `FAULT` says which
one; it lasts as long as there is the file that `FAULT_FILE` names. `PATIENCE` is in seconds what else are 15 minutes.
"""

import errno
import os
import time
from pathlib import Path

import torch
import torch.utils.checkpoint
from lerobot.policies.act.modeling_act import ACTPolicy
from torch import distributed

from ray_jobs.storage import retry

FAULT, FILE = os.environ.get("FAULT"), Path(os.environ.get("FAULT_FILE", "/nowhere"))
retry.PATIENCE_S = float(os.environ.get("PATIENCE", retry.PATIENCE_S))
forward, fsync = ACTPolicy.forward, os.fsync
batches = 0


def exhausted(self, batch):
    """From the third batch on too large."""
    global batches
    batches += 1
    if batches >= 3 and FILE.exists():
        if FAULT == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
        torch.empty(2**60, dtype=torch.uint8)  # which Linux refuses
    return forward(self, batch)


def stuck(self, batch):
    """On the last rank, once: for longer than any test waits."""
    if FILE.exists() and (
        not distributed.is_initialized() or distributed.get_rank() + 1 == distributed.get_world_size()
    ):
        FILE.unlink()
        time.sleep(3600)
    return forward(self, batch)


def wrong(self, batch):
    """A mistake in somebody's code, at the third batch of every process."""
    global batches
    batches += 1
    if batches >= 3 and FILE.exists():
        raise TypeError(f"unsupported operand: {object()}")
    return forward(self, batch)


def checkpointed(self, batch):
    """Stuck where activations are computed again in the backward pass, as large policies do: torch does so in a file called
    checkpoint.py, too."""
    return torch.utils.checkpoint.checkpoint(stuck, self, batch, use_reentrant=False)


def unreachable(descriptor: int) -> None:
    if FILE.exists():
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    fsync(descriptor)


if FAULT in ("gpu", "main"):
    ACTPolicy.forward = exhausted
if FAULT == "stuck":
    ACTPolicy.forward = stuck
if FAULT == "wrong":
    ACTPolicy.forward = wrong
if FAULT == "checkpointed":
    ACTPolicy.forward = checkpointed
if FAULT == "mount":
    os.fsync = unreachable
