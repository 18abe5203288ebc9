"""The same fault for one worker, for two, and for a search: what happens, and how many steps it costs. With `test_faults`,
`test_node_faults` and `test_storage` these make the table of docs/faults.md.

Minutes long, so `-m slow`. `pytest -m slow -rP` shows what was lost.
"""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import psutil
import pytest

from ray_jobs.training import checkpoint
from support.buckets import Bucket
from support.commands import PATIENCE, tiny_act
from support.machine import small_disk
from support.processes import Run
from support.searches import SPACE, space_file

pytestmark = pytest.mark.slow
EVERY = 10  # steps between checkpoints
WORKERS = ("RayTrainWorker", "ImplicitFunc")  # a training's, a search's
FAULTY = "--discover_packages_path=faulty"


class Victim(Run):
    """A training with one worker or two, or a search of two trials one after the other, in a Ray of its own."""

    begun: list["Run"] = []

    def __init__(self, kind: str, root: Path, place: Path | str, folder: Path, *more: str, **env: str):
        self.kind, self.place = kind, place
        flags = tiny_act(root, place, "--steps=60", f"--save_freq={EVERY}", "--ray.address=local")
        flags += ["--ray.cpus_per_worker=1"]
        if kind.startswith("search"):
            flags = [f for f in flags if not f.startswith("--policy.type")]
            flags += [f"--space={space_file(folder, SPACE)}", "--tune.num_samples=2", "--tune.scheduler=none"]
            flags += [f"--eval_steps={EVERY}", "--max_eval_samples=8", "--tune.max_concurrent=1"]
            flags += ["--tune.workers_per_trial=2"] if kind == "search of two" else []
        else:
            flags += [f"--ray.num_workers={2 if kind == 'two' else 1}"]
        self.flags = [*flags, *more]
        super().__init__(
            self.flags, "ray_jobs.tune" if kind.startswith("search") else "ray_jobs.train", **env
        )
        self.begun.append(self)

    def again(self, **env: str) -> Run:
        """The command with which a user goes on."""
        if self.kind.startswith("search"):
            run = Run([f"--output_dir={self.place}", "--resume=true"], "ray_jobs.tune", **env)
        else:
            run = Run([*self.flags, "--resume=true"], **env)
        self.begun.append(run)
        return run

    def runs(self) -> list[Path]:
        """Folders of the trainings that have begun."""
        return sorted(self.place.glob("trials/*")) if self.kind.startswith("search") else [self.place]

    def wait_for_step(self, step: int) -> Path:
        """Returns the run that has come so far first."""
        give_up = time.monotonic() + 180 * PATIENCE
        while time.monotonic() < give_up and self.process.poll() is None:
            for run in self.runs():
                reached = (run / ".progress").read_text().split() if (run / ".progress").exists() else []
                if reached and int(reached[0]) >= step:
                    return run
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached:\n{self.printed}")

    def of(self, *names: str) -> list[psutil.Process]:
        return [p for p in self.family() if any(name in " ".join(p.cmdline()) for name in names)]

    def whole(self) -> list[int]:
        """Steps of all checkpoints that can be seen, each of which must be whole."""
        seen = [c for run in self.runs() for c in checkpoint.checkpoint_steps(run).items()]
        assert [checkpoint.fault(path) for _, path in seen] == [None] * len(seen)
        return [step for step, _ in seen]

    def lost(self) -> int:
        """Steps that were done twice; all that was to be trained was, and each step is written down once."""
        assert "Traceback" not in self.printed and "(raylet)" not in self.printed, self.printed
        if self.kind.startswith("search"):
            with (self.place / "trials.csv").open() as file:
                assert Counter(row["state"] for row in csv.DictReader(file)) == {"COMPLETE": 2}, self.printed
        lost = 0
        for run in self.runs():
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert [r["step"] for r in records if "train/loss" in r] == list(range(1, 61))
            lost += json.loads((run / "summary.json").read_text())["lost_steps"]
        print(f"{self.kind}: {lost} steps lost")
        return lost


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while Victim.begun:
        Victim.begun.pop().kill_all()


