"""What a run survives: killed workers, a killed driver, Ctrl-C.

Every run here is a real `python -m ray_jobs.train` on Ray; processes are killed with real signals. Killed runs
must end with the very bytes of the undisturbed one.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from ray_jobs import train, tune
from ray_jobs.cli.signals import ONE_S
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.training import checkpoint
from support.commands import PATIENCE, ROOT, job, tiny_act
from support.machine import free_port
from support.processes import Run, alive

STEPS = ("--steps=40", "--save_freq=10")
WEIGHTS = "checkpoints/000040/pretrained_model/model.safetensors"
OPTIMIZER = "checkpoints/000040/training_state/optimizer_state.safetensors"


@pytest.fixture(scope="module")
def undisturbed(parts, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    result = job("ray_jobs.train", *tiny_act(parts, output_dir, *STEPS))
    assert result.returncode == 0, result.stderr
    return output_dir


def assert_same_end(output_dir: Path, undisturbed: Path) -> None:
    for file in (WEIGHTS, OPTIMIZER):
        assert (output_dir / file).read_bytes() == (undisturbed / file).read_bytes(), file
    steps = [json.loads(line)["step"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


def test_killed_worker_is_replaced(parts, undisturbed, tmp_path):
    """SIGKILL to the worker at a random step: the run finishes by itself, bit for bit the same."""
    run = Run(tiny_act(parts, tmp_path / "run", *STEPS))
    run.wait_for(f"step {random.randint(1, 38)}/40")
    for worker in run.workers():
        worker.kill()
    assert run.end() == 0, run.printed
    assert "a worker was lost" in run.printed and "(raylet)" not in run.printed
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_killed_controller_is_replaced(parts, undisturbed, tmp_path):
    """Ray Train's own process, which takes its workers along."""
    run = Run(tiny_act(parts, tmp_path / "run", *STEPS))
    run.wait_for(f"step {random.randint(1, 38)}/40")
    (controller,) = (p for p in run.family() if "TrainController" in " ".join(p.cmdline()))
    controller.kill()
    assert run.end() == 0, run.printed
    assert (
        "the run's controller was lost (its process was killed); the run goes on from step" in run.printed
    ), run.printed
    assert_same_end(tmp_path / "run", undisturbed)


def test_killed_run_resumes(parts, tmp_path):
    """SIGKILL to a training in one process; the same command with --resume=true goes on, bit for bit the same."""
    undisturbed, flags = (
        tiny_act(parts, tmp_path / name, *STEPS, "--ray.num_workers=0") for name in ("undisturbed", "run")
    )
    run = Run(flags)
    run.wait_for(f"step {random.randint(1, 38)}/40")
    run.process.kill()
    for command in (undisturbed, [*flags, "--resume=true"]):
        result = job("ray_jobs.train", *command)
        assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.slow
def test_killed_driver_resumes(parts, undisturbed, tmp_path):
    """SIGKILL to the driver takes its workers along; the same command with --resume=true goes on."""
    flags = tiny_act(parts, tmp_path / "run", *STEPS)
    run = Run(flags)
    run.wait_for(f"step {random.randint(1, 38)}/40")
    family = run.family()
    run.process.kill()
    result = job("ray_jobs.train", *flags, "--resume=true")
    assert result.returncode == 0, result.stderr
    # Ray's own dashboard agents notice a little later.
    assert not [p for p in alive(family) if "Agent" not in p.name()]
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_failures_are_counted_between_checkpoints(parts, undisturbed, tmp_path):
    """`--ray.max_failures=1`: three losses are survived with checkpoints in between, two without one are not."""
    run = Run(tiny_act(parts, tmp_path / "run", *STEPS, "--ray.max_failures=1"))
    for step in (12, 22, 32):
        run.wait_for(f"step {step}/40")
        for worker in run.workers():
            worker.kill()
    assert run.end() == 0, run.printed
    assert_same_end(tmp_path / "run", undisturbed)

    run = Run(tiny_act(parts, tmp_path / "again", "--steps=40", "--save_freq=10", "--ray.max_failures=1"))
    run.wait_for("step 11/40")
    for _ in range(2):
        run.wait_for("step 15/40")
        for worker in run.workers():
            worker.kill()
    assert run.end() == 1 and "its process was killed), and that for good" in run.printed, run.printed


