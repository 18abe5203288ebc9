"""Data, recipes and a Ray cluster shared by all tests.

Most tests run on data the project makes itself: the part-sorting task, recorded once per session. Tests that
need the real recording look for it at `../shared/datasets` and are skipped where it is not there.

On a machine with a GPU, `RAY_JOBS_TEST_DEVICE=cuda NVIDIA_TF32_OVERRIDE=0` compares the bare loop with LeRobot there:
`pytest tests/test_parity.py tests/test_policies.py -k "not two and not sharded and not sharding"`.

On a machine that is busy with other things, `RAY_JOBS_TEST_PATIENCE=4` waits four times as long before a process is taken to
hang. What a test says of seconds stays as it is.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs.cli.terminal import doing, quiet
from ray_jobs.cluster import connect

quiet()
# Before torch is imported. Threads that wait for others by spinning keep a core from them, where several processes train on
# two: steps take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Nor shall it matter which processor the tests run on: with AVX-512 sums are rounded in another order. In 20 steps of
# diffusion our losses and LeRobot's came apart by 1.1e-4 of that alone on a new one, and by 1.1e-5 without.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
# In the background of a shell Ctrl-C is ignored, and would be by all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if "RAY_JOBS_CACHE" not in os.environ:  # the processes that tests start share it
    CACHE = tempfile.TemporaryDirectory(prefix="ray_jobs_cache_")  # decoded frames of all tests
    os.environ["RAY_JOBS_CACHE"] = CACHE.name

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = str(
    ROOT / "tests"
)  # where Ray's workers and other processes find the tests' plugins
REAL = ROOT.parent / "shared" / "datasets" / "g1_yellow_bottle"
DEVICE = os.environ.get("RAY_JOBS_TEST_DEVICE", "cpu")  # of the bare loop
PATIENCE = float(os.environ.get("RAY_JOBS_TEST_PATIENCE", "1"))  # with other processes


@pytest.fixture(autouse=True, scope="module")
def ray_of_the_module():
    """A Ray that a module's tests have started in this process ends with them: others kill Ray's processes."""
    yield
    if connect._ready is not None:
        connect._ready.exception()  # however long: no job waits here, but other modules' tests come
    connect.leave()
    connect._ready = None


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """What a job that a test has refused was about to do is not told on: a job's process would have ended."""
    yield
    doing("")


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """12 episodes of part sorting, one 64 px camera: a LeRobot v3.0 video data set."""
    from ray_jobs.part_sorting.record import record

    return record(tmp_path_factory.mktemp("data") / "parts", episodes=12, image_size=64, seed=7)


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory) -> Path:
    """A finished ACT run of two steps, with a checkpoint of each."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    train_in_process(tiny_act(parts, output_dir, "--steps=2", "--save_freq=1"))
    return output_dir


@pytest.fixture(scope="session")
def real() -> Path:
    """The real recording (Unitree G1, 20 episodes, 240x320)."""
    if not REAL.is_dir():
        pytest.skip(f"the real recording is not there ({REAL})")
    return REAL


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder for `--assets.dir` with PaliGemma's tokenizer and SmolVLM2, in tiny."""
    from vla import make_models

    return make_models(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def no_network(monkeypatch, tmp_path) -> list[str]:
    """An empty Hub cache, and every look-up of a host's name noted (in the list) and refused."""
    from huggingface_hub import constants

    from ray_jobs.policies import assets

    hosts = []

    def refuse(host, *args, **kwargs):
        hosts.append(host)
        raise socket.gaierror(f"no network in this test: {host}")

    monkeypatch.setattr(assets, "USERS_CACHE", tmp_path / "hub_cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return hosts


def _common(root: Path, output_dir: Path) -> list[str]:
    return [
        "--dataset.repo_id=local/parts",
        f"--dataset.root={root}",
        "--dataset.video_backend=pyav",
        f"--policy.device={DEVICE}",
        "--policy.push_to_hub=false",
        "--policy.pretrained_backbone_weights=null",
        f"--output_dir={output_dir}",
        "--batch_size=4",
        "--num_workers=1",
        "--log_freq=1",
        "--env_eval_freq=0",
    ]


def tiny_act(root: Path, output_dir: Path, *more: str) -> list[str]:
    """Flags of an ACT small enough for a CPU test; `more` overrides."""
    return [
        *_common(root, output_dir),
        "--policy.type=act",
        "--policy.chunk_size=8",
        "--policy.n_action_steps=8",
        "--policy.dim_model=32",
        "--policy.n_heads=2",
        "--policy.dim_feedforward=64",
        "--policy.n_encoder_layers=1",
        "--policy.n_vae_encoder_layers=1",
        "--policy.latent_dim=8",
        *more,
    ]


def tiny_diffusion(root: Path, output_dir: Path, *more: str) -> list[str]:
    """Flags of a Diffusion Policy small enough for a CPU test; `more` overrides."""
    return [
        *_common(root, output_dir),
        "--policy.type=diffusion",
        "--policy.down_dims=[32,64]",
        "--policy.horizon=8",
        "--policy.n_action_steps=4",
        "--policy.n_groups=4",
        "--policy.diffusion_step_embed_dim=16",
        "--policy.spatial_softmax_num_keypoints=8",
        "--policy.num_train_timesteps=10",
        *more,
    ]


def train_in_process(flags: list[str]) -> tuple[dict, list[dict]]:
    """Run the bare loop; returns its summary and the events it reported."""
    from ray_jobs.checks import preflight
    from ray_jobs.cli.resolve import resolve
    from ray_jobs.training import loop

    recipe = resolve(flags)
    recipe = preflight.check(recipe)
    events: list[dict] = []
    return loop.train(recipe, device=DEVICE, report=events.append), events


def job(*args: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """Run `python -m <args>` as a user would and capture what it prints."""
    return subprocess.run(
        [sys.executable, "-m", *args],
        capture_output=True,
        text=True,
        timeout=timeout * PATIENCE,
        cwd=ROOT,
        env={**os.environ, **env},
    )


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of that size, in memory; skips the test where it can't be had."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def free_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def stock(module: str, *args: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """Run one of LeRobot's own scripts (`lerobot_train`, `lerobot_eval`); fails the test if it fails."""
    result = job(f"lerobot.scripts.{module}", *args, timeout=timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    return result
