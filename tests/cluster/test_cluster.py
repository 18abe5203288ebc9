"""cluster.yaml: what Ray's launcher makes of it, what its commands do on real nodes, what a submitted job uploads."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config, with_envs
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from ray_jobs.cluster import run_folder
from ray_jobs.config.errors import RunError
from ray_jobs.training import checkpoint
from support.commands import PATIENCE, ROOT, job, tiny_act
from support.machine import free_port

FILE = ROOT / "cluster.yaml"

SPACE = """
policy: act
baseline: {policy.optimizer_lr: 1.0e-4}
search:
  policy.optimizer_lr: {low: 1.0e-5, high: 1.0e-3, log: true}
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The file as Ray's launcher completes it for AWS, which moto stands in for, and Ray's AWS node provider."""
    moto = pytest.importorskip("moto")
    home = tmp_path_factory.mktemp("home")
    for secret in (".netrc", ".ray/auth_token"):
        (home / secret).parent.mkdir(exist_ok=True)
        (home / secret).write_text("secret")
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        patch.setenv("HOME", str(home))
        patch.chdir(ROOT)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        import boto3
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        written = yaml.safe_load(FILE.read_text())
        boto3.client("iam").create_instance_profile(InstanceProfileName="ray-jobs")
        image = boto3.client("ec2", region_name=written["provider"]["region"]).describe_images()["Images"][0]
        for kind in written["available_node_types"].values():
            kind["node_config"]["ImageId"] = image["ImageId"]  # moto knows but a few
        config = bootstrap_aws(prepare_config(written))
        config = AWSNodeProvider.fillout_available_node_types_resources(config)
        validate_config({name: value for name, value in config.items() if name != "head_node"})
        yield config, _get_node_provider(config["provider"], config["cluster_name"])


def test_launcher_takes_the_file(launched):
    """Ray's schema and its launcher for AWS take it; GPUs are detected, workers are spot instances behind a group
    that only SSH reaches, and start under the names that botocore knows."""
    config, provider = launched
    kinds = config["available_node_types"]
    assert kinds["gpu_spot"]["resources"]["GPU"] == 1 and "GPU" not in kinds["head"]["resources"]
    started = {}
    for name, kind in kinds.items():
        (instance,) = provider.create_node(kind["node_config"], {"ray-node-name": name}, 1).values()
        started[name] = instance
    assert {name for name, instance in started.items() if instance.instance_lifecycle == "spot"} == {
        "gpu_spot"
    }
    assert all(i.iam_instance_profile["Arn"].endswith("/ray-jobs") for i in started.values())
    (group,) = config["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    rules = provider.ec2.SecurityGroup(group).ip_permissions
    assert [rule["FromPort"] for rule in rules if rule["IpRanges"]] == [22]


def test_spot_first_then_on_demand(launched):
    """Ray's scheduler asks for spot nodes, and for others once AWS had none; never for more than max_workers."""
    config, _ = launched
    config = AutoscalingConfig({k: v for k, v in config.items() if k != "head_node"}, skip_content_hash=True)

    def asked(workers: int, **availability) -> dict[str, int]:
        demand = ResourceRequestUtil.make({"GPU": 1, "CPU": 8})
        reply = ResourceDemandScheduler().schedule(
            SchedulingRequest(
                node_type_configs=config.get_node_type_configs(),
                max_num_nodes=config.get_max_num_nodes(),
                resource_requests=ResourceRequestUtil.group_by_count([demand] * workers),
                disable_launch_config_check=True,
                idle_timeout_s=None,
                recoverable_resource_availabilities=availability,
            )
        )
        return {launch.instance_type: launch.count for launch in reply.to_launch}

    assert asked(2)["gpu_spot"] == 2
    assert asked(2, gpu_spot=0.0)["gpu_on_demand"] == 2
    assert sum(asked(9).values()) == 5  # with the head, which is not there yet


