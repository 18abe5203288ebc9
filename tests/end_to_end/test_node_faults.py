"""Faults of nodes: lost, hung, taken away with and without warning, back again. Real raylets, real signals.

Minutes long, so `-m slow`. Its findings are the table of docs/faults.md.
"""

import contextlib
import csv
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

import numpy as np
import psutil
import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from ray_jobs.config.events import Log
from ray_jobs.training import checkpoint
from support.commands import PATIENCE, tiny_act, train_in_process
from support.processes import Run, nothing_is_left
from support.searches import SPACE, space_file

pytestmark = pytest.mark.slow
LOST_EARLY = "a worker was lost while they started"


@pytest.fixture
def head(monkeypatch):
    """Starts a head without room for workers, where the driver is."""
    scratch = tempfile.mkdtemp(prefix="rj_")  # short: sockets lie in it; its own: nobody else shall join
    monkeypatch.setenv("RAY_TMPDIR", scratch)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    made = []

    def start(**more) -> Cluster:
        how = {"num_cpus": 0, "include_dashboard": False, **more}
        made.append(Cluster(initialize_head=True, head_node_args=how))
        made[0].drivers = []
        return made[0]

    yield start
    for cluster in made:
        for driver in cluster.drivers:
            driver.process.kill()
        cluster.shutdown()
    nothing_is_left("RAY_TMPDIR", scratch)
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def cluster(head):
    """The head, and two nodes with room for one worker each."""
    made = head()
    made.first, made.second = made.add_node(num_cpus=1), made.add_node(num_cpus=1)
    return made