@pytest.mark.parametrize("kind", ["one", "two", "search"])
def test_killed_while_saving(parts, tmp_path, kind):
    """SIGKILL in the middle of writing a checkpoint: the one before it is gone back to, no torn one is ever visible."""
    run = Victim(kind, parts, tmp_path / "run", tmp_path)
    training = run.wait_for_step(EVERY + 1)
    give_up = time.monotonic() + 60 * PATIENCE
    workers = run.of(*WORKERS)
    while not (torn := list((training / "checkpoints").glob(".0*.tmp"))):
        assert time.monotonic() < give_up and run.process.poll() is None, "no checkpoint was begun"
        time.sleep(0.0005)
    for worker in workers:
        worker.kill()
    assert not torn[0].with_name(torn[0].name[1:7]).exists(), "the kill came too late to prove anything"
    assert run.whole()
    assert run.end(180) == 0, run.printed
    assert 0 < run.lost() <= EVERY
    assert not [left for made in run.runs() for left in (made / "checkpoints").glob(".*")]


def test_killed_driver_of_two_workers(parts, tmp_path):
    """`test_faults` has it for one, `test_tune` for a search."""
    run = Victim("two", parts, tmp_path / "run", tmp_path)
    run.wait_for_step(random.randint(EVERY + 1, 50))
    run.process.kill()
    run.end()
    again = run.again()
    assert again.end(180) == 0, again.printed
    assert run.lost() <= EVERY


@pytest.mark.parametrize("kind", ["one", "two", "search of two"])
def test_killed_controller(parts, tmp_path, kind):
    """Ray Train's own process, which takes its workers along; of a search's, trials with several workers have one."""
    run = Victim(kind, parts, tmp_path / "run", tmp_path)
    run.wait_for_step(random.randint(EVERY + 1, 50))
    (controller,) = run.of("TrainController")
    controller.kill()
    assert run.end(180) == 0, run.printed
    assert "the run's controller was lost" in run.printed, run.printed
    assert run.lost() <= EVERY


@pytest.mark.parametrize("kind", ["one", "search"])
def test_hung_worker(parts, tmp_path, kind):
    """SIGSTOP to the only worker of a training, and of a trial: which it was is told, and another goes on."""
    run = Victim(kind, parts, tmp_path / "run", tmp_path, "--ray.hang_timeout=10")
    run.wait_for_step(EVERY + 1)
    stopped = run.of(*WORKERS)
    for worker in stopped:
        worker.suspend()
    assert run.end(240) == 0, run.printed
    assert any(f"(process {p.pid}) has stopped answering after step" in run.printed for p in stopped)
    assert run.lost() <= EVERY


@pytest.mark.parametrize(
    ("kind", "fault"), [("one", "stuck"), ("two", "stuck"), ("search", "stuck"), ("one", "checkpointed")]
)
def test_stuck_worker(parts, tmp_path, kind, fault):
    """It answers, but takes no step, as then no other does: the one that they wait for is told, and replaced. So it is within
    gradient checkpointing, for which torch has a file that is called as ours for saving is."""
    stuck = tmp_path / "stuck"
    fault = {"FAULT": fault, "FAULT_FILE": str(stuck)}
    run = Victim(kind, parts, tmp_path / "run", tmp_path, "--ray.hang_timeout=10", FAULTY, **fault)
    run.wait_for_step(EVERY + 1)
    stuck.touch()
    assert run.end(240) == 0, run.printed
    who = {"one": "rank 0", "two": "rank 1", "search": "trial 0000"}[kind]
    where = r"has not come further than step \d+ for 10 s, it is in stuck \(__init__.py"
    assert len(re.findall(rf"{who} on \S+ \(process \d+\) {where}", run.printed)) == 1, run.printed
    assert 0 < run.lost() <= EVERY


@pytest.mark.parametrize("kind", ["one", "two", "search"])
@pytest.mark.parametrize("memory", ["gpu", "main"])
def test_out_of_memory(parts, tmp_path, kind, memory):
    """A run ends at once, of a search the trial, with the estimate and the flags that make it less; the next one is trained."""
    short = tmp_path / "short"
    short.touch()
    run = Victim(kind, parts, tmp_path / "run", tmp_path, FAULTY, FAULT=memory, FAULT_FILE=str(short))
    if kind == "search":
        run.wait_for("trial 0000 failed (out of")
        short.unlink()
    assert run.end(180) == (0 if kind == "search" else 1), run.printed
    told = "out of GPU memory: CUDA out of memory" if memory == "gpu" else "out of memory: "
    assert told in run.printed and "--batch_size=2 --ray.grad_accumulation=2" in run.printed, run.printed
    assert "GB per worker" in run.printed and "Traceback" not in run.printed
    assert "a worker was lost" not in run.printed and run.printed.count(told) == 1
    if kind == "search":
        with (tmp_path / "run/trials.csv").open() as file:
            assert [row["state"] for row in csv.DictReader(file)] == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize("kind", ["one", "two"])
