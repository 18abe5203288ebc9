"""Bad input: every mistake is answered in one or two lines that say what was wrong and what would be right."""

import errno
import json
import os
import re
import shlex
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from huggingface_hub import constants

from ray_jobs.cli.resolve import resolve
from ray_jobs.cluster import connect
from ray_jobs.config.errors import InputError, RunError, StorageError, StorageFull
from ray_jobs.storage import hub
from support.commands import job, tiny_act, tiny_diffusion, train_in_process
from support.machine import small_disk
from support.refusals import check, refusal

STEP = "checkpoints/000002"
CAMERA = "observation.images.top"
PARQUET = "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"


@pytest.fixture
def act(parts, tmp_path) -> list[str]:
    """A command that is right."""
    return tiny_act(parts, tmp_path / "run")


def without(flags: list[str], *names: str) -> list[str]:
    return [flag for flag in flags if not flag.startswith(tuple(f"--{name}" for name in names))]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def overwrite_the_middle(path: Path) -> None:
    content = path.read_bytes()
    tenth = len(content) // 10
    path.write_bytes(content[:tenth] + bytes(4 * tenth) + content[5 * tenth :])


# What is right, and the flags that get to hear it.
VALUES = {
    "must be a whole number": "--batch_size=foo --batch_size=1.5 --policy.chunk_size=x --ray.num_workers=x",
    "must be a number": "--policy.optimizer_lr=fast",
    "must be true or false": "--resume=maybe --ray.ema=1",
    "must be a list": "--data.eval_episodes=3 --dataset.episodes=[a]",
    "must be a mapping": "--rename_map=a",
    "bracket": "--dataset.episodes=[1",
    "at least 1": "--steps=0 --steps=-1 --batch_size=0 --ray.grad_accumulation=0 --checkpoint.keep_last=0",
    "at least 0": "--num_workers=-1 --ray.num_workers=-1",
    "did you mean act?": "--policy.type=acts",
    "diffusion, eo1": "--policy.type=banana",
    "part_sorting, pusht": "--env.type=nonsense",
    "did you mean part_sorting?": "--env.type=part_sort",
    "cpu, cuda": "--policy.device=tpu",
    "pyav or torchcodec": "--dataset.video_backend=nonsense",
    "0 to 11": "--dataset.episodes=[99] --data.eval_episodes=[12]",
    "names an episode twice": "--data.eval_episodes=[1,1]",
    "no such file": "--config_path=/nowhere/train_config.json --policy.pretrained_path=/nowhere",
}


@pytest.mark.parametrize(
    ("wrong", "right"), [(wrong, right) for right, flags in VALUES.items() for wrong in flags.split()]
)
def test_wrong_value(act, wrong, right):
    message = refusal(*act, wrong)
    assert message.replace(" ", "").startswith(f"{wrong}:") and right in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        # unknown flags, and what is none
        ("--polcy.chunk_size=4", "unknown flag --polcy.chunk_size; did you mean --policy.chunk_size?"),
        ("--polcy.type=act", "did you mean --policy.type?"),  # and not --env.type
        ("--policy.chunk_sise=4", "did you mean --policy.chunk_size?"),
        ("--ray.workers=2", "did you mean --ray.num_workers?"),
        ("--dataset.batch_size=4", "did you mean --batch_size?"),
        ("--lr=1e-4", "did you mean --policy.optimizer_lr?"),
        ("--policy.horizon=8", "for act; python -m ray_jobs.train --policy.type=act --help"),
        ("--steps", "--steps=VALUE"),
        ("--steps --batch_size=4", "--steps=VALUE"),
        ("--dataset.repo_id=", "--dataset.repo_id=VALUE"),
        ("foo", "'foo' is not a flag"),
        ("-steps=4", "like --steps=1000"),
        # values that do not go together
        ("--policy.chunk_size=4", "--policy.n_action_steps=8 must not exceed --policy.chunk_size=4"),
        ("--policy.n_heads=5", "act cannot be built like this: embed_dim must be divisible by num_heads"),
        ("--policy.optimizer_lr=-1", "Invalid learning rate: -1"),
        ("--eval_steps=5", "--eval_steps=5 needs held-out episodes: --data.eval_episodes="),
        ("--ray.early_stopping=2", "--ray.early_stopping=2 needs validation: --data.eval_episodes="),
        ("--rename_map={a: b}", "--rename_map needs --policy.path"),
        ("--policy.push_to_hub=true", "--policy.push_to_hub=false"),
        ("--env.fps=3", "--env.type is missing"),
        ("--dataset.episodes=[-1]", "--dataset.episodes must be non-negative, got: [-1]"),
        (f"--data.eval_episodes={list(range(12))}", "none is left to train on"),
        ("--data.eval_episodes=[1] --dataset.eval_split=0.5", "exclude each other"),
        ("--dataset.eval_split=0.99", "--dataset.eval_split=0.99 leaves no training episode"),
        ("--dataset.eval_split=1.5", "--dataset.eval_split=1.5 must be at least 0 and less than 1"),
        ("--data.eval_episodes=[1] --data.eval_horizon=9", "8 actions"),
    ],
)
def test_wrong_flag(act, wrong, right):
    assert right in refusal(*act, *re.split(r" (?=--)", wrong))