class Nodes:
    """Ray on this machine as `ray start` makes it, in a home of its own."""

    def __init__(self, home: Path):
        self.home, self.mark = home, uuid.uuid4().hex
        self.port, self.dashboard = free_port(), free_port()
        # Short, for sockets have their names in it; and its own, else Ray's of other tests would be joined.
        self.scratch = Path(tempfile.mkdtemp(prefix="rj_"))
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "OMP_"))},
            "HOME": str(home),
            "RAY_TMPDIR": str(self.scratch),
            "RAY_JOBS_TEST": self.mark,
        }

    def start_by_the_file(self, config: dict) -> None:
        """A head and a worker, by the commands of cluster.yaml."""
        written = yaml.safe_load(FILE.read_text())
        for command in written["setup_commands"]:
            if "chmod" in command or ".bashrc" in command:  # the others install packages and mount disks
                self.launch(command, {})
        (self.home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))
        for name, kind in (("head", "head"), ("worker", "gpu_spot")):
            for command in written[f"{name}_start_ray_commands"][
                1:
            ]:  # the first one stops all Ray on a machine
                command = command.replace("6379", str(self.port)).replace("000000000", "00000000")
                command = command.replace(" --autoscaling-config=~/ray_bootstrap_config.yaml", "")
                # One machine has two nodes here. In a common folder, each would unpack jobs' folders anew, over the other.
                more = f" --temp-dir={self.scratch / name} --dashboard-agent-listen-port={free_port()}"
                more += f" --dashboard-port={self.dashboard}" if name == "head" else ""
                self.launch(
                    f"{command} --num-cpus=2{more}" if "ray start" in command else command,
                    {"RAY_HEAD_IP": "127.0.0.1", "RAY_NODE_TYPE_NAME": kind, "RAY_enable_autoscaler_v2": 1},
                )

    def start_by_the_page(self) -> None:
        """A head, by the page's commands for machines that one has."""
        _, _, chapter = (ROOT / "docs" / "clusters.md").read_text().partition("## Machines that you have")
        block = next(part for part in chapter.split("\n\n") if part.startswith("    "))
        lines = [line.partition(" #")[0].strip() for line in block.splitlines()]
        assert lines[-1].startswith("ray start --address=") and lines[-2].startswith("ray start --head")
        ports = (
            f" --port={self.port} --dashboard-port={self.dashboard} --ray-client-server-port={free_port()}"
        )
        ports += f" --dashboard-agent-listen-port={free_port()} --num-cpus=2"
        self.launch("; ".join(["export PATH=$HOME/env/bin:$PATH", *lines[:-1]]) + ports, {})

    def launch(self, command: str, env: dict) -> None:
        """Run a command as Ray's launcher does over ssh."""
        shell = " ".join(_with_interactive(*with_envs([command], env)))
        result = subprocess.run(
            shell, shell=True, env=self.env, capture_output=True, text=True, timeout=120 * PATIENCE
        )
        assert result.returncode == 0, result.stdout + result.stderr

    def ray(self, *args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
        """`ray ...` as a user types it, in the shell that the page sets up."""
        address = {"RAY_ADDRESS": f"http://127.0.0.1:{self.dashboard}", "RAY_AUTH_MODE": "token"}
        ray = Path(sys.executable).with_name("ray")
        env = self.env | address | env
        for _ in range(10):
            result = subprocess.run(
                [ray, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300 * PATIENCE
            )
            if "No available agent" not in result.stderr:  # the head takes a moment
                break
            time.sleep(2)
        return result

    def processes(self) -> list[psutil.Process]:
        found = psutil.process_iter(["environ"])
        return [p for p in found if (p.info["environ"] or {}).get("RAY_JOBS_TEST") == self.mark]

    def stop(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.scratch, ignore_errors=True)


class Metadata(ThreadingHTTPServer):
    """What AWS tells an instance about itself (IMDSv2): with a token, whether it is about to be taken away."""

    announced, asked = False, 0

    class RequestHandlerClass(BaseHTTPRequestHandler):
        def do_PUT(self):
            valid = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.answer(200 if valid else 400, b"a token")

        def do_GET(self):
            if self.headers["X-aws-ec2-metadata-token"] != "a token":
                return self.answer(401)
            self.server.asked += 1
            there = self.path == "/latest/meta-data/spot/instance-action" and self.server.announced
            self.answer(200 if there else 404, b'{"action": "terminate", "time": "2030-01-01T00:00:00Z"}')

        def answer(self, code: int, body: bytes = b""):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)


def new_home(tmp_path_factory) -> Path:
    """A user's, with the environment that uv would install there."""
    home = tmp_path_factory.mktemp("home")
    (home / ".bashrc").write_text("# Ubuntu's\n")
    for name in ("ray", "python"):
        wrapper = home / "env/bin" / name
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        wrapper.write_text(f'#!/bin/sh\nexec {Path(sys.executable).with_name(name)} "$@"\n')
        wrapper.chmod(0o755)
    return home


@pytest.fixture(scope="module")
def metadata():
    with Metadata() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def nodes(launched, metadata, tmp_path_factory):
    home = new_home(tmp_path_factory)
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text(uuid.uuid4().hex)
    cluster = Nodes(home)
    cluster.env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = f"http://127.0.0.1:{metadata.server_port}"
    try:
        cluster.start_by_the_file(launched[0])
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    cluster = Nodes(new_home(tmp_path_factory))
    try:
        cluster.start_by_the_page()
        yield cluster
    finally:
        cluster.stop()


PROBE = """
import json, os, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
from ray_jobs.cluster import connect

@ray.remote(num_cpus=2)
def look():
    return {name: os.environ.get(name) for name in ("RAY_JOBS_CACHE", "OMP_NUM_THREADS")}

ray.init()
seen = [ray.get(look.options(scheduling_strategy=On(node["NodeID"], False)).remote()) for node in ray.nodes()]
shares = [str(resources.per_worker(3, None, None, None))]
try:
    resources.per_worker(4, None, 1.0, None)
except Exception as error:
    shares.append(str(error))
print("seen", json.dumps({"nodes": seen, "shares": shares}))
"""


@pytest.mark.slow
def test_nodes_start_with_the_files_commands(nodes, tmp_path):
    """Both nodes have the cache's folder and a thread for each CPU; a job is taken with the token and not without;
    nothing but loopback serves the dashboard; and workers that are still to be started are reckoned with."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    shutil.copytree(ROOT / "ray_jobs", folder / "ray_jobs")
    (folder / "probe.py").write_text(PROBE)
    result = nodes.ray("job", "submit", "--working-dir", ".", "--", "python", "probe.py", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("seen ")]
    seen = json.loads(line.removeprefix("seen "))
    assert seen["nodes"] == 2 * [{"RAY_JOBS_CACHE": "/opt/dlami/nvme/ray_jobs", "OMP_NUM_THREADS": "2"}]
    assert seen["shares"][0] == "8 CPUs, 1 GPUs"
    assert "room for 3" in seen["shares"][1] and "3 x 16 CPUs, 1 GPUs" in seen["shares"][1]

    listening = [c.laddr for p in nodes.processes() for c in p.net_connections() if c.status == "LISTEN"]
    assert {address.ip for address in listening if address.port == nodes.dashboard} == {"127.0.0.1"}
    for wrong in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 32}):
        refused = nodes.ray("job", "list", cwd=folder, **wrong)
        assert refused.returncode != 0 and "uthentication" in refused.stdout + refused.stderr


@pytest.fixture
def folder(tmp_path):
    """What `--working-dir .` names: another folder with the program in it."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "ray_jobs", folder / "ray_jobs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "search_spaces", folder / "search_spaces")
    return folder