@pytest.mark.parametrize(
    ("sent", "workers"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        (signal.SIGINT, 2),
    ],
)
def test_ctrl_c_leaves_a_checkpoint(parts, tmp_path, sent, workers):
    """Ctrl-C, or the SIGTERM of `ray job stop` and process managers, stops within seconds with a usable checkpoint and no
    process left, and says how to go on. It comes twice: `uv run` hands on what the process group has got."""
    output_dir = tmp_path / "run"
    flags = tiny_act(parts, output_dir, "--steps=5000", "--save_freq=5000", f"--ray.num_workers={workers}")
    run = Run(flags)
    run.wait_for("step 12/5000")
    family = run.family()
    begin = time.monotonic()
    send = os.killpg if sent == signal.SIGINT else os.kill  # a terminal sends it to all of them
    send(run.process.pid, sent)
    time.sleep(0.2)
    run.process.send_signal(sent)
    run.process.wait(60 * PATIENCE)
    assert time.monotonic() - begin < 15
    assert run.end() == 130, run.printed
    saved = checkpoint.last_checkpoint(output_dir)
    assert saved is not None and int(saved.name) >= 12 and checkpoint.fault(saved) is None
    assert f"--config_path={saved}" in run.printed and "--resume=true" in run.printed
    assert "Traceback" not in run.printed
    time.sleep(1)
    assert not alive(family)


@pytest.mark.slow
def test_two_runs_never_share_a_folder(parts, tmp_path):
    """A second run in the folder of a living one is refused at once, not mixed in; the first one notices nothing."""
    folder = tmp_path / "run"
    flags = tiny_act(parts, folder, "--steps=5000", "--save_freq=5")
    run = Run(flags)
    run.wait_for("step 6/5000")
    options = (folder / "options.json").read_text()
    config = checkpoint.last_checkpoint(folder) / "pretrained_model/train_config.json"
    for other in (
        [*flags, "--resume=true", "--checkpoint.keep_last=1"],
        [*flags, "--resume=true", "--ray.num_workers=0"],
        [f"--config_path={config}", "--resume=true"],
    ):
        begin = time.monotonic()
        result = job("ray_jobs.train", *other)
        assert result.returncode == 1
        assert result.stderr == f"failed: another run is writing into {folder}.\n", result.stderr
        assert time.monotonic() - begin < 10, "2 s on a machine that does nothing else; LeRobot alone is 10 s"
    assert (folder / "options.json").read_text() == options
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 130


def test_a_busy_folder_is_found_before_anything_else(tmp_path):
    """By training and search alike, with nothing imported or written; a driver that was killed holds nothing."""
    folder = tmp_path / "run"
    hold = "import sys, time, pathlib; from ray_jobs.cluster.run_folder import only_driver\n"
    hold += "with only_driver(pathlib.Path(sys.argv[1])): print('here', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", hold, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as holder:
        try:
            assert holder.stdout.readline() == "here\n"
            for main in (train.main, tune.main):
                for more in ([], ["--resume=true"]):
                    with pytest.raises(RunError, match=f"^another run is writing into {folder}.$"):
                        main([f"--output_dir={folder}", *more])
        finally:
            holder.kill()
    for main in (train.main, tune.main):
        with pytest.raises(InputError):  # there is nothing to train on
            main([f"--output_dir={folder}", "--ray.num_workers=0"])
    assert {path.name for path in folder.iterdir()} == {".driver"}


@pytest.mark.slow
def test_failure_on_a_worker_is_told_once(parts, tmp_path):
    """A loss that explodes on a Ray worker: one error with the step, no restart, status 1."""
    flags = tiny_act(parts, tmp_path / "run", "--steps=30", "--policy.optimizer_lr=1e30", "--save_freq=100")
    result = job("ray_jobs.train", *flags)
    assert result.returncode == 1
    assert result.stderr.startswith("failed: step ") and "the loss is" in result.stderr
    assert "a worker was lost" not in result.stdout and "Traceback" not in result.stderr


@pytest.mark.slow
def test_relative_paths_reach_the_workers(parts, undisturbed, tmp_path):
    """Workers run in folders of their own: a relative --policy.path means the user's folder."""
    start = os.path.relpath(undisturbed / "checkpoints/000010/pretrained_model", ROOT)
    flags = [f for f in tiny_act(parts, tmp_path / "run", "--steps=2") if not f.startswith("--policy.")]
    result = job("ray_jobs.train", *flags, f"--policy.path={start}", "--policy.push_to_hub=false")
    assert result.returncode == 0, result.stderr
    assert "step 2/2" in result.stdout


