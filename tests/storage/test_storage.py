"""Runs and data sets in a bucket: nothing is lost with the node, and what is there is whole. The bucket is moto's server."""

import json
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import fsspec
import optuna
import pytest
from lerobot.policies.act.modeling_act import ACTPolicy
from optuna.trial import TrialState
from ray.cluster_utils import Cluster

from ray_jobs import evaluate
from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.cluster import worker
from ray_jobs.config.errors import GO_ON, INTERRUPTED, InputError, RunError
from ray_jobs.evaluation import run as evaluation_run
from ray_jobs.storage import bucket, lease, mirror
from ray_jobs.training import checkpoint
from support.buckets import Bucket
from support.commands import PATIENCE, job, tiny_act
from support.data_sets import make
from support.processes import Run
from support.searches import space_file

WEIGHTS = "pretrained_model/model.safetensors"
OPTIMIZER = "training_state/optimizer_state.safetensors"


@pytest.fixture(scope="module")
def server():
    made = Bucket()
    yield made
    made.end()


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    """A bucket, and a node that has seen nothing of it yet. The node can be had anew."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # other tests have another server
    system = fsspec.filesystem("s3")
    system.mkdir(tmp_path.name.replace("_", "-"))

    class Place:
        address = f"s3://{tmp_path.name.replace('_', '-')}/runs/act"
        nodes = 0

        def find(self) -> list[str]:
            system.invalidate_cache()
            return [path.partition("/runs/act/")[2] for path in system.find(self.address)]

        def new_node(self) -> Path:
            self.nodes += 1
            folder = tmp_path / f"node{self.nodes}"
            monkeypatch.setattr(mirror, "default_folder", lambda: folder)
            monkeypatch.setattr(bucket, "default_folder", lambda: folder)
            bucket.fetch.cache_clear()
            return folder

    place = Place()
    place.new_node()
    place.server, place.system = server, system
    yield place
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def train(flags: list[str], stop_after: int | None = None) -> tuple[dict, list[dict]]:
    """A run in this process, as `--ray.num_workers=0` has it."""
    recipe = resolve(flags)
    recipe = preflight.check(recipe)
    events: list[dict] = []
    stop = lambda: INTERRUPTED if stop_after and getattr(events[-1], "step", None) == stop_after else GO_ON  # noqa: E731
    return worker.run_loop(recipe, main=True, device="cpu", report=events.append, should_stop=stop), events


def flags(root, output_dir, *more: str) -> list[str]:
    given = [f for f in tiny_act(root, Path("x"), "--ray.num_workers=0") if not f.startswith("--output_dir")]
    return [*given, f"--output_dir={output_dir}", *more]


def test_run_goes_on_on_another_node(parts, s3, tmp_path):
    """Interrupted, its node gone with all that was on it, resumed on a fresh one: the very bytes of an undisturbed run;
    and only what the flags keep is in the bucket."""
    undisturbed = tmp_path / "undisturbed"
    more = ("--steps=6", "--save_freq=2", "--checkpoint.keep_last=1")
    train(flags(parts, undisturbed, *more))
    node = s3.new_node()
    summary, _ = train(flags(parts, s3.address, *more), stop_after=3)
    assert summary["status"] == INTERRUPTED and checkpoint.fault(Path(summary["checkpoint"])) is None
    there = s3.find()
    for name in (
        "summary.json",
        "metrics.jsonl",
        "options.json",
        "checkpoints/last",
        "checkpoints/000003.json",
    ):
        assert name in there
    assert not [name for name in there if "000002" in name], "pruned here, it must go there, too"
    with pytest.raises(InputError, match="already exists"):
        train(flags(parts, s3.address, *more))
    shutil.rmtree(node)
    s3.new_node()
    summary, _ = train(flags(parts, s3.address, *more, "--resume=true"))
    assert summary["status"] == "finished" and summary["start_step"] == 3 and summary["lost_steps"] == 0
    for file in (WEIGHTS, OPTIMIZER):
        there = s3.system.cat_file(f"{s3.address}/checkpoints/000006/{file}")
        assert there == (undisturbed / "checkpoints/000006" / file).read_bytes(), file
    lines = s3.system.cat_file(f"{s3.address}/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_another_run_of_the_same_address(parts, s3):
    """Its bucket was emptied, but this worker's node still has its checkpoints: the new run begins from the beginning."""
    train(flags(parts, s3.address, "--steps=2", "--save_freq=2"))
    here = mirror.folder_of(s3.address)
    s3.system.rm(s3.address, recursive=True)
    kept = here.rename(here.with_name("kept"))
    recipe = resolve(
        flags(parts, s3.address, "--steps=1", "--save_freq=1")
    )  # the driver's node knows nothing of it
    kept.rename(here)
    summary = worker.run_loop(
        recipe, main=True, device="cpu", report=lambda e: None, should_stop=lambda: GO_ON
    )
    assert (summary["start_step"], summary["status"]) == (0, "finished")
    assert not [name for name in s3.find() if "000002" in name]
    assert (here.with_name(f"{here.name}.old") / "checkpoints/000002").is_dir(), "nothing of it is lost"