def test_exception_that_comes_again(parts, tmp_path, kind):
    """A mistake in the policy's code is tried once more, and then told for what it is: no lost worker."""
    wrong = tmp_path / "wrong"
    wrong.touch()
    run = Victim(kind, parts, tmp_path / "run", tmp_path, FAULTY, FAULT="wrong", FAULT_FILE=str(wrong))
    assert run.end(240) == 1, run.printed
    told = "TypeError: unsupported operand: <object object at 0x>, twice after step 2: it would come again."
    assert f"failed: {told}" in run.printed, run.printed
    assert "a worker was lost" not in run.printed and "Traceback" not in run.printed
    assert "in wrong\n" in (tmp_path / "run/error.log").read_text()
    assert run.printed.count("effective batch") == 1 and run.printed.count("the run goes on from step") == 1


@pytest.mark.parametrize("kind", ["one", "two", "search"])
@pytest.mark.parametrize("for_ever", [False, True])
def test_mount_away(parts, tmp_path, kind, for_ever):
    """It reports errors: for a while, which costs a line; for ever, which ends the run or the search with its last
    checkpoints intact, and --resume=true goes on from them."""
    away = tmp_path / "away"
    patience = {"PATIENCE": "4"} if for_ever else {}
    run = Victim(
        kind, parts, tmp_path / "run", tmp_path, FAULTY, FAULT="mount", FAULT_FILE=str(away), **patience
    )
    run.wait_for_step(EVERY + 1)
    away.touch()
    if not for_ever:
        run.wait_for("cannot be written, trying again: OSError: [Errno 5]")
        assert run.whole()
        away.unlink()
        assert run.end(180) == 0, run.printed
        assert "is written: storage is back after" in run.printed and run.lost() == 0
        return
    assert run.end(180) == 1, run.printed
    assert "could not be written for 4 s: OSError" in run.printed, run.printed
    assert "The last checkpoint is intact; --resume=true goes on from it." in run.printed
    assert "failed: TensorBoard's file" in run.printed and "Traceback" not in run.printed, run.printed
    assert "a worker was lost" not in run.printed, run.printed
    assert run.whole()
    away.unlink()
    again = run.again()
    assert again.end(180) == 0, again.printed
    assert run.lost() <= EVERY


@pytest.mark.parametrize("kind", ["one", "two", "search"])
def test_stopping_does_not_wait_for_a_mount(parts, tmp_path, kind):
    """SIGTERM while nothing can be written: it ends at once, not in 15 minutes, and says what it could not write."""
    away = tmp_path / "away"
    run = Victim(kind, parts, tmp_path / "run", tmp_path, FAULTY, FAULT="mount", FAULT_FILE=str(away))
    run.wait_for_step(EVERY + 1)
    away.touch()
    run.wait_for("cannot be written, trying again: OSError: [Errno 5]")
    run.process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    assert run.end(180) == 1, run.printed
    assert time.monotonic() - sent < 60, run.printed
    assert "could not be written before this was stopped: OSError" in run.printed, run.printed
    assert "Traceback" not in run.printed and run.whole()


def test_stopping_does_not_wait_for_a_bucket(parts, tmp_path, bucket):
    more = ["--steps=2000", "--save_freq=100", "--log_freq=100"]
    run = Victim("one", parts, bucket.run, tmp_path, *more)
    run.wait_for("step ")
    bucket.do("stop")
    run.wait_for("trying again")
    run.process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    assert run.end(180) == 1, run.printed
    assert time.monotonic() - sent < 60, run.printed
    assert "could not be written before this was stopped" in run.printed and "are in " in run.printed


