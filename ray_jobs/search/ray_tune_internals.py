"""All of Ray Tune that is used here and is not public: what for, and which public way is missing (see `cluster.ray_internals`)."""

from pathlib import Path
from typing import TYPE_CHECKING

from ray import cloudpickle
from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution import class_cache
from ray.tune.execution import tune_controller as ray_controller
from ray.tune.experiment import Trial

if TYPE_CHECKING:
    from ray.air.execution._internal import TrackedActor
    from ray.air.execution._internal.tracked_actor_task import TrackedActorTask


def survive_memory_kills() -> None:
    """Let Ray Tune take a trial whose process Ray has ended for want of memory for one whose process was killed. Ray Tune ends
    the search instead, since `OutOfMemoryError` is no `RayActorError`.

    Missing: anything that reaches what looks after Ray Tune's actors. No issue found.
    """

    def as_killed(error: Exception) -> Exception:
        return RayActorError(error_msg=str(error)) if isinstance(error, OutOfMemoryError) else error

    class Manager(RayActorManager):
        def _actor_start_failed(self, tracked_actor: "TrackedActor", exception: Exception) -> None:
            super()._actor_start_failed(tracked_actor, as_killed(exception))

        def _actor_task_failed(self, tracked_actor_task: "TrackedActorTask", exception: Exception) -> None:
            super()._actor_task_failed(tracked_actor_task, as_killed(exception))

    ray_controller.RayActorManager = Manager  # type: ignore[misc]  # this is what it is about


def keep_keys_out_of_logs() -> None:
    """Keep Ray Tune from copying four keys of AWS from the driver into its actors' runtime environment, which Ray writes into
    its logs. Keys are every node's own.

    Missing: a way to say what is copied, or a runtime environment whose values are not logged
    (https://github.com/ray-project/ray/issues/28276).
    """
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if "AWS" in name}


def error_of(trial: Trial) -> Exception:
    """The last error of one of Ray Tune's trials.

    Missing: `Trial.get_pickled_error` reads a copy that lags behind; the file is here. No issue found.

    Raises:
        Exception: It has none, or one that cannot be read.
    """
    return cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())


def drop(tune_controller: ray_controller.TuneController, trial: Trial, result: dict) -> None:
    """End one of Ray Tune's trials that has not begun, with this result: of an empty one Ray Tune prints a line.

    Missing: a scheduler can stop a trial that reports, not one that waits. No issue found.
    """
    trial.run_metadata.last_result = result
    tune_controller.stop_trial(trial)


def allow_failures(trial: Trial, more: int) -> None:
    """Let one of Ray Tune's trials go on after so many failures from now on.

    Missing: `FailureConfig(max_failures=...)` counts from the beginning, for all trials alike. No issue found.
    """
    trial.max_failures = trial.num_failures + more
