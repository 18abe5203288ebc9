"""A job starts as whoever it is, wherever its home is, and whoever hears it: what containers and schedulers do to processes."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from ray_jobs.cli import environment
from ray_jobs.cluster import connect
from ray_jobs.cluster.job import check_submitted
from ray_jobs.cluster.ray_internals import SUBMITTED
from support.commands import PATIENCE, ROOT, job, tiny_act
from support.machine import read_only_disk

SETTLED = """
import json, os
from ray_jobs.cli import environment
before = dict(os.environ)
environment.settle()
print(json.dumps({k: os.environ.get(k) for k in {*before, *os.environ} if before.get(k) != os.environ.get(k)}))
"""
PRINTS = """
import sys
from ray_jobs.cluster.job import run_job

def main(argv):
    for _ in range(3000):
        print("läuft \N{CHECK MARK}")
    print("the end", file=sys.stderr)
    return 0

run_job(main, at_end=lambda: None)
"""
# Of a user that is in no list. It may read all, or it would not find this Python, which is root's in many a container.
NOBODY = ["setpriv", "--reuid=4711", "--regid=4711", "--clear-groups"]
NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def settled(folder: Path, **env: str) -> dict[str, str | None]:
    """What a process that starts in a folder changes of its environment."""
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "HOME": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", SETTLED],
        cwd=folder,
        env=base | env,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout) | ({"told": result.stderr} if result.stderr else {})


@pytest.mark.parametrize(
    "name", ["HF_LEROBOT_HOME", "RAY_JOBS_CACHE", "HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME"]
)
def test_paths_in_the_environment_are_made_absolute(tmp_path, name):
    """Ray's workers run in folders of their own."""
    assert settled(tmp_path, **{name: "a/b"}) == {name: str(tmp_path / "a" / "b")}
    assert settled(tmp_path, **{name: "~/c"}) == {name: str(tmp_path / "c")}
    assert settled(tmp_path, **{name: ""}) == {name: None}
    assert settled(tmp_path, **{name: "/absolute"}) == {} or os.geteuid()


def test_a_worker_takes_over_what_its_node_has_not(tmp_path, monkeypatch):
    """Where a Ray is joined that somebody has started without these variables."""
    for name in environment.HANDED_ON:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", "/only/on/the/driver")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    paths = environment.handed_on()
    monkeypatch.delenv("HF_LEROBOT_HOME")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("TORCH_HOME", "/of/the/node")
    environment.take_over(paths)
    assert os.environ["HF_LEROBOT_HOME"] == str(tmp_path)
    assert "HF_HOME" not in os.environ and os.environ["TORCH_HOME"] == "/of/the/node"


# ---------------------------------------------------------------------- identity and home


def train_as(
    who: list[str], parts: Path, folder: Path, *more: str, env: dict[str, str], shell: str = ""
) -> subprocess.CompletedProcess:
    """Train for two steps, in a shell that redirects as `shell` says, with nothing but `env` around it."""
    if who and (os.geteuid() or not shutil.which("setpriv")):
        pytest.skip("only root can be somebody else")
    folder.chmod(0o777)
    for place in (parts, *parts.parents, *folder.parents):
        if place.is_relative_to("/tmp") and place.stat().st_uid == os.getuid() and place != Path("/tmp"):
            place.chmod(place.stat().st_mode | 0o755)
    flags = tiny_act(parts, folder / "run", "--steps=2", "--save_freq=2", *more)
    command = shlex.join([*who, sys.executable, "-m", "ray_jobs.train", *flags])
    kept = {
        k: v for k, v in os.environ.items() if k in ("PATH", "OMP_WAIT_POLICY", "PYTHONDONTWRITEBYTECODE")
    }
    around = kept | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)} | env
    result = subprocess.run(
        f"{command} {shell}",
        shell=True,
        cwd=folder,
        env=around,
        capture_output=True,
        text=True,
        timeout=600 * PATIENCE,
    )
    assert (folder / "run/checkpoints/000002").is_dir(), result.stdout + result.stderr
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return result