def test_evaluated_from_the_bucket(parts, s3, tmp_path, capsys):
    """A run, and the trials of a search, are scored on another node, on data in the bucket, by their addresses: the value
    is the one that the training reported."""
    root = s3.address.replace("runs/act", "sets/parts")
    s3.system.put(str(parts), root, recursive=True)
    more = ("--steps=4", "--save_freq=2", "--eval_steps=2", "--data.eval_episodes=[10,11]")
    summary, _ = train(flags(root, s3.address, *more))
    s3.new_node()
    out = tmp_path / "evaluation"
    assert evaluate.main([f"--checkpoint={s3.address}", f"--output_dir={out}"]) == 0, capsys.readouterr()
    result = json.loads((out / "evaluation.json").read_text())["results"][s3.address]
    assert result["val/action_error"] == summary["best"]["val/action_error"]
    search = s3.address.replace("runs/act", "search")
    s3.system.pipe_file(f"{search}/search.json", json.dumps({"flags": {}, "policies": ["act"]}).encode())
    for trial in ("0000", "0001"):
        s3.system.copy(s3.address, f"{search}/trials/{trial}", recursive=True)
    found = evaluation_run._find(search)
    assert list(found) == ["trial 0000", "trial 0001"] and found["trial 0001"][0].parts[-4] == "0001"
    for wrong in (s3.address + "s", root):
        with pytest.raises(InputError, match=f"checkpoint={wrong}: there is neither a run nor a search"):
            evaluate.main([f"--checkpoint={wrong}"])
    with pytest.raises(InputError, match="must be a folder"):
        evaluate.main([f"--checkpoint={s3.address}", f"--output_dir={s3.address}-scores"])


def test_a_name_is_no_pattern(parts, s3, monkeypatch):
    """A run whose name has brackets is pruned, resumed and removed like another, and nothing of a run that they match."""
    place, other = f"{s3.address} [12]#1?x=1%20", f"{s3.address} 1#1?x=1%20"
    s3.system.pipe_file(f"{other}/options.json", b"theirs")
    train(flags(parts, place, "--steps=4", "--save_freq=2", "--checkpoint.keep_last=1"))
    s3.system.invalidate_cache()
    saved = {path.partition("/checkpoints/")[2] for path in s3.system.find(place) if "/checkpoints/" in path}
    assert f"000004/{WEIGHTS}" in saved and not any(name.startswith("000002") for name in saved)
    s3.new_node()
    train(flags(parts, place, "--steps=6", "--save_freq=2", "--resume=true"))
    mirror.remove(s3.system, place.removeprefix("s3://"))
    s3.system.invalidate_cache()
    assert not s3.system.find(place) and s3.system.cat_file(f"{other}/options.json") == b"theirs"


def test_torn_upload_is_never_seen(parts, s3):
    """A checkpoint whose upload was cut off is none: the one before it is resumed from."""
    train(flags(parts, s3.address, "--steps=4", "--save_freq=2"))
    s3.system.rm_file(f"{s3.address}/checkpoints/000004.json")
    s3.new_node()
    summary, _ = train(flags(parts, s3.address, "--steps=4", "--save_freq=2", "--resume=true"))
    assert summary["start_step"] == 2 and "checkpoints/000004.json" in s3.find()


def test_two_runs_never_share_an_address(s3, tmp_path, monkeypatch):
    """A second one is refused while the first lives, and waits a while for one that was killed; one that was taken for dead
    stops once it is back."""
    for name, seconds in (("RENEWED_EVERY_S", 0.3), ("LOOK_EVERY_S", 0.1), ("OVER_AFTER_S", 1.5)):
        monkeypatch.setattr(lease, name, seconds)
    told: list[str] = []

    def run(name: str):
        return mirror.mirrored(s3.address, tmp_path / name, told.append, run=name)

    with (
        run("first"),
        pytest.raises(RunError, match="another run is writing into s3://.*, on "),
        run("second"),
    ):
        pass
    assert ".writer" not in s3.find() and "was written to on" in told.pop()
    with run("third"), run("third"):  # the process that takes a killed worker's place
        pass
    assert not told
    note = {"run": "third", "host": "a-node-cut-off", "at": time.time()}  # the same run's, not dead yet
    s3.system.pipe_file(f"{s3.address}/.writer", json.dumps(note).encode())
    begin = time.monotonic()
    with run("third"):
        assert time.monotonic() - begin > 1.5 and "a-node-cut-off" in told.pop()
    note = {"run": "killed", "host": "a-node", "at": time.time()}
    s3.system.pipe_file(f"{s3.address}/.writer", json.dumps(note).encode())
    begin = time.monotonic()
    with pytest.raises(RunError, match="another run is writing into"), run("fourth") as copy:
        assert time.monotonic() - begin > 1.5
        s3.system.pipe_file(f"{s3.address}/.writer", json.dumps(note).encode())
        while time.monotonic() - begin < 20:
            copy.changed()
            time.sleep(0.1)


