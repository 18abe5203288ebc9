"""Canaries: what is private of Ray and used here is still there, and there is still no public way.

When one fails at another version of Ray, its workaround has to be mended, or may go: `ray_jobs/cluster/ray_internals.py` tells of
each what was missing.
"""

import dataclasses
import importlib
import inspect
import io
import re
import socket
import time
from pathlib import Path

import grpc
import pytest
import ray
import ray.train
import ray.tune
import ray.util
from ray import cloudpickle
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private import ray_constants, services, worker
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._raylet import GcsClient
from ray.air.execution._internal import RayActorManager
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError
from ray.train.v2._internal import exceptions as train_errors
from ray.train.v2._internal.execution import preemption
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainContext
from ray.train.v2._internal.execution.controller import state as controller_states
from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS
from ray.tune.execution import class_cache, tune_controller
from ray.tune.experiment import Trial
from ray.util.placement_group import placement_group, placement_group_table

from ray_jobs import tune
from ray_jobs.cluster import connect, ray_internals, ray_train_internals, resources
from ray_jobs.search import ray_tune_internals
from support.commands import PATIENCE

RAY = Path(ray.__file__).parent


def public_arguments(function) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name[0] != "_" and name != "kwargs"}


def test_ray_init_has_no_new_argument():
    """One might be a time limit for joining, or hold a Ray that is started to this machine, or silence the raylet."""
    assert public_arguments(ray.init) == {
        *("address", "num_cpus", "num_gpus", "resources", "labels", "object_store_memory", "local_mode"),
        *("ignore_reinit_error", "include_dashboard", "dashboard_host", "dashboard_port", "job_config"),
        *("configure_logging", "logging_level", "logging_format", "logging_config", "log_to_driver"),
        *("namespace", "runtime_env", "enable_resource_isolation", "system_reserved_cpu"),
        *("system_reserved_memory", "cgroup_path", "proxy_server_url"),
    }


def test_names_are_rays():
    assert ray_internals.HEAD_NODE == HEAD_NODE_RESOURCE_NAME
    assert ray_internals.SUBMITTED == RAY_JOB_CONFIG_JSON_ENV_VAR
    assert f'"{resources.BOOTSTRAP}"' in (RAY / "tune/execution/cluster_info.py").read_text()


@pytest.mark.parametrize("module", [connect, tune])
def test_settings_are_still_read(module):
    """Ray takes no notice of a variable that it does not know."""
    names = set(re.findall(r'"((?:RAY|TUNE)_\w+)"', Path(module.__file__).read_text())) - {"RAY_JOBS_DEBUG"}
    python = [
        p for part in ("_private", "_common", "train", "tune", "air") for p in (RAY / part).rglob("*.py")
    ]
    known = "\n".join(file.read_text() for file in python)
    of_cpp = {name for name in names if not name.isupper()}
    assert {name for name in names - of_cpp if name not in known} == set()
    library = (RAY / "_raylet.so").read_bytes()
    assert {n for n in of_cpp if b"\0" + n.removeprefix("RAY_").encode() + b"\0" not in library} == set()


# ---------------------------------------------------------------------- starting and joining


def test_address_to_join():
    assert ray_internals.address_to_join("10.1.2.3:6379") == "10.1.2.3:6379"
    assert ray_internals.address_to_join("local") is None


@pytest.mark.parametrize(("listens", "code"), [(False, "UNAVAILABLE"), (True, "DEADLINE_EXCEEDED")])
def test_who_does_not_answer_is_no_cluster(listens, code):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        begin = time.monotonic()
        with pytest.raises(grpc.RpcError) as told:
            ray_internals.ask_whether_alive(f"127.0.0.1:{server.getsockname()[1]}", 2)
    assert told.value.code().name == code and time.monotonic() - begin < 30 * PATIENCE


def test_loopback_is_not_the_usual(monkeypatch):
    monkeypatch.setattr(worker, "_global_node", None)
    assert ray_constants.ENABLE_RAY_CLUSTER  # else it is, and nothing has to be done for it
    with ray_internals.loopback_only():
        assert not ray_constants.ENABLE_RAY_CLUSTER
        assert services.get_node_ip_address() in ("127.0.0.1", "::1")
    assert ray_constants.ENABLE_RAY_CLUSTER