def test_a_container_with_nothing_right(parts, tmp_path):
    """No name, a home that cannot be written, no letters but ASCII, closed input and output."""
    with read_only_disk(tmp_path / "home") as home:
        env = {"HOME": str(home), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        result = train_as(NOBODY, parts, tmp_path, "--ray.num_workers=0", env=env, shell="<&- >&-")
    assert f"{home}/.cache/huggingface/datasets" in result.stderr and "HF_HOME" in result.stderr
    assert len(result.stderr.splitlines()) == 1


CONTAINERS = {
    "no home": {},
    "a home that is not its own": {"HOME": "/"},
    "a home that is not there": {"HOME": "/nowhere/at/all"},
    "C": {"LANG": "C"},
    "relative temporary folder": {"TMPDIR": "tmp", "HOME": "/"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTAINERS)
def test_each_of_it_alone(parts, tmp_path, name):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o777)
    train_as(NOBODY, parts, tmp_path, "--ray.num_workers=0", env=CONTAINERS[name])
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
def test_its_workers_are_no_better_off(parts, tmp_path):
    """With a Ray of its own, which wants a token in the home, and sockets whose names are too long in this folder."""
    with read_only_disk(tmp_path / "home") as home:
        more = ["--ray.num_workers=1", "--ray.address=local"]
        train_as(NOBODY, parts, tmp_path, *more, env={"HOME": str(home)})


@pytest.mark.slow
def test_a_relative_home_of_data_sets_is_the_workers_too(parts, tmp_path):
    """The data set is named, and lies in $HF_LEROBOT_HOME."""
    home = tmp_path / "lh" / "local"
    home.mkdir(parents=True)
    shutil.copytree(parts, home / "parts")
    flags = [f for f in tiny_act(parts, tmp_path / "run", "--steps=2") if not f.startswith("--dataset.root")]
    flags += ["--ray.num_workers=1", "--ray.address=local"]
    result = subprocess.run(
        [sys.executable, "-m", "ray_jobs.train", *flags],
        capture_output=True,
        text=True,
        timeout=300 * PATIENCE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_LEROBOT_HOME": "lh"},
    )
    assert result.returncode == 0 and "done: step 2/2" in result.stdout, result.stdout + result.stderr


def test_what_is_in_a_home_that_cannot_be_written_is_read_there(tmp_path):
    """Models that lie there are found; what every training writes goes elsewhere."""
    with read_only_disk(tmp_path / "home") as home:
        subprocess.run(["mount", "-o", "remount,rw", str(home)], check=True)
        (home / ".cache/huggingface/hub").mkdir(parents=True)
        subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
        changed = settled(tmp_path, HOME=str(home))
    assert {"HF_DATASETS_CACHE", "RAY_JOBS_CACHE", "TORCH_HOME"} <= set(changed)
    assert "HF_HUB_CACHE" not in changed and "HF_HOME" not in changed


# ---------------------------------------------------------------------- who hears it


@pytest.mark.parametrize(
    "how", [">&-", "2>&-", "<&- >&- 2>&-", "| head -1", "> /dev/full", "> /dev/full 2> /dev/full"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_printing_never_ends_a_job(tmp_path, how, encoding):
    script = tmp_path / "prints.py"
    script.write_text(PRINTS, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    words = ["bash", "-o", "pipefail", "-c", f"{sys.executable} {script} {how}"]
    result = subprocess.run(words, capture_output=True, env=env, timeout=120)
    assert result.returncode == 0 and b"Error" not in result.stderr, result.stderr
    if how in (">&-", "| head -1", "> /dev/full"):
        assert result.stderr.strip() == b"the end"
    if how == "2>&-":
        assert len(result.stdout.splitlines()) == 3000


# ---------------------------------------------------------------------- `ray job submit`

AS_SUBMITTED = {SUBMITTED: "{}"}  # which Ray sets for its jobs' drivers


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("ray_jobs.train --output_dir=outputs/a", "--output_dir=outputs/a: "),
        ("ray_jobs.train --output_dir outputs/a", "--output_dir=outputs/a: "),
        ("ray_jobs.train --policy.type=act", "no --output_dir: "),
        ("ray_jobs.train --resume=true --config_path=outputs/a/x.json", "--config_path=outputs/a/x.json: "),
        ("ray_jobs.train --output_dir=/a --data.cache=frames", "--data.cache=frames: "),
        ("ray_jobs.tune --output_dir=a", "--output_dir=a: "),
        ("ray_jobs.tune --output_dir=/a --tune.storage=sqlite:///a.db", "--tune.storage=sqlite:///a.db: "),
        ("ray_jobs.tune --space=act.yaml", "no --output_dir: "),
        ("ray_jobs.evaluate --checkpoint=/a", "no --output_dir: "),
        ("ray_jobs.export --checkpoint=/a --output_dir=b", "--output_dir=b: "),
        ("ray_jobs.report --output_dir=b", "--output_dir=b: "),
        ("ray_jobs.demo", "no --output_dir: "),
        ("ray_jobs.cache build --data.cache=frames", "--data.cache=frames: "),
    ],
)
def test_a_submitted_job_writes_nothing_into_rays_folder(words, told, tmp_path):
    result = job(*words.split(), **AS_SUBMITTED, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {told}"), result.stderr
    assert "a submitted job runs in a folder of Ray's own" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        "train --output_dir=/a --data.cache=auto",
        "train --output_dir=s3://bucket/a --data.cache=/frames",
        "tune --output_dir=/a --tune.storage=sqlite:////a.db --space=search_spaces/act.yaml",
        "tune --output_dir=/a --tune.storage=postgresql://me@host/studies",
        "train --resume=true --config_path=/a/checkpoints/last/pretrained_model/train_config.json",
        "train --help",
        "cache list",
        "doctor --dataset.repo_id=a/b",
    ],
)
def test_whole_paths_are_taken(monkeypatch, words):
    monkeypatch.setenv(SUBMITTED, "{}")
    for name in environment.PATHS:
        monkeypatch.delenv(name, raising=False)
    name, *flags = words.split()
    check_submitted(name, flags)


def test_its_environment_is_looked_at_as_well():
    result = job("ray_jobs.train", "--output_dir=/a", HF_LEROBOT_HOME="lh", **AS_SUBMITTED, timeout=60)
    assert result.returncode == 2 and "HF_LEROBOT_HOME=lh: " in result.stderr


# ---------------------------------------------------------------------- Ray's start


@pytest.mark.slow
def test_ray_is_started_once_more(monkeypatch):
    """On a busy machine its own time-out, of 30 s, may have been too short."""
    init, failed = ray.init, []

    def busy_at_first(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise Exception("The current node timed out during startup.")
        return init(*args, **kwargs)

    monkeypatch.setattr(ray, "init", busy_at_first)
    assert connect.start("local").result(timeout=180 * PATIENCE) is None
    assert ray.is_initialized() and failed


@pytest.mark.slow
def test_ray_that_does_not_start_is_a_failed_run(parts, tmp_path):
    (tmp_path / "file").touch()
    flags = tiny_act(parts, tmp_path / "run", "--ray.num_workers=1", "--ray.address=local")
    result = job("ray_jobs.train", *flags, RAY_TMPDIR=str(tmp_path / "file" / "below"))
    assert result.returncode == 1 and "failed: Ray does not start here, tried twice: " in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()
