"""The published recipes, word for word, on the real recording; and the demo from nothing to a picture."""

import json
from pathlib import Path

import pytest
import torch._inductor.config
import yaml
from conftest import ROOT, job, train_in_process
from vla import PLUGIN, save_base

from ray_jobs.engine.recipe import resolve

COMMANDS = ROOT.parent / "shared" / "seed" / "commands.json"
PI = [PLUGIN, "--policy.image_resolution=[28,28]"]
SMALL = {  # what a machine without a GPU and a network needs, appended to the published words
    "act_minimal": [
        "--policy.pretrained_backbone_weights=null",
        "--policy.dim_model=64",
        "--policy.n_heads=2",
    ],
    "act": ["--policy.pretrained_backbone_weights=null"],
    "diffusion": ["--policy.down_dims=[32,64]"],
    "pi0_minimal": [PLUGIN, "--wandb.mode=offline"],
    "pi0": PI,
    "pi05_minimal": [*PI, "--wandb.mode=offline"],
    "pi05": PI,
    "smolvla_minimal": ["--wandb.mode=offline"],
    "smolvla": ["--policy.resize_imgs_with_padding=[32,32]"],
}
LARGE = [name for name in SMALL if name.startswith(("pi", "smolvla"))]
TRANSLATED = {"dtype", "image_resolution", "gradient_checkpointing"}  # for SmolVLA


@pytest.fixture(scope="module")
def bases(real, models):
    """`lerobot/pi0_base` and its like, in tiny, fetched ahead."""
    for policy in ("pi0", "pi05", "smolvla"):
        save_base(policy, models / f"{policy}_base", real, models)
    return models


def command(name: str, real, output_dir, models=ROOT / "pretrained") -> list[str]:
    if not COMMANDS.is_file():
        pytest.skip(f"the published commands are not there ({COMMANDS})")
    words = json.loads(COMMANDS.read_text())[name]
    return [
        *words,
        f"--dataset.root={real}",
        f"--output_dir={output_dir}",
        f"--assets.dir={models}",
        "--steps=2",
        "--batch_size=2",
        "--num_workers=1",
        "--log_freq=1",
        *SMALL[name],
    ]


@pytest.mark.parametrize("name", LARGE)
def test_published_recipe_of_a_large_policy_trains(name, real, bases, tmp_path, no_network, monkeypatch):
    """Without a network, on a machine that cannot compile."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    flags = command(name, real, tmp_path / "run", bases)
    with torch._inductor.config.patch({"cpp.cxx": ("no-compiler",)}):
        summary, events = train_in_process(flags)
    assert summary["status"] == "finished"
    assert [e["step"] for e in events if e["kind"] == "log"] == [1, 2]
    notices = " ".join(e["text"] for e in events if e["kind"] == "notice")
    assert ("cannot compile" in notices) == ("--policy.compile_model=true" in flags)
    assert no_network == []


@pytest.mark.parametrize("name", SMALL)
def test_published_values_are_what_is_trained(name, real, bases, tmp_path):
    """Every `--policy.*` of the page arrives in the policy's config; none is dropped on the way."""
    flags = command(name, real, tmp_path / "run", bases)
    policy = resolve(flags).lerobot.policy
    changed = {word.partition("=")[0] for word in SMALL[name]}
    checked = 0
    for word in flags[: len(flags) - len(SMALL[name])]:
        flag, _, value = word.partition("=")
        leaf = flag.removeprefix("--policy.")
        if leaf == flag or flag in changed or leaf in ("path", "device", "push_to_hub"):
            continue
        if policy.type == "smolvla" and leaf in TRANSLATED:
            continue
        trained = getattr(policy, leaf)
        if isinstance(trained, str | Path):
            assert str(trained) == value or Path(value).name == Path(trained).name, word
        else:
            trained = list(trained) if isinstance(trained, tuple) else trained
            assert trained == yaml.safe_load(value) or trained == float(value), word
        checked += 1
    assert checked >= (0 if "minimal" in name else 15), checked


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
