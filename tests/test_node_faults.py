"""Faults of nodes: lost, hung, taken away with and without warning, back again. Real raylets, real signals.

Minutes long, so `-m slow`. Its findings are the fault table in the README.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, tiny_act
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from test_faults import Run

from ray_jobs.engine import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch):
    """A head without room for workers, where the driver is, and two nodes with room for one each."""
    scratch = tempfile.mkdtemp(prefix="rj_")  # short: sockets lie in it; its own: nobody else shall join
    monkeypatch.setenv("RAY_TMPDIR", scratch)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        made.first, made.second = made.add_node(num_cpus=1), made.add_node(num_cpus=1)
        yield made
    finally:
        made.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def train(cluster, root: Path, run: Path, *flags: str) -> Run:
    more = ("--ray.cpus_per_worker=1", f"--ray.address={cluster.address}", "--save_freq=20", *flags)
    return Run(tiny_act(root, run, *more), RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5")


def workers_of(node) -> list[psutil.Process]:
    """Training workers of a node."""
    raylet = next(
        info.process for kind, infos in node.all_processes.items() if kind == "raylet" for info in infos
    )
    children = psutil.Process(raylet.pid).children(recursive=True)
    return [p for p in children if "RayTrainWorker" in " ".join(p.cmdline())]


def step_of(run: Path) -> int:
    return int((run / ".progress").read_text().split()[0])


def wait_for_step(run: Path, step: int, timeout: float = 180) -> None:
    give_up = time.monotonic() + timeout
    while not (run / ".progress").exists() or step_of(run) < step:
        assert time.monotonic() < give_up, f"step {step} was not reached"
        time.sleep(0.05)


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def node_with_workers(cluster):
    return next(node for node in (cluster.first, cluster.second) if workers_of(node))


@pytest.mark.parametrize("workers", [1, 2])
def test_lost_node(cluster, parts, tmp_path, workers):
    """SIGKILL to a raylet: the run waits for a node in its place and goes on from the last checkpoint."""
    run = tmp_path / "run"
    process = train(cluster, parts, run, "--steps=120", f"--ray.num_workers={workers}")
    wait_for_step(run, 30)
    cluster.remove_node(node_with_workers(cluster), allow_graceful=False)
    if workers == 2:
        cluster.add_node(num_cpus=1)
    assert process.end(300) == 0, process.printed
    assert "a worker was lost" in process.printed
    summary = summary_of(run)
    assert summary["restarts"] == 1 and 0 < summary["lost_steps"] <= 20
    print(f"lost {summary['lost_steps']} steps")


@pytest.mark.parametrize("workers", [1, 2])
def test_announced_preemption_loses_nothing(cluster, parts, tmp_path, workers):
    """A node is about to be taken away: a checkpoint of that very step, and the run goes on elsewhere at once,
    without a failure being counted."""
    run = tmp_path / "run"
    flags = (f"--ray.num_workers={workers}", "--ray.max_failures=0", "--save_freq=1000")
    process = train(cluster, parts, run, "--steps=150", *flags)
    wait_for_step(run, 30)
    leaving = node_with_workers(cluster)
    if workers == 2:
        cluster.add_node(num_cpus=1)
    deadline = int((time.time() + 120) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(
        leaving.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", deadline
    )
    assert accepted, why
    begin = time.monotonic()
    assert process.end(300) == 0, process.printed
    assert "is being taken away" in process.printed, process.printed
    summary = summary_of(run)
    assert (summary["restarts"], summary["lost_steps"]) == (1, 0)
    print(f"lost no step; over after {time.monotonic() - begin:.0f} s, the notice was 120 s")


@pytest.mark.parametrize("hung", [0, 1])
def test_hung_worker_is_named_and_replaced(cluster, parts, tmp_path, hung):
    """SIGSTOP to one of two workers: which it was is told, and both go on from the last checkpoint."""
    run = tmp_path / "run"
    process = train(cluster, parts, run, "--steps=120", "--ray.num_workers=2", "--ray.hang_timeout=10")
    process.wait_for("step 30/120")
    stopped = [p for node in (cluster.first, cluster.second) for p in workers_of(node)][hung]
    stopped.suspend()
    assert process.end(300) == 0, process.printed
    told = re.search(r"rank (\d) on \S+ \(process (\d+)\) has stopped answering", process.printed)
    assert told and int(told[2]) == stopped.pid, process.printed
    assert 0 < summary_of(run)["lost_steps"] <= 20


def test_elastic(cluster, parts, tmp_path):
    """Two workers, one node lost: on with one, and with two again when there is a node; the same global batch in every
    step, each step logged once."""
    run = tmp_path / "run"
    process = train(cluster, parts, run, "--steps=2500", "--ray.num_workers=1:2", "--save_freq=50")
    wait_for_step(run, 70)
    cluster.remove_node(cluster.second, allow_graceful=False)
    process.wait_for("with 1 worker(s)")
    process.wait_for("step ")
    cluster.add_node(num_cpus=1)
    process.wait_for("with 2 worker(s)")
    time.sleep(10)
    os.killpg(process.process.pid, signal.SIGINT)
    assert process.end(300) == 130, process.printed
    summary = summary_of(run)
    assert summary["restarts"] == 2 and summary["global_batch_size"] == 8
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, summary["step"] + 1))
    print(process.printed)


def test_full_disk(parts, tmp_path):
    """A disk that fills up while a checkpoint is written: one line, the last checkpoint intact, no torn one; with room
    made, --resume=true goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        flags = tiny_act(parts, disk / "run", "--steps=60", "--save_freq=10", "--ray.address=local")
        run = Run(flags)
        run.wait_for("step 5/60")
        size = shutil.disk_usage(disk).free - 150 * 2**20
        (disk / "ballast").write_bytes(bytes(size))
        assert run.end() == 1, run.printed
        assert "no space is left for" in run.printed and "last checkpoint is intact" in run.printed, (
            run.printed
        )
        assert "Traceback" not in run.printed and run.printed.count("failed:") == 1
        whole = checkpoint.checkpoint_steps(disk / "run")
        assert whole and [checkpoint.fault(path) for path in whole.values()] == [None] * len(whole)
        assert not list((disk / "run/checkpoints").glob(".0*"))
        (disk / "ballast").unlink()
        run = Run([*flags, "--resume=true", "--checkpoint.keep_last=1"])
        assert run.end() == 0, run.printed
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("what", [("train", 1), ("train", 2), ("tune", 1)])
def test_short_soak(what):
    """A few random kills; the long version is `python tests/soak.py`."""
    kind, workers = what
    words = [f"--what={kind}", f"--workers={workers}", "--kills=5", "--steps=150"]
    result = subprocess.run(
        [sys.executable, "tests/soak.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    print(result.stdout)