def submit(machine, folder: Path, *words: str, **env: str) -> str:
    """Submit without waiting; the job's name."""
    name = f"job-{uuid.uuid4().hex[:8]}"
    how = ("--no-wait", f"--submission-id={name}", "--working-dir", ".")
    result = machine.ray("job", "submit", *how, "--", *words, cwd=folder, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return name


def search_command(folder: Path, data: Path, output_dir: Path, *more: str) -> tuple[str, ...]:
    """A search's command line; its space lies in the folder that is submitted."""
    (folder / "space.yaml").write_text(SPACE)
    flags = [f for f in tiny_act(data, output_dir, *more) if not f.startswith("--policy.type")]
    return ("python", "-m", "ray_jobs.tune", *flags, "--space=space.yaml")


def state_of(machine, folder: Path, name: str) -> str:
    told = machine.ray("job", "status", name, cwd=folder).stdout.upper()
    return next(s for s in ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING") if s in told)


def log_of(machine, folder: Path, name: str) -> str:
    return machine.ray("job", "logs", name, cwd=folder).stdout


def wait(machine, folder: Path, name: str, until=lambda log: False) -> tuple[str, str]:
    """State and log of a job, once it is over or its log says enough."""
    give_up = time.monotonic() + 240 * PATIENCE
    while True:
        log, state = log_of(machine, folder, name), state_of(machine, folder, name)
        if state not in ("PENDING", "RUNNING") or until(log):
            return state, log_of(machine, folder, name)
        assert time.monotonic() < give_up, log
        time.sleep(3)


LEAVING = """
import time, ray
from ray._private.state import state
from ray.core.generated.common_pb2 import NodeDeathInfo
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

@ray.remote
class Work:
    def begin(self):
        pass

ray.init()
(worker,) = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" not in node["Resources"]]
work = Work.options(scheduling_strategy=On(worker, False)).remote()  # a node without any would leave at once
ray.get(work.begin.remote())
print("draining before:", state.get_draining_nodes(), flush=True)
while not (draining := state.get_draining_nodes()):  # what Ray Train asks
    time.sleep(1)
assert list(draining) == [worker] and 60 < draining[worker] / 1000 - time.time() < 120, draining
ray.kill(work)
while (node := next(node for node in ray.nodes() if node["NodeID"] == worker))["Alive"]:
    time.sleep(1)
print("left:", NodeDeathInfo.Reason.Name(node["DeathReason"]), node["DeathReasonMessage"])
"""


@pytest.mark.slow
def test_spot_notice_reaches_ray(nodes, metadata, tmp_path):
    """What AWS tells a spot instance alone, the loop there tells Ray, which reports the node as being preempted. The last
    test on these nodes, for one of them leaves."""

    def loops() -> list[psutil.Process]:
        return [p for p in nodes.processes() if p.name() == "bash" and os.getsid(p.pid) == p.pid]

    assert len(loops()) == 1
    (tmp_path / "leaving.py").write_text(LEAVING)
    name = submit(nodes, tmp_path, "python", "leaving.py")
    state, log = wait(nodes, tmp_path, name, until=lambda log: "draining before:" in log and metadata.asked)
    assert state == "RUNNING" and "draining before: {}" in log, log
    metadata.announced = True
    state, log = wait(nodes, tmp_path, name)
    assert state == "SUCCEEDED", log + (nodes.home / "spot_notice.log").read_text()
    assert "left: AUTOSCALER_DRAIN_PREEMPTED spot notice" in log, log
    assert not loops()


@pytest.mark.slow
def test_submitted_jobs(machine, folder, parts, tmp_path):
    """`ray start --head`, then, over the dashboard's port with the token, a training and a search from another folder: they
    run to the end, words with quotes arrive, the state tells the truth, a log has lines; nobody comes in without the token."""
    root = shutil.copytree(parts, tmp_path / 'it\'s "here"')
    train = ("python", "-m", "ray_jobs.train", *tiny_act(root, tmp_path / "run", "--steps=12"))
    for wrong in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 32}):
        refused = machine.ray("job", "submit", "--working-dir", ".", "--", *train, cwd=folder, **wrong)
        assert refused.returncode != 0 and "uthentication" in refused.stdout + refused.stderr

    state, log = wait(machine, folder, submit(machine, folder, *train, "--ray.cpus_per_worker=2"))
    assert state == "SUCCEEDED", log
    assert "step 12/12" in log and "\r" not in log and "Traceback" not in log
    assert checkpoint.fault(checkpoint.last_checkpoint(tmp_path / "run")) is None

    mistaken = submit(machine, folder, *train, "--batchsize=4")
    lost = submit(machine, folder, *train, "--output_dir=outputs/run")
    flags = ("--steps=9", "--tune.num_samples=2", "--tune.scheduler=none")
    search = search_command(folder, root, tmp_path / "search", *flags)
    state, log = wait(machine, folder, submit(machine, folder, *search))
    assert state == "SUCCEEDED" and "\r" not in log and "Traceback" not in log, log
    assert (tmp_path / "search/best/command.sh").is_file()

    state, log = wait(machine, folder, mistaken)
    assert state == "FAILED" and "did you mean --batch_size?" in log and "Traceback" not in log, log
    state, log = wait(machine, folder, lost)
    assert (
        state == "FAILED" and "--output_dir=outputs/run: a submitted job runs in a folder of Ray's own" in log
    ), log