def test_raylet_can_be_silenced(monkeypatch):
    monkeypatch.setattr(worker, "_worker_logs_enabled", True)
    line = {"pid": "raylet", "ip": "", "lines": ["a worker died"], "is_err": True, "job": None}
    before, after = io.StringIO(), io.StringIO()
    worker.print_worker_logs(line, before)
    ray_internals.silence_raylet()
    worker.print_worker_logs(line, after)
    assert "a worker died" in before.getvalue() and after.getvalue() == ""


# ---------------------------------------------------------------------- what the cluster knows


@pytest.fixture(scope="module")
def started() -> None:
    connect.start("local").result()


def test_nodes_that_drain_are_told_nowhere_else(started):
    from ray.util.state.common import NodeState

    assert ray_internals.draining_nodes() == set()
    (node,) = ray.nodes()
    columns = {field.name for field in dataclasses.fields(NodeState)}
    assert [key for key in (*node, *columns) if "drain" in key.lower() or "preempt" in key.lower()] == []


def test_groups_of_an_autoscaler(started):
    assert ray_internals.node_groups() is None
    told = ClusterConfig()
    told.node_group_configs.add(name="gpus", resources={"CPU": 8, "GPU": 1}, max_count=-1)
    GcsClient(address=ray.get_runtime_context().gcs_address).report_cluster_config(told.SerializeToString())
    assert ray_internals.node_groups() == [("gpus", {"CPU": 8, "GPU": 1}, -1)]
    sdk = importlib.import_module("ray.autoscaler.sdk")
    assert set(sdk.__all__) == {
        *("create_or_update_cluster", "teardown_cluster", "run_on_cluster", "rsync", "get_head_node_ip"),
        *("get_worker_node_ips", "request_resources", "configure_logging", "bootstrap_config"),
        *("fillout_defaults", "register_callback_handler", "get_docker_host_mount_location"),
    }


def test_room_of_a_dead_actor_is_kept(started):
    """As it is with a run's controller."""

    @ray.remote(num_cpus=0)
    class Controller:
        def reserve(self) -> None:
            self.group = placement_group([{"CPU": 1}])
            ray.get(self.group.ready())

    def states() -> list[str]:
        return [row["state"] for row in placement_group_table().values()]

    assert not ray_internals.has_room()
    controller = Controller.remote()
    ray.get(controller.reserve.remote())
    assert ray_internals.has_room()
    ray_internals.give_back_orphaned_room()
    assert states() == ["CREATED"]  # it is none yet
    ray.kill(controller)
    give_up = time.monotonic() + 60 * PATIENCE
    while ray_internals.has_room():
        assert time.monotonic() < give_up
        time.sleep(0.2)
    time.sleep(2)
    assert states() == ["CREATED"]
    ray_internals.give_back_orphaned_room()
    assert states() == ["REMOVED"]
    (row,) = placement_group_table().values()
    assert [key for key in row if "creator" in key] == []


# ---------------------------------------------------------------------- Ray Train


def test_preemption_is_asked_by_all_or_none():
    assert "preemption_context" in {field.name for field in dataclasses.fields(TrainContext)}
    assert preemption.PreemptionContext().preemption_info is None
    assert "All workers must call" in ray.train.get_preemption_info.__doc__


def test_health_check_failures_are_internal():
    failure = ValueError("broken")
    error = train_errors.WorkerHealthCheckFailedError("it failed", failure)
    assert ray_train_internals.health_check_failure(error) is failure
    assert ray_train_internals.health_check_failure(failure) is None
    assert not hasattr(ray.train, "WorkerHealthCheckFailedError")


def test_internal_callbacks_are_taken_and_public_ones_do_not_hear():
    for callback in (ray_train_internals.end_at_lost_start(), ray_train_internals.exit_quickly()):
        copied = cloudpickle.loads(cloudpickle.dumps(callback))  # as on its way to the controller
        assert isinstance(copied, ControllerCallback)
        assert {name for name in vars(type(copied)) if name[0] != "_"} <= set(vars(ControllerCallback))
    assert (
        "isinstance(c, ControllerCallback)"
        in (RAY / "train/v2/_internal/execution/controller/controller.py").read_text()
    )
    assert {name for name in vars(ray.train.UserCallback) if name[0] != "_"} == {
        "after_report",
        "after_exception",
    }


