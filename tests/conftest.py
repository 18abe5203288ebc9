"""Data, recipes and a Ray cluster shared by all tests.

Most tests run on data the project makes itself: the part-sorting task, recorded once per session. Tests that
need the real recording look for it at `../shared/datasets` and are skipped where it is not there.

On a machine with a GPU, `RAY_JOBS_TEST_DEVICE=cuda NVIDIA_TF32_OVERRIDE=0` compares the bare loop with LeRobot there:
`pytest tests/end_to_end/test_parity.py tests/end_to_end/test_policies.py -k "not two and not sharded and not sharding"`.

On a machine that is busy with other things, `RAY_JOBS_TEST_PATIENCE=4` waits four times as long before a process is taken to
hang. What a test says of seconds stays as it is.
"""

import socket
from pathlib import Path

import pytest

from ray_jobs.cli.terminal import doing
from ray_jobs.cluster import connect
from support.commands import REAL, tiny_act, train_in_process

connect.before_ray()  # some tests import Ray themselves


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
    from support.vla import make_models

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