@pytest.mark.slow
def test_several_at_once(machine, folder, parts, tmp_path):
    """Two trainings and a search share a cluster: none takes another's name, port or folder. Then a data set's frames are
    decoded ahead and a policy is scored, by jobs as well."""
    jobs = {}
    for number in (1, 2):
        flags = tiny_act(parts, tmp_path / f"run{number}", "--steps=30", "--ray.cpus_per_worker=1")
        jobs[f"run{number}"] = submit(machine, folder, "python", "-m", "ray_jobs.train", *flags)
    flags = ("--steps=9", "--tune.num_samples=3", "--ray.cpus_per_worker=1")
    jobs["search"] = submit(machine, folder, *search_command(folder, parts, tmp_path / "search", *flags))
    for name, submitted in jobs.items():
        state, log = wait(machine, folder, submitted)
        assert state == "SUCCEEDED" and "Traceback" not in log, log
        assert json.loads((tmp_path / name / "summary.json").read_text())["status"] in ("finished", "done")
    one, two = (
        tmp_path / run / "checkpoints/last/pretrained_model/model.safetensors" for run in ("run1", "run2")
    )
    assert one.read_bytes() == two.read_bytes()

    data = ("--dataset.repo_id=local/parts", f"--dataset.root={parts}")
    cache = (
        "python",
        "-m",
        "ray_jobs.cache",
        "build",
        *data,
        f"--data.cache={tmp_path / 'frames'}",
        "--ray.address=auto",
    )
    scored = ("python", "-m", "ray_jobs.evaluate", f"--checkpoint={tmp_path / 'run1'}", "--data.eval_episodes=[0]",
              f"--output_dir={tmp_path / 'scores'}")  # fmt: skip
    for words in (cache, scored):
        state, log = wait(machine, folder, submit(machine, folder, *words))
        assert state == "SUCCEEDED" and "Traceback" not in log and "\r" not in log, log
    assert list((tmp_path / "frames").iterdir()) and (tmp_path / "scores/evaluation.json").is_file()