@pytest.mark.slow
def test_search_goes_on_on_another_node(s3, tmp_path):
    """The driver of a search is killed, its node gone with all that was on it: on a fresh one the search goes on with the
    trials that had ended, and leaves in the bucket what it else leaves in a folder."""
    numbers = make(tmp_path / "numbers", [23, 17, 9, 20, 21], seed=2)
    given = [
        "--dataset.repo_id=local/numbers",
        f"--dataset.root={numbers}",
        f"--output_dir={s3.address}",
        f"--space={space_file(tmp_path)}",
        "--policy.device=cpu",
        "--batch_size=4",
        "--num_workers=0",
        "--data.eval_episodes=[2,4]",
        "--steps=18",
        "--eval_steps=2",
        "--tune.num_samples=5",
        "--ray.address=local",
    ]
    nodes = [{"RAY_JOBS_CACHE": str(tmp_path / name)} for name in ("first", "second")]
    run = Run(given, job="ray_jobs.tune", **nodes[0])
    run.wait_for(" at step")
    while not (ended := {t.number: t.value for t in _study_in(s3).trials if t.state.is_finished()}):
        time.sleep(0.2)
    for process in (*run.family(), run.process):
        process.kill()
    run.end()
    shutil.rmtree(tmp_path / "first")
    s3.system.rm_file(f"{s3.address}/.writer")  # as if it had been watched for a minute
    result = job("ray_jobs.tune", f"--output_dir={s3.address}", "--resume=true", **nodes[1])
    assert result.returncode == 0, result.stdout + result.stderr
    study = _study_in(s3)
    drawn = [t for t in study.trials if "config" in t.user_attrs]
    assert len(drawn) == 5 and all(t.state.is_finished() for t in study.trials)
    assert ended.items() <= {t.number: t.value for t in study.trials}.items()
    summary = json.loads(s3.system.cat_file(f"{s3.address}/summary.json"))
    assert summary["status"] == "done" and summary["best"]["trial"] == study.best_trial.number
    there = s3.find()
    for name in ("report.html", "trials.csv", "search_spaces/act.yaml", "best/command.sh"):
        assert name in there
    complete = sorted((t for t in drawn if t.state == TrialState.COMPLETE), key=lambda t: t.value)[:3]
    with_weights = {name[:11] for name in there if name.startswith("trials/") and name.endswith(WEIGHTS)}
    assert with_weights == {f"trials/{t.number:04d}" for t in complete}, "only the best few keep checkpoints"
    for trial in drawn:  # none began anew: every validation stands there once
        file = f"{s3.address}/trials/{trial.number:04d}/metrics.jsonl"
        records = map(json.loads, s3.system.cat_file(file).decode().splitlines())
        steps = [record["step"] for record in records if "val/loss" in record]
        assert steps == sorted(trial.intermediate_values) == list(range(2, steps[-1] + 1, 2))
    s3.system.get(f"{s3.address}/best/checkpoint/pretrained_model", str(tmp_path / "policy"), recursive=True)
    ACTPolicy.from_pretrained(tmp_path / "policy")


def _study_in(s3) -> optuna.Study:
    """A copy of the study, as plain Optuna reads it."""
    file = Path(tempfile.mkdtemp()) / "study.db"
    s3.system.get_file(f"{s3.address}/study.db", str(file))
    return optuna.load_study(study_name="act", storage=f"sqlite:///{file}")


def test_bucket_that_cannot_be_written(parts, s3):
    s3.server.do("stop")
    try:
        with pytest.raises(InputError, match="cannot be used"):
            train(flags(parts, s3.address))
    finally:
        s3.server.do("start")
    with pytest.raises(InputError, match="no such|NoSuchBucket|not exist|cannot be used"):
        train(flags(parts, "s3://there-is-no-such-bucket/run"))