def test_lost_start_is_started_again_as_waiting_for_room_is():
    """So there is one limit for both, and none of them is a `max_failures`."""
    assert set(RETRYABLE_CONTROLLER_ERRORS) == {
        train_errors.WorkerGroupStartupFailedError,
        train_errors.WorkerGroupStartupTimeoutError,
    }
    assert ray.train.FailureConfig().controller_failure_limit == -1
    lost = train_errors.WorkerGroupStartupFailedError("lost")
    lost.__cause__ = ActorDiedError()
    callback = ray_train_internals.end_at_lost_start()
    now = controller_states.ReschedulingState(ray.train.ControllerError(lost))
    with pytest.raises(ActorDiedError):
        callback.after_controller_state_update(controller_states.InitializingState(), now)
    waits = controller_states.ReschedulingState(
        ray.train.ControllerError(train_errors.WorkerGroupStartupTimeoutError(2))
    )
    callback.after_controller_state_update(now, waits)
    callback.after_controller_state_update(waits, controller_states.RunningState())


# ---------------------------------------------------------------------- Ray Tune


def test_memory_kill_is_no_death_of_an_actor(monkeypatch):
    assert not issubclass(OutOfMemoryError, RayActorError)
    heard = []
    monkeypatch.setattr(tune_controller, "RayActorManager", RayActorManager)  # put back at the end
    for name in ("_actor_start_failed", "_actor_task_failed"):
        assert inspect.isfunction(getattr(RayActorManager, name))
        monkeypatch.setattr(RayActorManager, name, lambda self, what, exception: heard.append(exception))
    ray_tune_internals.survive_memory_kills()
    manager = tune_controller.RayActorManager
    assert "RayActorManager(" in inspect.getsource(tune_controller.TuneController.__init__)
    manager._actor_start_failed(object.__new__(manager), None, exception=OutOfMemoryError("low on memory"))
    manager._actor_task_failed(object.__new__(manager), None, exception=OutOfMemoryError("low on memory"))
    assert [(type(error), str(error)) for error in heard] == [(RayActorError, "low on memory")] * 2


def test_keys_would_be_copied(monkeypatch):
    usual = set(class_cache.ENV_VARS_TO_PROPAGATE)
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"} <= usual
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", set(usual))
    ray_tune_internals.keep_keys_out_of_logs()
    left = class_cache.ENV_VARS_TO_PROPAGATE
    assert left < usual and not [name for name in left if "KEY" in name or "TOKEN" in name]


@pytest.fixture
def trial(tmp_path) -> Trial:
    from ray.train._internal.storage import StorageContext

    storage = StorageContext(storage_path=str(tmp_path), experiment_dir_name="search", trial_dir_name="t000")
    trial = Trial("trial", stub=True, storage=storage, max_failures=2, _setup_default_resource=False)
    trial.init_local_path()
    return trial


def test_error_of_a_trial_is_not_yet_where_it_is_read(trial):
    trial.handle_error(RayActorError(error_msg="killed"))
    assert str(ray_tune_internals.error_of(trial)) == "killed"
    assert trial.get_pickled_error() is None


def test_trials_can_be_dropped_and_may_fail_again(trial):
    stopped = []
    assert inspect.isfunction(tune_controller.TuneController.stop_trial)

    class Controller:
        stop_trial = staticmethod(stopped.append)

    ray_tune_internals.drop(Controller, trial, {"status": "interrupted"})
    assert stopped == [trial] and trial.last_result["status"] == "interrupted"
    trial.handle_error(RayActorError(error_msg="killed"))
    assert (trial.num_failures, trial.max_failures) == (1, 2)
    ray_tune_internals.allow_failures(trial, 2)
    assert trial.max_failures == 3
    assert public_arguments(ray.tune.FailureConfig) == {"max_failures", "fail_fast"}


def test_a_trainer_starts_actors_that_nobody_needs():
    """It may be asked to leave them out one day: by an argument, or for having no data sets."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import placement_group_callback

    arguments = {
        "train_loop_per_worker": lambda: None,
        "scaling_config": ray.train.ScalingConfig(num_workers=1),
    }
    theirs = {type(each).__name__ for each in TorchTrainer(**arguments)._create_default_callbacks()}
    ours = {
        type(each).__name__
        for each in ray_train_internals.torch_trainer(**arguments)._create_default_callbacks()
    }
    assert theirs - ours == {"DatasetsCallback", "PlacementGroupCleanerCallback"} and ours < theirs
    # All that the second one is for: `give_back_orphaned_room` does it.
    assert "placement groups are cleaned up" in placement_group_callback.PlacementGroupCleanerCallback.__doc__
    assert public_arguments(TorchTrainer) == {
        *(
            "train_loop_per_worker",
            "train_loop_config",
            "torch_config",
            "scaling_config",
            "run_config",
            "datasets",
        ),
        *("dataset_config", "validation_config", "metadata", "resume_from_checkpoint"),
    }
