"""All ranks of a run stop at the same step."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from ray_jobs.config.errors import STOP_REASONS


class StopFlag:
    """Lets all ranks stop at the same step when one is asked to.

    The answer to this step's question is read at the next one: the exchange runs beside the step, on the
    CPU, and no rank ever waits for a GPU because of it.
    """

    def __init__(self, accelerator: Accelerator, should_stop: Callable[[], str]):
        self.should_stop = should_stop
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo")
        self.pending: tuple[torch.Tensor, torch.distributed.Work] | None = None

    def reason(self) -> str:
        """One of STOP_REASONS, the same on all ranks."""
        if self.group is None:
            return self.should_stop()
        answer = 0
        if self.pending is not None:
            flag, work = self.pending
            work.wait()
            answer = int(flag.item())
        flag = torch.tensor(STOP_REASONS.index(self.should_stop()))
        largest = torch.distributed.ReduceOp.MAX
        self.pending = flag, torch.distributed.all_reduce(flag, largest, group=self.group, async_op=True)
        return STOP_REASONS[answer]