@pytest.mark.slow
def test_stopped_job_leaves_a_checkpoint(machine, folder, parts, tmp_path):
    """`ray job stop` ends a training as Ctrl-C does; the same command with --resume=true goes on from there. So it is with
    a search and its trials."""
    flags = tiny_act(parts, tmp_path / "run", "--steps=5000", "--save_freq=5000", "--ray.cpus_per_worker=2")
    train = ("python", "-m", "ray_jobs.train", *flags)
    name = submit(machine, folder, *train)
    state, log = wait(machine, folder, name, until=lambda log: "step 12/5000" in log)
    assert state == "RUNNING", log
    machine.ray("job", "stop", name, cwd=folder)
    state, log = wait(machine, folder, name)
    assert state == "STOPPED" and "--resume=true" in log and "Traceback" not in log, log
    saved = checkpoint.last_checkpoint(tmp_path / "run")
    assert int(saved.name) >= 12 and checkpoint.fault(saved) is None
    result = job(
        "ray_jobs.train", *flags, "--resume=true", f"--steps={int(saved.name) + 2}", "--ray.num_workers=0"
    )
    assert (
        result.returncode == 0 and f"goes on from the checkpoint of step {int(saved.name)}" in result.stdout
    ), result

    output = tmp_path / "search"
    flags = ("--steps=5000", "--tune.num_samples=2", "--ray.cpus_per_worker=1")
    name = submit(machine, folder, *search_command(folder, parts, output, *flags))
    trial = output / "trials/0000"
    state, log = wait(machine, folder, name, until=lambda log: (trial / "metrics.jsonl").is_file())
    assert state == "RUNNING", log
    machine.ray("job", "stop", name, cwd=folder)
    state, log = wait(machine, folder, name)
    assert state == "STOPPED" and "trial 0000 interrupted" in log and "--resume=true" in log, log
    assert "Traceback" not in log and "***" not in log, log
    assert checkpoint.fault(checkpoint.last_checkpoint(trial)) is None


def test_upload_is_small(tmp_path):
    """`ray job submit --working-dir .` packs the program, not what lies beside it."""
    copy = tmp_path / "copy"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name, follow_symlinks=False)  # `best` is a link to a folder
    for folder in (
        ".git",
        ".venv",
        "outputs/run",
        "datasets/set",
        "pretrained/pi0",
        "wandb",
        ".pytest_cache",
    ):
        (copy / folder).mkdir(parents=True)
        (copy / folder / "large").write_bytes(os.urandom(5_000_000))
    package = tmp_path / "package.zip"
    create_package(str(copy), package, include_gitignore=True)  # as the client of `ray job submit` does
    assert package.stat().st_size < 2_000_000
    inside = zipfile.ZipFile(package).namelist()
    assert "ray_jobs/train.py" in inside and "search_spaces/act.yaml" in inside
    assert not [name for name in inside if name.endswith("large")]


def test_a_node_without_the_drivers_folders_is_named(tmp_path):
    """A node with a folder of the same name that is another one, and one without the data set."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    mark = run_folder.mark_of(ours)
    run_folder.check_node(str(tmp_path), ours, mark)
    run_folder.mark_of(theirs)
    for root, output_dir, told in (
        (str(tmp_path / "set"), ours, r"--dataset.root=.*/set is not there on node \d"),
        (None, theirs, r"--output_dir=.*/theirs is not on node \d.* what it is on the driver's node"),
        (None, tmp_path / "nowhere", r"--output_dir=.*/nowhere is not on node \d"),
    ):
        with pytest.raises(RunError, match=told):
            run_folder.check_node(root, output_dir, mark)