def test_data_set_is_fetched_once(parts, s3, tmp_path):
    """Trained on from a bucket as from a folder, bit for bit; a file that was torn here is fetched again, no other."""
    root = s3.address.replace("runs/act", "sets/parts")
    s3.system.put(str(parts), root, recursive=True)
    more = ("--steps=2", "--save_freq=2")
    train(flags(parts, tmp_path / "local", *more))
    node = s3.new_node()
    train(flags(root, tmp_path / "fetched", *more))
    ours, theirs = (
        (tmp_path / name / "checkpoints/000002" / WEIGHTS).read_bytes() for name in ("fetched", "local")
    )
    assert ours == theirs
    saved = json.loads(
        (tmp_path / "fetched/checkpoints/000002/pretrained_model/train_config.json").read_text()
    )
    assert saved["dataset"]["root"] == root
    files = {p: p.stat().st_mtime_ns for p in node.rglob("*") if p.suffix in (".parquet", ".mp4", ".json")}
    torn = next(path for path in files if path.suffix == ".mp4")
    torn.write_bytes(torn.read_bytes()[:100])
    bucket.fetch.cache_clear()
    bucket.fetch_whole(root)
    again = [path for path, changed in files.items() if path.stat().st_mtime_ns != changed]
    assert again == [torn] and torn.stat().st_size > 100


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_run_goes_on_on_another_cluster(parts, s3, tmp_path, monkeypatch, count):
    """Driver, head and workers killed at once, everything on their disks gone: a new cluster goes on from the bucket, and
    one worker ends with the bytes of an undisturbed run."""
    given = [
        f for f in flags(parts, s3.address, "--steps=200", "--save_freq=10") if "ray.num_workers" not in f
    ]
    given += ["--ray.address=local", "--ray.cpus_per_worker=1", f"--ray.num_workers={count}"]
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("RAY_JOBS_CACHE", str(first))
    run = Run(given)
    give_up = time.monotonic() + 120 * PATIENCE
    while "checkpoints/000010.json" not in s3.find():
        assert time.monotonic() < give_up and run.process.poll() is None, run.printed
        time.sleep(0.1)
    for process in (*run.family(), run.process):
        process.kill()
    assert run.end() == -signal.SIGKILL
    there = max(int(name[12:18]) for name in s3.find() if re.fullmatch(r"checkpoints/\d{6}\.json", name))
    shutil.rmtree(first)
    result = job("ray_jobs.train", *given, "--resume=true", RAY_JOBS_CACHE=str(second))
    assert result.returncode == 0, result.stderr
    assert f"checkpoint  {s3.address}/checkpoints/000200" in result.stdout
    if count == 1:
        calm = [f for f in given if not f.startswith("--output_dir")]
        assert job("ray_jobs.train", *calm, f"--output_dir={tmp_path / 'calm'}").returncode == 0
        weights = s3.system.cat_file(f"{s3.address}/checkpoints/000200/{WEIGHTS}")
        assert weights == (tmp_path / "calm/checkpoints/000200" / WEIGHTS).read_bytes()
    summary = json.loads(s3.system.cat_file(f"{s3.address}/summary.json"))
    assert summary["status"] == "finished" and summary["start_step"] == there >= 10
    print(f"lost {summary['lost_steps']} steps, as far as the bucket knows")


@pytest.mark.slow
def test_two_nodes_fetch_once_each(parts, s3, tmp_path, monkeypatch):
    """A worker on each of two raylets with a disk of its own; the run's folder is in a bucket, too."""
    scratch = tempfile.mkdtemp(prefix="rj_")
    monkeypatch.setenv("RAY_TMPDIR", scratch)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    root = s3.address.replace("runs/act", "sets/parts")
    s3.system.put(str(parts), root, recursive=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    try:
        for disk in disks:
            cluster.add_node(num_cpus=1, env_vars={"RAY_JOBS_CACHE": str(disk)})
        given = [
            f for f in flags(root, s3.address, "--steps=6", "--save_freq=3") if "ray.num_workers" not in f
        ]
        more = ("--ray.num_workers=2", "--ray.cpus_per_worker=1", f"--ray.address={cluster.address}")
        result = job("ray_jobs.train", *given, *more, RAY_JOBS_CACHE=str(tmp_path / "head"))
        assert result.returncode == 0, result.stderr
        result = job(
            "ray_jobs.train", *given, *more, "--resume=true", "--steps=9", RAY_JOBS_CACHE=str(tmp_path / "x")
        )
        assert result.returncode == 0, result.stderr
        for disk in disks:
            copies = list(disk.glob("fetched/*/meta/info.json"))
            assert len(copies) == 1 and list(copies[0].parent.parent.glob("videos/*/*/*.mp4"))
        assert "checkpoints/000009.json" in s3.find()
    finally:
        cluster.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
