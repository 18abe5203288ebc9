"""The published recipes, word for word, on the real recording; and the demo from nothing to a picture."""

import json

import pytest
from conftest import ROOT, job, train_in_process

from ray_jobs.engine.recipe import resolve

COMMANDS = ROOT.parent / "shared" / "seed" / "commands.json"
SMALL = {  # what a machine without a GPU and a network needs, appended to the published words
    "act_minimal": [
        "--policy.pretrained_backbone_weights=null",
        "--policy.dim_model=64",
        "--policy.n_heads=2",
    ],
    "act": ["--policy.pretrained_backbone_weights=null"],
    "diffusion": ["--policy.down_dims=[32,64]"],
}


def command(name: str, real, output_dir) -> list[str]:
    if not COMMANDS.is_file():
        pytest.skip(f"the published commands are not there ({COMMANDS})")
    words = json.loads(COMMANDS.read_text())[name]
    return [
        *words,
        f"--dataset.root={real}",
        f"--output_dir={output_dir}",
        "--steps=2",
        "--batch_size=2",
        "--num_workers=1",
        "--log_freq=1",
        *SMALL[name],
    ]


@pytest.mark.parametrize("name", ["act_minimal", "diffusion"])
def test_published_recipe_trains(name, real, tmp_path):
    summary, events = train_in_process(command(name, real, tmp_path / "run"))
    assert summary["status"] == "finished"
    assert [e["step"] for e in events if e["kind"] == "log"] == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "000002" / "pretrained_model" / "model.safetensors").is_file()


def test_published_recipe_on_ray(real, tmp_path):
    """The long ACT command as a user types it: one line for the renamed flag, one for the missing GPU."""
    result = job("ray_jobs.train", *command("act", real, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.count("--eval_freq is called --env_eval_freq today") == 1
    assert result.stdout.count("No cuda device on this machine") == 1
    assert "precision bf16" in result.stdout  # --policy.use_amp=true is honoured
    assert "step 2/2  loss" in result.stdout


def test_device_is_the_workers(real, tmp_path):
    """A driver without a GPU remembers that cuda was asked for: workers with GPUs will use them."""
    assert resolve(command("act", real, tmp_path / "run")).device == "cuda"


def test_demo_from_nothing(tmp_path):
    """Records, searches, draws; a second run uses the recording again and overwrites nothing."""
    flags = (f"--output_dir={tmp_path}", "--episodes=4", "--steps=2", "--trials=2")
    first = job("ray_jobs.demo", *flags)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert "published   val/action_error" in first.stdout and "trial 0001" in first.stdout
    assert (tmp_path / "search-1" / "predicted_against_recorded.png").stat().st_size > 10_000
    before = (tmp_path / "search-1" / "trials.csv").read_bytes()
    second = job("ray_jobs.demo", *flags)
    assert second.returncode == 0 and "using the 4 recorded episodes" in second.stdout
    assert (tmp_path / "search-1" / "trials.csv").read_bytes() == before
    wrong = job("ray_jobs.demo", "--episode=4")
    assert wrong.returncode == 2 and "--episode" in wrong.stderr and "Traceback" not in wrong.stderr
