"""All of Ray Train that is used here and is not public: what for, and which public way is missing (see `ray_internals`)."""

import atexit
import os
from typing import TYPE_CHECKING, Any

from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import get_train_context

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


def torch_trainer(**arguments: Any) -> "TorchTrainer":
    """A `TorchTrainer` with fewer actors: each is a process that takes 2 s of a processor while the workers start. Without data
    sets of Ray Data's nothing of Ray Data is started or imported, and nobody but `give_back_orphaned_room` looks after the
    room of a dead controller.

    Missing: a way to leave them out. No issue found.
    """
    from ray.train.torch import TorchTrainer  # torch, which Ray's controller does without
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list:
            unused = (
                PlacementGroupCleanerCallback
                if self.datasets
                else (PlacementGroupCleanerCallback, DatasetsCallback)
            )
            usual = super()._create_default_callbacks()  # type: ignore[misc]  # mypy sees Ray Train's first version
            return [each for each in usual if not isinstance(each, unused)]

    return Trainer(**arguments)


def node_will_be_taken() -> bool:
    """Whether one of the run's nodes will be taken away, as Ray Train has told this worker.

    Missing: asking it alone. `ray.train.get_preemption_info` is a barrier for all ranks
    (https://github.com/ray-project/ray/pull/65183); the loop agrees on a step to stop at by itself.
    """
    return get_train_context().preemption_context.preemption_info is not None


def health_check_failure(error: Exception) -> Exception | None:
    """What Ray Train has found wrong with a worker, if that is what this error is about.

    Missing: it is in the error's text alone, or in this attribute of an internal class. No issue found.
    """
    return getattr(error, "health_check_failure", None)


def end_at_lost_start() -> ControllerCallback:
    """A callback for Ray Train's trainer that ends a run's controller when a worker is lost while they start: the driver tells
    and counts it, and begins with another.

    Ray Train would start them again without a word and without end, since it does not count that as a failure. Of those that
    were finding each other it would also forget the others, which hold the room of the next until the process group's
    time-out.

    Missing: `FailureConfig(controller_failure_limit=0)` would also give up waiting for room, which is counted with these
    (https://github.com/ray-project/ray/pull/54833); a `UserCallback` hears of neither. The trainer takes internal callbacks,
    too.
    """

    class Starting(ControllerCallback):
        def after_controller_state_update(self, previous_state: object, current_state: object) -> None:
            error = getattr(current_state, "training_failed_error", None)
            failure = getattr(error, "controller_failure", None)
            if isinstance(failure, WorkerGroupStartupFailedError):
                assert failure.__cause__ is not None  # the worker's own error
                raise failure.__cause__

    return Starting()


def exit_quickly() -> ControllerCallback:
    """A callback for Ray Train's trainer that has the process of a run's controller end when the run has.

    Ray clears up its C++ objects on the way out, after it has taken leave of its raylet, and may wait for a lock of its own
    there for ever (https://github.com/ray-project/ray/issues/52322): about one run in ten left a process of 800 MB behind that
    nobody knew of.

    Missing: such a hook of `UserCallback` (https://github.com/ray-project/ray/issues/64252).
    """

    class QuickExit(ControllerCallback):
        def after_controller_start(self, train_run_context: object) -> None:
            atexit.register(os._exit, 0)

    return QuickExit()