def test_more_workers_than_there_is_room_for(parts, tmp_path):
    """Refused with what the cluster has, before a worker is started. It is one of its own: of the one that `ray start` has
    started, only the note is still there."""
    # Short: for the names of Ray's sockets.
    with TemporaryDirectory(prefix="rj", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        note = Path(scratch, "ray/ray_current_cluster")
        note.parent.mkdir()
        note.write_text(f"127.0.0.1:{free_port()}")
        flags = tiny_act(parts, tmp_path / "run", "--ray.num_workers=999")
        result = job("ray_jobs.train", *flags, timeout=120, RAY_TMPDIR=scratch)
    assert result.returncode == 2
    assert (
        result.stderr.startswith("error: --ray.num_workers=999")
        and "this cluster has room for" in result.stderr
    )
    assert not (tmp_path / "run").exists()


def run_program(program: str) -> subprocess.CompletedProcess:
    how = {"capture_output": True, "text": True, "timeout": 100, "cwd": ROOT}
    return subprocess.run([sys.executable, "-c", program], **how)


def test_sigterm_beside_ray():
    """Its handler would print its stack and abort the process 3 s later, in the middle of what is saved."""
    program = """
import os, signal, time
from ray_jobs.cluster import connect
from ray_jobs.cluster.job import run_job

def main(argv):
    connect.start("local").result()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(4)
        print("saved")
        raise

run_job(main, at_end=connect.leave)
"""
    result = run_program(program)
    assert (result.returncode, result.stdout, result.stderr) == (130, "saved\n", "interrupted.\n")


def test_ctrl_c_while_ray_and_this_process_import():
    """Ctrl-C while an import waits for the lock that another thread has. Raised there, Python would leave the lock taken,
    and that thread, which is about to start Ray, would hang with the whole job."""
    program = """
import _imp, os, signal, threading, time
from ray_jobs.cluster.job import run_job

held, imported = threading.Event(), threading.Event()

def another():
    _imp.acquire_lock()
    held.set()
    time.sleep(0.5)  # the main thread waits by now
    os.kill(os.getpid(), signal.SIGINT)
    _imp.release_lock()
    time.sleep(0.5)
    import tabnanny
    imported.set()

def main(argv):
    threading.Thread(target=another, daemon=True).start()
    held.wait()
    import wave
    time.sleep(60)

run_job(main, at_end=lambda: print(imported.wait(10)))
"""
    result = run_program(program)
    assert (result.returncode, result.stdout, result.stderr) == (130, "True\n", "interrupted.\n")


def test_ctrl_c_again_while_ray_starts(parts, tmp_path):
    """Who does not wait for the end, either, gets the shell back at once: no traceback, no process of Ray stays."""
    run = Run(tiny_act(parts, tmp_path / "run", "--steps=2"))
    give_up, started = time.monotonic() + 60, False
    while not started:
        assert time.monotonic() < give_up, run.printed
        time.sleep(0.05)
        with contextlib.suppress(psutil.NoSuchProcess):
            started = any("raylet" in " ".join(p.cmdline()) for p in run.family())
    run.process.send_signal(signal.SIGINT)
    time.sleep(ONE_S + 0.5)
    run.process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    run.process.wait(60 * PATIENCE)
    assert time.monotonic() - begin < 10
    assert run.end() == 130 and run.printed.endswith("interrupted.\n"), run.printed
    assert "Traceback" not in run.printed


def test_a_ray_that_does_not_come_up_holds_nobody_up():
    """As after `timeout` or a batch system has ended parts of it: Ray waits for them a minute, and then for others."""
    program = """
from concurrent.futures import Future
from ray_jobs.cluster import connect
from ray_jobs.cluster.job import run_job
from ray_jobs.config.errors import InputError

def main(argv):
    connect._ready = Future()
    raise InputError("wrong")

run_job(main, at_end=connect.leave)
"""
    begin = time.monotonic()
    result = run_program(program)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: wrong\n")
    assert time.monotonic() - begin < 20 * PATIENCE


def test_ctrl_c_twice_within_a_moment_is_one():
    """As `uv run` hands it on, though Python hears of the second one late, after a computation; not later ones."""
    program = """
import hashlib, os, signal, threading, time
from ray_jobs.cli.signals import ONE_S, on_interruption

heard = []
on_interruption(lambda *_: heard.append(1))
interrupted = lambda: os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.2, interrupted).start()
interrupted()
begin = time.monotonic()
while time.monotonic() - begin < 0.6:
    hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000)  # holds signals up for some 0.2 s
time.sleep(ONE_S)
print(len(heard))
interrupted()
print(len(heard))
"""
    result = run_program(program)
    assert (result.returncode, result.stdout, result.stderr) == (0, "1\n2\n", "")


def test_ctrl_c_that_fails_an_import(tmp_path):
    """In a terminal it reaches the processes that an import has started, too: no traceback of what they fail with."""
    (tmp_path / "starts_processes.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise OSError('a process was interrupted')\n"
    )
    program = f"""
import sys
from ray_jobs.cluster.job import run_job

def main(argv):
    sys.path.insert(0, {str(tmp_path)!r})
    import starts_processes

run_job(main, at_end=lambda: None)
"""
    result = run_program(program)
    assert (result.returncode, result.stderr) == (130, "interrupted.\n")


@pytest.mark.slow  # the kills themselves: `test_killed_worker_is_replaced`, `test_killed_run_resumes`
@pytest.mark.parametrize("soak", [("train", 1, 2, 150), ("train", 2, 5, 150), ("tune", 1, 5, 150)])
def test_short_soak(soak):
    """A few kills at random; the long version is run by hand (see `soak.py`)."""
    what, workers, kills, steps = soak
    words = [f"--what={what}", f"--workers={workers}", f"--kills={kills}", f"--steps={steps}"]
    result = subprocess.run(
        [sys.executable, "tests/end_to_end/soak.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    print(result.stdout)