def test_wrong_flag_of_diffusion(parts, tmp_path):
    for wrong, right in (
        (
            "--policy.horizon=10",
            "--policy.horizon=10 must be a multiple of 2 ** (number of --policy.down_dims)",
        ),
        ("--policy.n_action_steps=8", "7 actions"),
        ("--policy.crop_shape=[100,100]", "(3, 64, 64)"),
        ("--policy.optimizer_betas=[1]", "Invalid beta"),
    ):
        assert right in refusal(*tiny_diffusion(parts, tmp_path / "run", wrong))


def test_missing_flags(act):
    assert "--dataset.repo_id is missing" in refusal()
    assert "--dataset.repo_id is missing" in refusal(*without(act, "dataset.repo_id"))
    for incomplete in (without(act, "policy"), without(act, "policy.type")):
        message = refusal(*incomplete)
        assert "--policy.type=act" in message and "--policy.path=" in message


def test_last_of_a_repeated_flag_counts(act):
    assert resolve([*act, "--policy.device=cuda", "--policy.device=cpu"]).device == "cpu"


@pytest.mark.parametrize("network", ["refused", "silent", "offline"])
@pytest.mark.parametrize("name", ["dataset.repo_id", "policy.path", "config_path"])
def test_hub_out_of_reach(act, monkeypatch, network, name):
    replaced = {"dataset.repo_id": "dataset", "policy.path": "policy.type"}.get(name, name)
    flags = [*without(act, replaced), f"--{name}=nobody/nothing"]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        port = silent.getsockname()[1] if network == "silent" else 1
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", network == "offline")
        monkeypatch.setattr(hub, "HUB_WAIT_S", 0.5)
        begin = time.monotonic()
        message = refusal(*flags)
    assert time.monotonic() - begin < 10
    assert f"--{name}=nobody/nothing" in message and "cannot be reached" in message


