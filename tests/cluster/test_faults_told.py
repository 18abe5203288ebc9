"""What is said about a fault: why a worker was lost, what to change when memory runs out, what is waited for."""

import asyncio
import errno
import os
import subprocess
import sys
import threading
import traceback

import pytest
import torch
import torch.utils.checkpoint
from lerobot.policies.act.modeling_act import ACTPolicy
from ray.exceptions import (
    ActorDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from safetensors import SafetensorError

from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.cli.terminal import Display
from ray_jobs.cluster import channel as channel_module
from ray_jobs.cluster import driver, faults
from ray_jobs.cluster.driver import waiting_for
from ray_jobs.cluster.faults import in_plain_words
from ray_jobs.cluster.resources import Resources
from ray_jobs.config.errors import InputError, RunError, StorageLost
from ray_jobs.config.events import Fault, Notice, Start, Step
from ray_jobs.storage import retry
from ray_jobs.training import checkpoint, loop
from support.commands import ROOT, tiny_act


@pytest.mark.parametrize(
    ("error", "same"),
    [
        (TypeError("no operand for <A at 0x7f01>"), TypeError("no operand for <A at 0x7f02>")),
        (KeyError("next.reward"), KeyError("next.reward")),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_an_exception_of_the_trainings_own_code_is_told_in_the_same_words(error, same):
    assert faults.ordinary(error) == faults.ordinary(same or error) and "0x7" not in faults.ordinary(error)
    assert "a worker failed (rank 1: " in faults.describe({1: error})


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:539] Connection closed by peer [127.0.0.1]:4242"),
        RuntimeError("NCCL error: remote process exited or there was a network error"),
        RuntimeError("DistNetworkError: Broken pipe"),
        faults.Preempted(),
        RayActorError(error_msg="the actor died"),
        WorkerCrashedError(),
        OutOfMemoryError("killed"),
    ],
)
def test_what_a_loss_has_done_is_no_exception_of_the_training(error):
    assert faults.ordinary(error) is None
    assert "a worker was lost (rank 1: " in faults.describe({1: error})


def test_an_exception_may_come_once_at_every_step():
    channel = channel_module.Channel()

    def came(*error) -> bool:
        return asyncio.run(channel.came_before(0, error))

    assert not came(3, "KeyError: 'a'") and not came(4, "KeyError: 'a'") and not came(4, "KeyError: 'b'")
    assert came(4, "KeyError: 'b'")


@pytest.mark.parametrize(
    ("workers", "gpus", "free", "told"),
    [
        (1, 0, None, "still waiting: a worker with 2 CPUs, 0 GPUs is starting (imports, data, models)"),
        (
            2,
            1,
            None,
            "still waiting: 2 workers with 2 CPUs, 1 GPUs each are starting (imports, data, models)",
        ),
        (
            1,
            0,
            {},
            "for room for a worker with 2 CPUs, 0 GPUs: the cluster has 0 CPUs, 0 GPUs that nobody uses",
        ),
        (
            2,
            1,
            {"CPU": 4.0, "GPU": 1.0, "memory": 9e9},
            "the cluster has 4 CPUs, 1 GPUs that nobody uses now",
        ),
    ],
)
def test_what_is_waited_for_is_said_in_words(workers, gpus, free, told):
    assert told in waiting_for(workers, Resources(2, gpus), free)


def test_why_a_worker_was_lost():
    def lost(text: str, **more) -> Exception:
        return WorkerHealthCheckFailedError("failed", RayActorError(error_msg=text, **more))

    reset = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:1")
    for errors, told in (
        ({0: reset, 1: ActorDiedError()}, "rank 1: its process was killed"),
        ({0: reset, 1: lost("killed due to memory pressure (OOM)")}, "rank 1: its node ran out of memory"),
        ({0: lost("The actor died because its node has died.")}, "its node is gone"),
        ({0: reset, 1: faults.Preempted()}, "rank 1: its node is being taken away, as was announced"),
        ({0: reset, 1: ValueError("no such thing")}, "rank 1: ValueError: no such thing"),
        ({0: reset}, "rank 0: it has lost its connection to another one, RuntimeError"),
        ({0: RuntimeError("Gloo connectFullMesh failed with Connection refused")}, "NCCL_SOCKET_IFNAME"),
    ):
        assert told in faults.describe(errors)


