"""Checkpoints handed to LeRobot 0.4.4 in a Python 3.11 of its own: the same actions on recorded observations."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lerobot.policies import pi_gemma

from ray_jobs import export
from ray_jobs.config.errors import InputError
from ray_jobs.policies import export as export_policy
from ray_jobs.training.checkpoint import pretrained_dir
from support.commands import ROOT, job, train_in_process
from support.vla import ALL, acting, record_frames, tiny


@pytest.fixture(scope="module")
def trained(real, models, tmp_path_factory):
    """The run of a policy; SmolVLA's as it is published, with its language model in bfloat16."""
    folder = tmp_path_factory.mktemp("trained")
    short = ["--steps=2", "--batch_size=2", "--num_workers=0", "--dataset.episodes=[0]"]

    @functools.cache
    def run(policy: str) -> Path:
        more = ["--policy.load_vlm_weights=true"] * (policy == "smolvla")
        train_in_process(tiny(policy, real, folder / policy, models, *short, *more))
        return folder / policy

    yield run
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """An environment with Python 3.11 and LeRobot 0.4.4; `LEROBOT_04_PYTHON` names one that is there."""
    if "LEROBOT_04_PYTHON" in os.environ:
        return os.environ["LEROBOT_04_PYTHON"]
    uv, folder = shutil.which("uv"), tmp_path_factory.mktemp("lerobot04") / "env"
    if uv is None:
        pytest.skip("there is no uv to make a Python 3.11 environment with")
    made = subprocess.run([uv, "venv", "--python=3.11", folder], capture_output=True, text=True, cwd=ROOT)
    if made.returncode:
        pytest.skip(f"there is no Python 3.11: {made.stderr.strip().splitlines()[-1]}")
    interpreter = str(folder / "bin" / "python")
    install = [uv, "pip", "install", f"--python={interpreter}", "lerobot[smolvla]==0.4.4"]
    subprocess.run(install, check=True, capture_output=True, cwd=ROOT)
    return interpreter


@pytest.mark.slow
def test_actions_in_lerobot_04_are_those_of_today(trained, python, real, models, tmp_path, monkeypatch):
    """20 recorded observations, within 1e-5. For pi0 and pi0.5 the test stands in for the transformers that 0.4.4 asks
    for, which no registry has (see openpi_transformers.py)."""
    copies = {policy: tmp_path / policy for policy in ALL}
    for policy, copy in copies.items():
        flags = f"--checkpoint={trained(policy)}", f"--output_dir={copy}"
        result = job("ray_jobs.export", "--lerobot=0.4", *flags)
        assert result.returncode == 0 and result.stderr == "", result.stderr
    frames = record_frames(real, tmp_path / "frames.npz", 20)
    originals = {policy: pretrained_dir(trained(policy)) for policy in ALL}
    today = acting(sys.executable, frames, originals, models, tmp_path / "today")
    monkeypatch.setenv("PI_GEMMA", pi_gemma.__file__)
    then = acting(python, frames, copies, models, tmp_path / "then")
    for policy in ALL:
        assert today[policy].shape[0] == 20
        np.testing.assert_allclose(then[policy], today[policy], rtol=0, atol=1e-5, err_msg=policy)


def test_what_04_refuses_is_left_out(trained, tmp_path):
    """`config.json` keeps all else; the original is not touched; nothing is overwritten."""
    source = pretrained_dir(trained("pi0"))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    export_policy.export(source, tmp_path / "pi0", assets_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    ours, copied = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "pi0"))
    assert ours.keys() - copied.keys() == {
        "pretrained_revision",
        "use_relative_actions",
        "relative_exclude_joints",
        "action_feature_names",
    }
    steps = json.loads((tmp_path / "pi0" / "policy_preprocessor.json").read_text())["steps"]
    assert not {step["registry_name"] for step in steps} & set(export_policy.DROPPED_STEPS)
    with pytest.raises(InputError, match="already exists"):
        export.main(["--lerobot=0.4", f"--checkpoint={trained('pi0')}", f"--output_dir={tmp_path / 'pi0'}"])


@pytest.mark.parametrize(
    ("policy", "field", "value", "said"),
    [
        (
            "pi0",
            "use_relative_actions",
            True,
            "--policy.use_relative_actions=true, which LeRobot 0.4 has not",
        ),
        ("smolvla", "load_vlm_weights", False, "the actions would be others"),
        ("act", "type", "tdmpc", "act, diffusion, pi0, pi05, smolvla can be exported"),
    ],
)
def test_what_cannot_be_expressed(trained, tmp_path, policy, field, value, said):
    shutil.copytree(pretrained_dir(trained(policy)), tmp_path / "changed")
    file = tmp_path / "changed" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(InputError, match=said) as refused:
        export_policy.export(tmp_path / "changed", tmp_path / "copy", assets_dir=tmp_path)
    assert len(str(refused.value).splitlines()) <= 2 and not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--checkpoint=x --output_dir=y", "--lerobot is missing, as in --lerobot=0.4"),
        ("--lerobot=0.3 --checkpoint=x --output_dir=y", "only 0.4 is known"),
        ("--lerobot=0.4 --checkpoint=/nowhere --output_dir=y", "there is no checkpoint"),
        ("--lerobot=0.4 --onnx=true", "unknown flag --onnx"),
    ],
)
def test_wrong_flags(flags, said):
    with pytest.raises(InputError, match=said):
        export.main(flags.split())