def train(cluster, root: Path, run: Path, *flags: str) -> Run:
    more = ("--ray.cpus_per_worker=1", f"--ray.address={cluster.address}", "--save_freq=20", *flags)
    cluster.drivers.append(Run(tiny_act(root, run, *more), RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5"))
    return cluster.drivers[-1]


def tune(cluster, root: Path, run: Path, *flags: str) -> Run:
    """A search of two trials, one after the other."""
    given = [f for f in tiny_act(root, run, *flags) if not f.startswith("--policy.type")]
    given += [f"--space={space_file(run.parent, SPACE)}", "--tune.num_samples=2", "--tune.max_concurrent=1"]
    given += ["--max_eval_samples=8", "--tune.scheduler=none", "--ray.cpus_per_worker=1"]
    cluster.drivers.append(Run([*given, f"--ray.address={cluster.address}"], "ray_jobs.tune"))
    return cluster.drivers[-1]


def assert_complete(search: Path) -> None:
    """Both trials have their value, and each of their steps is written down once."""
    with (search / "trials.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["COMPLETE"] * 2
    for trial in ("0000", "0001"):
        steps = steps_of_trial(search / "trials" / trial)
        assert steps == list(range(1, len(steps) + 1))


def steps_of_trial(trial: Path) -> list[int]:
    """Those that stand in its metrics.jsonl, beside its validations."""
    lines = (trial / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "train/loss" in record]


def workers_of(node, name: str = "RayTrainWorker") -> list[psutil.Process]:
    """Training workers of a node, or its other processes of that name."""
    raylet = next(
        info.process for kind, infos in node.all_processes.items() if kind == "raylet" for info in infos
    )
    children = psutil.Process(raylet.pid).children(recursive=True)
    return [p for p in children if name in " ".join(p.cmdline())]


def step_of(run: Path) -> int:
    return int((run / ".progress").read_text().split()[0])


def wait_for_step(run: Path, step: int, timeout: float = 180) -> None:
    give_up = time.monotonic() + timeout * PATIENCE
    while not (run / ".progress").exists() or step_of(run) < step:
        assert time.monotonic() < give_up, f"step {step} was not reached"
        time.sleep(0.05)


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def drain(cluster, node) -> None:
    """Announce that a node will be taken away in two minutes."""
    deadline = int((time.time() + 120) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", deadline
    )
    assert accepted, why


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


def test_one_of_two_workers_killed(cluster, parts, tmp_path):
    """SIGKILL to a worker: both go on from the last checkpoint; what is told is the killed one, not that the other lost it."""
    run = tmp_path / "run"
    process = train(cluster, parts, run, "--steps=120", "--ray.num_workers=2")
    wait_for_step(run, 30)
    workers_of(cluster.second)[0].kill()
    assert process.end(300) == 0, process.printed
    assert "its process was killed" in process.printed, process.printed
    assert "(raylet)" not in process.printed, process.printed
    summary = summary_of(run)
    assert summary["restarts"] == 1 and 0 < summary["lost_steps"] <= 20
    print(f"lost {summary['lost_steps']} steps")


@pytest.mark.parametrize("killed", [0, 1])
def test_worker_killed_while_starting(cluster, parts, tmp_path, killed):
    """As the two find each other: Ray Train forgets such a group, and the one that is left holds the room of the next."""
    node = (cluster.first, cluster.second)[killed]
    run = tmp_path / "run"
    process = train(cluster, parts, run, "--steps=40", "--ray.num_workers=2")
    give_up, starting = time.monotonic() + 120, []
    while not starting:
        assert time.monotonic() < give_up and process.process.poll() is None, process.printed
        with contextlib.suppress(psutil.NoSuchProcess):
            starting = workers_of(node, "_setup_torch_process_group")
        time.sleep(0.01)
    for worker in starting:
        worker.kill()
    assert process.end(180) == 0, process.printed
    assert process.printed.count(LOST_EARLY) == 1, process.printed
    assert "Traceback" not in process.printed, process.printed
    assert summary_of(run)["lost_steps"] == 0


def test_workers_that_always_die_while_starting(cluster, parts, tmp_path):
    """Ray Train does not count that, and would start them for ever."""
    flags = ("--steps=40", "--ray.num_workers=2", "--ray.max_failures=2")
    process = train(cluster, parts, tmp_path / "run", *flags)
    give_up = time.monotonic() + 180 * PATIENCE
    while process.process.poll() is None:
        assert time.monotonic() < give_up, process.printed
        with contextlib.suppress(psutil.NoSuchProcess):
            for worker in workers_of(cluster.second):
                worker.kill()
        time.sleep(0.1)
    assert process.end() == 1
    assert process.printed.count(LOST_EARLY) == 3, process.printed
    assert "Traceback" not in process.printed, process.printed


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
    drain(cluster, leaving)
    begin = time.monotonic()
    assert process.end(300) == 0, process.printed
    assert process.printed.count("is being taken away") == 1, process.printed
    summary = summary_of(run)
    assert (summary["restarts"], summary["lost_steps"]) == (1, 0)
    print(f"lost no step; over after {time.monotonic() - begin:.0f} s, the notice was 120 s")


def test_search_ends_without_a_node(cluster, parts, tmp_path):
    """All nodes are gone, its trial waits for another: Ctrl-C ends the search, and --resume=true goes on."""
    run = tmp_path / "run"
    search = tune(cluster, parts, run, "--steps=4000", "--eval_steps=20")
    wait_for_step(run / "trials/0000", 30)
    for node in (cluster.first, cluster.second):
        cluster.remove_node(node, allow_graceful=False)
    search.wait_for("it goes on from its last checkpoint")
    os.killpg(search.process.pid, signal.SIGINT)
    assert search.end(60) == 130, search.printed
    cluster.add_node(num_cpus=1)
    cluster.drivers.append(again := Run([f"--output_dir={run}", "--resume=true"], "ray_jobs.tune"))
    wait_for_step(run / "trials/0000", 60)
    os.killpg(again.process.pid, signal.SIGINT)
    assert again.end(60) == 130 and summary_of(run / "trials/0000")["restarts"] == 1, again.printed


def test_announced_preemption_of_a_search(cluster, parts, tmp_path):
    """Of its trials, those of the node save a checkpoint of that very step and go on elsewhere."""
    run = tmp_path / "run"
    search = tune(cluster, parts, run, "--steps=150", "--eval_steps=150")
    wait_for_step(run / "trials/0000", 30)
    leaving = next(node for node in (cluster.first, cluster.second) if workers_of(node, "ImplicitFunc.train"))
    drain(cluster, leaving)
    assert search.end(300) == 0, search.printed
    told = "trial 0000: its node is being taken away, as was announced; it goes on from its last checkpoint"
    assert told in search.printed, search.printed
    assert_complete(run)
    summaries = [summary_of(run / "trials" / trial) for trial in ("0000", "0001")]
    assert [(s["restarts"], s["lost_steps"]) for s in summaries] == [(1, 0), (0, 0)]


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


class Network:
    """This machine, and a namespace of Linux's that is another one as far as the network goes, with a cable between."""

    def __init__(self):
        self.name = f"rj{os.getpid()}"
        self.here, self.there = "10.231.7.1", "10.231.7.2"
        # Both have other networks, too, of which Gloo would take one.
        self.ours, self.theirs = ({"GLOO_SOCKET_IFNAME": f"{self.name}{end}"} for end in "ab")

    def ip(self, *words: str, inside: bool = False) -> None:
        where = ["ip", "-n", self.name] if inside else ["ip"]
        subprocess.run([*where, *words], check=True, capture_output=True)

    def __enter__(self):
        self.ip("netns", "add", self.name)
        self.ip("link", "add", f"{self.name}a", "type", "veth", "peer", "name", f"{self.name}b")
        self.ip("link", "set", f"{self.name}b", "netns", self.name)
        self.ip("addr", "add", f"{self.here}/24", "dev", f"{self.name}a")
        self.ip("link", "set", f"{self.name}a", "up")
        self.ip("addr", "add", f"{self.there}/24", "dev", f"{self.name}b", inside=True)
        for device in ("lo", f"{self.name}b"):
            self.ip("link", "set", device, "up", inside=True)
        return self

    def start_node(self, address: str) -> None:
        ray = [Path(sys.executable).with_name("ray"), "start", f"--address={address}", "--num-cpus=1"]
        more = [f"--node-ip-address={self.there}", "--include-log-monitor=false"]
        command = ["ip", "netns", "exec", self.name, *ray, *more]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.theirs)
        assert result.returncode == 0, result.stdout + result.stderr

    def cut(self) -> None:
        self.ip("link", "set", f"{self.name}b", "down", inside=True)

    def __exit__(self, *failure) -> None:
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout
        for pid in map(int, pids.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.ip("link", "del", f"{self.name}a")
        self.ip("netns", "del", self.name)


@pytest.mark.parametrize("workers", [1, 2])
def test_cut_off_node(head, parts, tmp_path, workers):
    """The network to a node fails, its worker lives on there, holding the run's folder: the run goes on elsewhere from the
    last checkpoint, and never are there two that write."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("only root can cut networks")
    run = tmp_path / "run"
    with Network() as network:
        cluster = head(node_ip_address=network.here)
        network.start_node(cluster.address)
        if workers == 2:
            cluster.add_node(num_cpus=2, node_ip_address=network.here, env_vars=network.ours)
        flags = ("--steps=20000", f"--ray.num_workers={workers}", "--ray.placement=spread")
        process = train(cluster, parts, run, *flags)
        wait_for_step(run, 30)
        network.cut()
        begin = time.monotonic()
        if workers == 1:
            cluster.add_node(num_cpus=1, node_ip_address=network.here, env_vars=network.ours)
        process.wait_for("the run goes on from step")
        print(f"{process.printed.splitlines()[-1]}, {time.monotonic() - begin:.0f} s after the cut")
        wait_for_step(run, step_of(run) + 30)
        os.killpg(process.process.pid, signal.SIGINT)
        assert process.end(100) == 130, process.printed
    assert "a worker was lost" in process.printed, process.printed
    summary = summary_of(run)
    assert summary["restarts"] == 1 and summary["lost_steps"] <= 20
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, summary["step"] + 1))


def test_cut_off_node_of_a_search(head, parts, tmp_path):
    """The same for the node on which a trial runs."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("only root can cut networks")
    run = tmp_path / "run"
    with Network() as network:
        cluster = head(node_ip_address=network.here)
        network.start_node(cluster.address)
        search = tune(cluster, parts, run, "--steps=4000", "--eval_steps=20", "--log_freq=1")
        wait_for_step(run / "trials/0000", 30)
        saved = max(checkpoint.checkpoint_steps(run / "trials/0000"))
        network.cut()
        begin = time.monotonic()
        cluster.add_node(num_cpus=1, node_ip_address=network.here, env_vars=network.ours)
        search.wait_for("it goes on from its last checkpoint")
        reached = step_of(run / "trials/0000")
        wait_for_step(run / "trials/0000", reached + 30, timeout=400)
        print(f"went on {time.monotonic() - begin:.0f} s after the cut")
        os.killpg(search.process.pid, signal.SIGINT)
        assert search.end(100) == 130, search.printed
    summary = summary_of(run / "trials/0000")
    assert summary["restarts"] == 1 and summary["start_step"] >= saved
    assert steps_of_trial(run / "trials/0000") == list(range(1, summary["step"] + 1))
    print(f"lost {summary['lost_steps']} steps")


HOG = """
import sys, time
import psutil
held = []
while psutil.virtual_memory().percent < float(sys.argv[1]):
    held.append(bytearray(b"x") * 2**26)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["one", "two", "search"])
def test_node_runs_out_of_memory(head, parts, tmp_path, kind):
    """Something else takes a node's memory: Ray ends the worker before Linux does, the reason is told, the run goes on."""
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + 5 * 2**30) / memory.total
    if limit > 0.95:
        pytest.skip("too little memory is free")
    run, cluster = tmp_path / "run", head()
    node = cluster.add_node(num_cpus=2, env_vars={"RAY_memory_usage_threshold": f"{limit:.3f}"})
    if kind == "search":
        process = tune(cluster, parts, run, "--steps=200", "--eval_steps=20")
    else:
        process = train(cluster, parts, run, "--steps=200", f"--ray.num_workers={1 + (kind == 'two')}")
    training, name = (
        (run / "trials/0000", "ImplicitFunc.train") if kind == "search" else (run, "RayTrainWorker")
    )
    wait_for_step(training, 30)
    workers = workers_of(node, name)
    hog = subprocess.Popen([sys.executable, "-c", HOG, str(100 * limit + 1)])
    try:
        gone, _ = psutil.wait_procs(workers, timeout=60 * PATIENCE)
    finally:
        hog.kill()
    assert gone and process.end(300) == 0, process.printed
    assert "its node ran out of memory" in process.printed, process.printed
    summary = summary_of(training)
    assert summary["restarts"] >= 1 and summary["lost_steps"] <= (60 if kind == "search" else 20)
    print(f"lost {summary['lost_steps']} steps")


def test_elastic(cluster, parts, tmp_path):
    """Two workers, one node lost: on with one, and with two again when there is a node; the same global batch in every
    step, each step logged once, and the loss is that of an undisturbed worker, within a tenth of the spread of three others."""
    run = tmp_path / "run"
    process = train(cluster, parts, run, "--steps=2500", "--ray.num_workers=1:2", "--save_freq=50")
    wait_for_step(run, 70)
    cluster.remove_node(cluster.second, allow_graceful=False)
    process.wait_for("with 1 worker(s)")
    wait_for_step(run, 150)
    cluster.add_node(num_cpus=1)
    process.wait_for("with 2 worker(s)")
    wait_for_step(run, step_of(run) + 100)
    os.killpg(process.process.pid, signal.SIGINT)
    assert process.end(300) == 130, process.printed
    summary = summary_of(run)
    assert summary["restarts"] == 2 and summary["global_batch_size"] == 8
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, summary["step"] + 1))

    def fifths(records: list[dict]) -> np.ndarray:
        losses = np.array([record["train/loss"] for record in records])
        return np.array([part.mean() for part in np.array_split(losses, 5)])

    undisturbed = []
    for seed in (1000, 0, 1, 2):  # the first is LeRobot's default, which the run had
        alone = (f"--steps={summary['step']}", f"--seed={seed}", "--ray.grad_accumulation=2")
        flags = tiny_act(parts, tmp_path / f"seed{seed}", *alone, "--save_checkpoint=false")
        _, events = train_in_process(flags)
        undisturbed.append(fifths([event.values for event in events if isinstance(event, Log)]))
    ours, own, spread = fifths(records), undisturbed[0], np.ptp(undisturbed[1:], 0)
    print(f"{summary['step']} steps, {summary['lost_steps']} of them twice")
    print(f"{ours=}\n{own=}\n{spread=}")
    assert (abs(ours - own) <= spread / 10).all()