def test_what_is_a_loss_while_workers_start():
    """A worker killed, as Ray says it; torch's store gone with rank 0, as torch says it; not a network without a way."""
    serve = (
        "import time\nfrom torch.distributed import TCPStore\n"
        "store = TCPStore('127.0.0.1', 0, 2, True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\ntime.sleep(60)"
    )
    rank0 = subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True)
    port = int(rank0.stdout.readline())
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, False, wait_for_workers=False)
    threading.Timer(0.5, rank0.kill).start()
    errors = []
    for ask in (lambda: store.get("who"), lambda: [store.set("who", "rank 1") for _ in range(9)]):
        with pytest.raises(torch.distributed.DistNetworkError) as caught:
            ask()
        story = "".join(traceback.format_exception(caught.value))  # as Ray brings it from a worker
        errors.append(RayTaskError("execute", story, caught.value).as_instanceof_cause())
    rank0.wait()
    for error in (*errors, ActorDiedError(), OutOfMemoryError("")):
        assert faults.of_a_loss(error), error
    refused = RuntimeError("Gloo connectFullMesh failed with Connection refused")
    assert not faults.of_a_loss(refused) and not faults.of_a_loss(ValueError("no"))


def test_restarts_are_told(capsys):
    """Why, from where, with how many, and what it has cost."""
    display = Display()
    start = {"policy": "act", "learnable_parameters": 1, "parameters": 1, "device": "cpu", "precision": "no"}
    start |= {"dataset": "d", "episodes": 1, "frames": 1, "eval_episodes": 0, "batch_size": 4, "steps": 9}
    start |= {
        "grad_accumulation": 1,
        "global_batch_size": 8,
        "num_workers": 2,
        "epochs": 1.0,
    }
    display.show(Start(0, {**start, "start_step": 0, "lost_steps": 0}))
    display.show(Fault("a worker was lost (rank 1: its node is gone)"))
    early = "a worker was lost while they started (its process was killed)"
    display.show(Fault(early, starting=True))
    display.show(Start(4, {**start, "start_step": 4, "lost_steps": 3, "num_workers": 1}))
    told = capsys.readouterr().out
    assert f"{early}\n" in told
    assert (
        "a worker was lost (rank 1: its node is gone); the run goes on from step 4 with 1 worker(s); "
        "3 step(s) are done again" in told
    )


