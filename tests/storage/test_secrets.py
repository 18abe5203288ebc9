"""Keys of W&B and of a bucket stay in the environment: nothing that a run leaves behind has them in it."""

import shutil
import tempfile
from pathlib import Path

import fsspec
import psutil
import pytest

from support.buckets import Bucket
from support.commands import tiny_act, train_in_process
from support.processes import Run
from support.searches import space_file

SECRETS = {
    "WANDB_API_KEY": "f00dfeed" * 5,
    "AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKEFAKE",
    "AWS_SECRET_ACCESS_KEY": "5ecre7+5ecre7/5ecre75ecre75ecre75ecre7aa",
    "HF_TOKEN": "hf_fakefakefakefakefakefakefakefakefa",
}


def leaks(*folders: Path) -> list[str]:
    """Files with a secret in them, or in their names; compressed ones are as good as sealed, and not looked into."""
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            hits = [k for k, v in SECRETS.items() if v.encode() in content or v in str(path)]
            found += [f"{path}: {name}" for name in hits]
    return found


def test_grep_finds(tmp_path):
    (tmp_path / "log").write_text(f"key={SECRETS['WANDB_API_KEY']}")
    assert leaks(tmp_path) == [f"{tmp_path / 'log'}: WANDB_API_KEY"]


def test_nothing_in_a_run(parts, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    flags = ("--steps=2", "--wandb.enable=true", "--wandb.mode=offline", "--wandb.disable_artifact=true")
    train_in_process(tiny_act(parts, tmp_path / "run", *flags))
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert leaks(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "bucket"])
@pytest.mark.parametrize("what", ["train", "tune"])
def test_nothing_in_a_run_on_ray(parts, tmp_path, monkeypatch, what, where):
    """Outputs, also those that were sent to a bucket with the keys, W&B's folders, Ray's session folder with all its logs,
    and the arguments of every process."""
    # W&B's process of the tests, which outlives a killed worker.
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    scratch = Path(tempfile.mkdtemp(prefix="rj_"))  # short: Ray's sockets lie in it
    left, place, env = tmp_path / "run", tmp_path / "run", dict(SECRETS)
    if where == "bucket":
        server, place = Bucket(), "s3://bucket/run"
        env |= {"AWS_ENDPOINT_URL": server.address, "RAY_JOBS_CACHE": str(tmp_path / "cache")}
        keys = {"key": SECRETS["AWS_ACCESS_KEY_ID"], "secret": SECRETS["AWS_SECRET_ACCESS_KEY"]}
        system = fsspec.filesystem("s3", endpoint_url=server.address, skip_instance_cache=True, **keys)
        system.mkdir("bucket")
    try:
        flags = ["--steps=30", "--wandb.enable=true", "--wandb.mode=offline", "--ray.address=local"]
        flags = tiny_act(parts, place, *flags)
        if what == "tune":
            flags = [f for f in flags if not f.startswith("--policy.type")]
            flags += [f"--space={space_file(tmp_path)}", "--tune.num_samples=4", "--tune.scheduler=none"]
        run = Run(flags, job=f"ray_jobs.{what}", **env, RAY_TMPDIR=str(scratch))
        run.wait_for("step 5/30" if what == "train" else " at step")
        arguments = [
            " ".join(process.cmdline()) for process in (*run.family(), psutil.Process(run.process.pid))
        ]
        for process in run.family():
            if any(name in " ".join(process.cmdline()) for name in ("RayTrainWorker", "ImplicitFunc")):
                process.kill()  # its end is logged, too
        assert run.end() == 0, run.printed
        assert not [words for words in (*arguments, run.printed) if any(v in words for v in SECRETS.values())]
        if where == "bucket":
            system.get(place, str(left), recursive=True)
        assert list(scratch.rglob("*.log")) and list(left.rglob("offline-run-*/*.wandb"))
        assert leaks(left, tmp_path / "cache", scratch) == []
    finally:
        if where == "bucket":
            server.end()
        shutil.rmtree(scratch, ignore_errors=True)