def test_wandb_login(act, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    flags = [*act, "--wandb.enable=true"]
    assert "--wandb.mode=offline" in refusal(*flags)
    assert "--wandb.mode=ofline: must be" in refusal(*flags, "--wandb.mode=ofline")
    check(*flags, "--wandb.mode=offline")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check(*flags)


@pytest.mark.parametrize(
    ("file", "spoil", "right"),
    [
        ("", shutil.rmtree, "no such folder"),
        ("meta", shutil.rmtree, "no meta/info.json"),
        ("meta/info.json", truncate, "meta/info.json is damaged"),
        ("meta/info.json", edit(lambda info: info.pop("features")), "meta/info.json is damaged"),
        ("meta/info.json", edit(lambda info: info.update(codebase_version="v4.0")), "v4.0"),
        ("meta/info.json", edit(lambda info: info.update(total_episodes=13)), "13 episodes"),
        ("meta/info.json", edit(lambda info: info["features"].pop("action")), "a column action, which"),
        ("meta/info.json", edit(lambda info: info["features"].pop(CAMERA)), "at least one image"),
        ("meta/stats.json", edit(lambda stats: stats["action"].pop("std")), "has no std of action"),
        ("meta/stats.json", edit(lambda stats: stats.pop(CAMERA)), f"no statistics of {CAMERA}"),
        ("meta/stats.json", Path.unlink, "meta/stats.json is missing"),
        (
            "meta/stats.json",
            edit(lambda stats: stats["action"].update(unit=["rad"])),
            "action has something else than numbers",
        ),
        ("meta/episodes", shutil.rmtree, "meta/episodes is missing"),
        ("meta/tasks.parquet", truncate, "meta/tasks.parquet is damaged"),
        (PARQUET, Path.unlink, f"{PARQUET} (episode 0 is in it) is missing"),
        (PARQUET, truncate, f"{PARQUET} (episode 0 is in it) is damaged"),
        ("videos", shutil.rmtree, f"{VIDEO} (episode 0 is in it) is missing"),
        (VIDEO, lambda path: path.write_bytes(b""), f"{VIDEO} (episode 0 is in it) is damaged"),
    ],
)
def test_data_set(parts, tmp_path, file, spoil, right):
    root = shutil.copytree(parts, tmp_path / "parts")
    spoil(root / file)
    assert right in refusal(*tiny_act(root, tmp_path / "run"))


@pytest.mark.parametrize("file", [VIDEO, PARQUET])
def test_damage_within_a_file_is_found_while_reading(parts, tmp_path, file):
    root = shutil.copytree(parts, tmp_path / "parts")
    overwrite_the_middle(root / file)
    with pytest.raises(RunError) as failed:
        train_in_process(tiny_act(root, tmp_path / "run", "--dataset.episodes=[3]", "--steps=2"))
    message = str(failed.value)
    assert str(root / file) in message and "episode" in message and len(message.splitlines()) <= 2


@pytest.mark.parametrize(
    ("file", "spoil", "right"),
    [
        ("pretrained_model/model.safetensors", truncate, "model.safetensors is damaged"),
        ("training_state/optimizer_state.safetensors", truncate, "optimizer_state.safetensors is damaged"),
        ("training_state/rng_state.safetensors", Path.unlink, "rng_state.safetensors is missing"),
        ("training_state/training_step.json", lambda path: path.write_text(""), "training_step.json is not"),
        ("training_state/training_step.json", lambda path: path.write_text("{}"), "holds no step"),
        ("pretrained_model/policy_preprocessor.json", truncate, "policy_preprocessor.json is damaged"),
        ("../../options.json", lambda path: path.write_text("{"), "options.json is damaged"),
    ],
)
def test_torn_checkpoint(parts, run, tmp_path, file, spoil, right):
    torn = shutil.copytree(run, tmp_path / "run", symlinks=True)
    spoil(torn / STEP / file)
    assert right in refusal(*tiny_act(parts, torn, "--resume=true", "--steps=4"))
    config = torn / STEP / "pretrained_model/train_config.json"
    assert right in refusal(f"--config_path={config}", "--resume=true", "--steps=4")


def test_resume(parts, run, act, tmp_path):
    resume = ("--resume=true", "--steps=4")
    assert "nothing to resume" in refusal(*act, *resume)
    assert "larger --steps" in refusal(*tiny_act(parts, run, "--resume=true", "--steps=2"))
    assert "asks for diffusion" in refusal(*tiny_diffusion(parts, run, *resume))
    message = refusal(*tiny_act(parts, run, *resume, "--policy.chunk_size=16"))
    assert "(8, 32)" in message and "(16, 32)" in message
    first = run / "checkpoints/000001/pretrained_model/train_config.json"
    assert "newer checkpoint, 000002" in refusal(f"--config_path={first}", *resume)
    # A run that was moved goes on where it lies now.
    moved = shutil.copytree(run, tmp_path / "moved", symlinks=True)
    resolved = resolve([f"--config_path={moved / STEP / 'pretrained_model'}", *resume])
    assert resolved.output_dir == moved


@pytest.mark.parametrize("names", [["front"], ["front", "left"]])
def test_cameras_of_a_pretrained_policy(run, act, tmp_path, names):
    folder = shutil.copytree(run / STEP / "pretrained_model", tmp_path / "policy")
    cameras = {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, 64, 64]} for name in names}
    state = {"observation.state": {"type": "STATE", "shape": [3]}}
    edit(lambda config: config.update(input_features=state | cameras))(folder / "config.json")
    flags = [*without(act, "policy.type"), f"--policy.path={folder}"]
    message = refusal(*flags)
    assert all(key in message for key in [*cameras, *state, CAMERA])
    hint = [word for word in shlex.split(message) if word.startswith("--rename_map=")]
    assert len(hint) == (len(names) == 1)  # one camera cannot stand for two
    if hint:
        check(*flags, *hint)


def test_pretrained_policy(parts, run, act, tmp_path):
    flags = without(act, "policy.type")
    message = refusal(*flags, f"--policy.path={run}")
    assert "no config.json" in message and f"{run}/checkpoints/last/pretrained_model" in message
    folder = shutil.copytree(run / STEP / "pretrained_model", tmp_path / "policy")
    check(*flags, f"--policy.path={folder}")
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(*flags, f"--policy.path={folder}")
    assert "both --policy.path and" in refusal(*act, f"--policy.path={folder}")
    flag = f"--policy.pretrained_path={run / STEP}/pretrained_model"
    assert "type act, not diffusion" in refusal(*tiny_diffusion(parts, tmp_path / "run", flag))