def test_out_of_gpu_memory(parts, tmp_path, monkeypatch):
    """torch's own error, raised where it would be: the estimate and the flags that make it less, no second try."""

    def exhausted(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(ACTPolicy, "forward", exhausted)
    recipe = resolve(tiny_act(parts, tmp_path / "run", "--ray.num_workers=0"))
    recipe = preflight.check(recipe)
    with pytest.raises(RunError) as failed, in_plain_words(recipe):
        loop.train(recipe, device="cpu")
    message = str(failed.value)
    assert "out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB." in message
    assert "--batch_size=2 --ray.grad_accumulation=2" in message and "GB per worker" in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/disk/weights"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/disk/weights"),
        SafetensorError("I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_full_disks_and_quotas(parts, tmp_path, error):
    recipe = resolve(tiny_act(parts, tmp_path / "run"))
    with (
        pytest.raises(StorageLost, match="no space is left for /.* is intact: make room"),
        in_plain_words(recipe),
    ):
        raise error


def test_storage_that_fails(parts, tmp_path, monkeypatch):
    """The kernel's error of a mount whose server is away, raised where it would be: for a while, it costs a line; for ever,
    the run, but not the last checkpoint."""
    real, away_at = os.fsync, set()
    flags = tiny_act(parts, tmp_path / "run", "--steps=6", "--save_freq=2", "--ray.num_workers=0")
    events: list[dict] = []

    def fsync(descriptor: int) -> None:
        if step() in away_at and "/checkpoints/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            if len(away_at) == 1:
                away_at.clear()
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    def step() -> int:
        return next((event.step for event in reversed(events) if isinstance(event, Step)), 0)

    class Clock:
        """As good as only the waits take time: how long storage was away does not depend on this machine."""

        now = 0.0

        def monotonic(self) -> float:
            self.now += 0.001
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    monkeypatch.setattr(retry, "time", Clock())
    monkeypatch.setattr(os, "fsync", fsync)
    away_at.add(2)
    recipe = resolve(flags)
    recipe = preflight.check(recipe)
    assert loop.train(recipe, device="cpu", report=events.append)["status"] == "finished"
    told = [event.text for event in events if isinstance(event, Notice)]
    assert any("checkpoint of step 2 cannot be written, trying again: OSError: [Errno 5]" in t for t in told)
    assert any("the checkpoint of step 2 is written: storage is back after 1 s" in t for t in told)
    assert checkpoint.fault(tmp_path / "run/checkpoints/000002") is None

    monkeypatch.setattr(retry, "PATIENCE_S", 0.5)
    away_at |= {8, 10}
    recipe = resolve([*flags, "--resume=true", "--steps=12"])
    with pytest.raises(
        RunError, match="checkpoint of step 8 could not be written for 0.5 s: OSError"
    ) as failed:
        loop.train(recipe, device="cpu", report=events.append)
    assert len(str(failed.value).splitlines()) == 2
    assert checkpoint.last_checkpoint(tmp_path / "run").name == "000006"
    assert not list((tmp_path / "run/checkpoints").glob(".0*"))


@pytest.mark.slow
def test_out_of_main_memory(parts, tmp_path):
    """The real thing: a process that may have 8 GB of addresses and asks for more."""
    flags = tiny_act(parts, tmp_path / "run", "--ray.num_workers=0", "--batch_size=20000", "--num_workers=0")
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2); import runpy, sys; sys.argv = {['train', *flags]!r}; runpy.run_module('ray_jobs.train', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1, result.stderr[-2000:]
    assert result.stderr.startswith("failed: out of memory") and "--batch_size=10000" in result.stderr
    assert "Traceback" not in result.stderr


STARVED = OutOfMemoryError("Task was killed due to the node running low on memory.")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ActorDiedError(), "its process was killed"),
        (WorkerCrashedError(), "its process was killed"),
        (STARVED, "its node ran out of memory"),
    ],
)
def test_a_command_that_loses_its_helper(error, told):
    with pytest.raises(RunError, match=f"the run's helper, or its cluster, is gone: {told}.*\nAll is kept."):
        with faults.if_helper_dies("the run's helper", "All is kept."):
            raise error


def test_what_a_helper_raises_is_no_loss():
    for cause, raised in ((InputError("no such file"), InputError), (KeyError("kind"), RayTaskError)):
        error = RayTaskError("timed", "Traceback ...", cause).as_instanceof_cause()
        with pytest.raises(raised) as caught, faults.if_helper_dies("the run's helper", "All is kept."):
            raise error
        assert (str(caught.value) == "no such file") == (raised is InputError)


@pytest.mark.parametrize(
    ("error", "told", "logged"),
    [
        (
            WorkerGroupError("", {1: STARVED}),
            "a worker was lost (rank 1: its node ran out of",
            "OutOfMemoryError",
        ),
        (
            ControllerError(STARVED),
            "a worker was lost (its node ran out of memory",
            "ControllerError",
        ),  # at its start
        (
            ControllerError(ValueError("no")),
            "the run's controller has failed (ValueError: no)",
            "ControllerError",
        ),
        (
            ControllerError(ActorDiedError()),
            "a worker was lost (its process was killed)",
            "ControllerError",
        ),  # before the training had begun
        (ActorDiedError(), "the run's controller has failed (its process was killed)", "ActorDiedError"),
    ],
)
def test_why_a_run_was_given_up(parts, tmp_path, error, told, logged):
    recipe = resolve(tiny_act(parts, tmp_path / "run"))
    assert driver._explain(error, recipe).startswith(told)
    assert logged in (tmp_path / "run/error.log").read_text()