@pytest.mark.parametrize("kind", ["one", "two", "search"])
def test_full_disk(parts, tmp_path, kind):
    """The disk fills up while a checkpoint is written: the run or the search ends with one line, the last checkpoints intact,
    no torn one; with room made, --resume=true goes on."""
    with small_disk(tmp_path / "disk", "1200m") as disk:
        run = Victim(kind, parts, disk / "run", tmp_path, "--checkpoint.keep_last=1")
        run.wait_for_step(EVERY + 1)
        # Not written, which can take longer than the whole run.
        with (disk / "ballast").open("wb") as ballast:
            while (more := shutil.disk_usage(disk).free - 50 * 2**20) > 0:
                with contextlib.suppress(OSError):  # a checkpoint is just being written
                    os.posix_fallocate(ballast.fileno(), 0, os.fstat(ballast.fileno()).st_size + more)
        assert run.end(180) == 1, run.printed
        assert re.search("[nN]o space (is )?left .*\n?.*last checkpoints? (is|are) intact", run.printed), (
            run.printed
        )
        assert "Traceback" not in run.printed and run.printed.count(" intact") == 1, run.printed
        assert run.whole()
        assert not [left for made in run.runs() for left in (made / "checkpoints").glob(".0*")]
        (disk / "ballast").unlink()
        again = run.again()
        assert again.end(180) == 0, again.printed
        assert run.lost() <= EVERY


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Iterator[Bucket]:
    """An S3 server, the place of a run in it, and a disk of this node for what is on the way there."""
    server = Bucket()
    for name, value in {
        "AWS_ENDPOINT_URL": server.address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "RAY_JOBS_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.system = fsspec.filesystem("s3")
    server.system.mkdir("bucket")
    server.run = "s3://bucket/run"

    def whole() -> list[str]:
        """Checkpoints that are there with all their files, of all runs."""
        server.system.invalidate_cache()
        found = []
        for note in (name for name in server.system.find(server.run) if name.endswith(".json")):
            if "/checkpoints/" in note and note[-11:-5].isdigit():
                for name, size in json.loads(server.system.cat_file(note)).items():
                    assert server.system.size(f"{note.removesuffix('.json')}/{name}") == size
                found.append(note[-11:-5])
        return found

    server.whole = whole
    yield server
    server.end()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("kind", ["one", "two", "search"])
@pytest.mark.parametrize("for_ever", [False, True])
def test_bucket_away(parts, tmp_path, bucket, kind, for_ever):
    """For a while: nothing is lost, all is there in the end. For ever: the run or the search ends with one error, what is
    whole there stays so, and --resume=true goes on. A second command for the same address is refused meanwhile."""
    more = ["--steps=2000", "--save_freq=100", "--log_freq=100"]
    more += ["--eval_steps=100"] if kind == "search" else []
    patience = {"PATIENCE": "6"} if for_ever else {}
    run = Victim(kind, parts, bucket.run, tmp_path, *more, FAULTY, **patience)
    give_up = time.monotonic() + 120 * PATIENCE
    while not bucket.whole():
        assert time.monotonic() < give_up and run.process.poll() is None, "nothing has come into the bucket"
        time.sleep(0.1)
    if not for_ever:
        second = run.again(RAY_JOBS_CACHE=str(tmp_path / "elsewhere"))  # else the folder's lock is met first
        assert second.end(400) == 1, second.printed
        assert f"another run is writing into {bucket.run}" in second.printed, second.printed
    bucket.do("stop")
    run.wait_for("trying again")
    if for_ever:
        assert run.end(180) == 1, run.printed
        assert "could not be written for 6 s" in run.printed, run.printed
    else:
        time.sleep(3)
        bucket.do("start")
        run.wait_for("storage is back after")
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.end(180) == 130, run.printed
    assert "Traceback" not in run.printed and ("\nfailed: " in run.printed) == for_ever, run.printed
    if for_ever:
        bucket.do("start")
        assert bucket.whole()
        again = run.again()
        again.wait_for("goes on from the checkpoint of step" if kind != "search" else "trials, 1 running")
        os.killpg(again.process.pid, signal.SIGINT)
        assert again.end(180) == 130, again.printed
        return
    trained = "/trials/0000" if kind == "search" else ""
    summary = json.loads(bucket.system.cat_file(f"{bucket.run}{trained}/summary.json"))
    assert summary["lost_steps"] == summary["restarts"] == 0 and f"{summary['step']:06d}" in bucket.whole()