def test_output_dir(parts, run, tmp_path):
    assert "--resume=true to continue" in refusal(*tiny_act(parts, run))
    (tmp_path / "never_begun").mkdir()
    check(*tiny_act(parts, tmp_path / "never_begun"))  # made ahead: a mounted disk, say
    (tmp_path / "link").symlink_to(tmp_path / "never_begun")
    check(*tiny_act(parts, tmp_path / "link"))
    (tmp_path / "never_begun/.driver").touch()
    check(*tiny_act(parts, tmp_path / "never_begun"))  # its worker had no data set, say
    (tmp_path / "file").touch()
    assert "--resume" not in refusal(*tiny_act(parts, tmp_path))  # there is no run in it
    assert "is a file" in refusal(*tiny_act(parts, tmp_path / "file"))
    assert "file is a file, not a folder" in refusal(*tiny_act(parts, tmp_path / "file/run"))
    assert "cannot be written" in refusal(*tiny_act(parts, Path("/proc/run")))


def test_disk_without_room_for_a_checkpoint(parts, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        act = tiny_act(parts, disk / "run")
        message = refusal(*act)
        assert "0.00 GB are free" in message and "0.13 GB" in message
        check(*act, "--save_checkpoint=false")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EIO, StorageError),
        (errno.EACCES, InputError),
    ],
)
def test_folder_that_cannot_be_written(act, monkeypatch, number, kind):
    """What a search does then depends on it: end, try again, go on with the next trial."""

    def fail(dir):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(InputError, match="cannot be written") as refused:
        check(*act)
    assert type(refused.value) is kind


def left_behind(mark: str) -> list[str]:
    """Processes that still carry a job's environment half a minute after it ended."""
    for _ in range(60):
        processes = [process.info for process in psutil.process_iter(["name", "environ"])]
        names = [p["name"] for p in processes if (p["environ"] or {}).get("RAY_JOBS_TEST") == mark]
        if not names:
            break
        time.sleep(0.5)
    return names


@pytest.mark.parametrize(
    ("flag", "status", "right"),
    [
        ("--batchsize=4", 2, "error: unknown flag --batchsize; did you mean --batch_size?\n"),
        ("--ray.num_workers=0", 1, "failed: cannot read"),
    ],
)
def test_command(parts, tmp_path, flag, status, right):
    root, mark = shutil.copytree(parts, tmp_path / "parts"), uuid.uuid4().hex
    overwrite_the_middle(root / VIDEO)
    flags = ("--steps=2", "--dataset.episodes=[3]", "--ray.address=local", flag)
    result = job("ray_jobs.train", *tiny_act(root, tmp_path / "run", *flags), RAY_JOBS_TEST=mark)
    assert result.returncode == status, result.stderr
    assert result.stderr.startswith(right) and len(result.stderr.splitlines()) <= 2, result.stderr
    if status == 2:
        assert result.stdout == "" and not (tmp_path / "run").exists()
    assert left_behind(mark) == []


def test_no_ray_at_the_address(parts, tmp_path):
    """Somebody listens there, but no Ray: its dashboard, say. Ray itself would try for 14 minutes."""
    with ThreadingHTTPServer(("", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = tiny_act(parts, tmp_path / "run", f"--ray.address=127.0.0.1:{server.server_port}")
        result = job("ray_jobs.train", *flags, timeout=60)
        server.shutdown()
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: cannot reach Ray at {flags[-1]}: no Ray answers"), result.stderr
    assert len(result.stderr.splitlines()) == 2 and not (tmp_path / "run").exists(), result.stderr


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265", "localhost"])
def test_addresses_of_other_kinds(monkeypatch, address):
    """One for Ray's client, one for `ray job submit`, one without a port: as a flag and in the shell."""
    with pytest.raises(InputError, match=f"--ray.address={address}: must be the host:port"):
        connect.start(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"RAY_ADDRESS={address}: must be the host:port"):
        connect.start("auto")


def test_backbone_weights_out_of_reach(parts, tmp_path, monkeypatch):
    """LeRobot's default backbone is a download: refused before the run where it cannot be had."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", refuse)
    flags = [f for f in tiny_act(parts, tmp_path / "run") if "backbone_weights" not in f]
    with pytest.raises(InputError, match="cannot be downloaded") as refused:
        check(*flags)
    assert "pretrained_backbone_weights=null" in str(refused.value) and "resnet18" in str(refused.value)


def refuse(*args, **kwargs):
    raise OSError("no network")
