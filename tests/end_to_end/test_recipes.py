"""The published recipes, word for word, on the real recording; and the demo from nothing to a picture."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch._inductor.config
import yaml

from ray_jobs.cli.resolve import resolve
from ray_jobs.config.events import Log, Notice
from support.commands import ROOT, job, train_in_process
from support.processes import Run
from support.vla import PLUGIN, save_base

COMMANDS = ROOT.parent / "shared" / "seed" / "commands.json"
PI = [PLUGIN, "--policy.image_resolution=[28,28]"]
SMALL = {  # what a machine without a GPU and a network needs, appended to the published words
    "act_minimal": [
        "--policy.dim_model=64",
        "--policy.n_heads=2",
    ],
    "act": [],
    "diffusion": ["--policy.down_dims=[32,64]"],
    "pi0_minimal": [PLUGIN, "--wandb.mode=offline"],
    "pi0": PI,
    "pi05_minimal": [*PI, "--wandb.mode=offline"],
    "pi05": PI,
    "smolvla_minimal": ["--wandb.mode=offline"],
    "smolvla": ["--policy.image_resolution=[32,32]"],
}
LARGE = [name for name in SMALL if name.startswith(("pi", "smolvla"))]


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
    assert [e.step for e in events if isinstance(e, Log)] == [1, 2]
    notices = " ".join(e.text for e in events if isinstance(e, Notice))
    assert ("cannot compile" in notices) == ("--policy.compile_model=true" in flags)
    assert no_network == []


# ---------------------------------------------------------------------- every flag of the page

PAGE = COMMANDS.with_name("model_training.txt")
POLICIES = ("act", "diffusion", "pi0", "pi05", "smolvla")  # in the page's order
TODAY = {"eval_freq": "env_eval_freq", "policy.path": "policy.pretrained_path"}
SMOLVLAS = {"policy.image_resolution": "policy.resize_imgs_with_padding", "policy.dtype": "policy.use_amp"}
SMOLVLAS_VALUES = {"policy.dtype": "false"}
# What the tables' flags are set to where not any other value than LeRobot's own will do.
FITTING = {
    "dataset.repo_id": "some/where",
    "resume": "false",  # there is nothing to resume
    "policy.device": "cpu",
    "policy.n_obs_steps": "1",  # the large policies and ACT take no other
    "policy.n_action_steps": "7",
    "policy.horizon": "24",
    "policy.vision_backbone": "resnet34",
    "policy.pretrained_backbone_weights": "ResNet34_Weights.IMAGENET1K_V1",
    "policy.use_group_norm": "false",
    "policy.resize_shape": "[90,120]",
    "policy.crop_ratio": "0.5",
    "policy.crop_shape": "[45,60]",
    "policy.down_dims": "[64,128]",
    "policy.noise_scheduler_type": "DDIM",
    "policy.prediction_type": "sample",
    "policy.num_inference_steps": "9",
    "policy.beta_schedule": "linear",
    "policy.scheduler_name": "linear",
    "policy.compile_mode": "default",
    "policy.paligemma_variant": "gemma_300m",
    "policy.action_expert_variant": "gemma_2b",
    "policy.vlm_model_name": "some/vlm",
    "policy.attention_mode": "self_attn",
    "policy.optimizer_betas": "[0.8,0.9]",
    "policy.image_resolution": "[112,112]",
    "policy.load_vlm_weights": "true",
}


def arrived(recipe, flag: str):
    """The value of one of the page's flags in a resolved recipe, as YAML has it."""
    if flag == "policy.device":
        return recipe.device  # LeRobot's own is this machine's
    if recipe.lerobot.policy.type == "smolvla":
        flag = SMOLVLAS.get(flag, flag)
    value = recipe.lerobot
    for part in TODAY.get(flag, flag).split("."):
        value = getattr(value, part)
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def assert_arrived(recipe, flag: str, typed: str) -> None:
    if recipe.lerobot.policy.type == "smolvla":
        typed = SMOLVLAS_VALUES.get(flag, typed)
        if flag == "policy.gradient_checkpointing":
            assert any(flag in notice for notice in recipe.notices)  # SmolVLA has nothing to set
            return
    value, expected = arrived(recipe, flag), yaml.safe_load(typed)
    if isinstance(value, float):
        expected = float(expected)  # YAML reads 1e-5 as a word
    assert value == expected, f"--{flag}={typed} became {value}"


@pytest.mark.parametrize("name", SMALL)
def test_published_commands_are_honoured(name, real, bases, tmp_path):
    """Every flag of the nine commands, what the test appends included: its value is in the resolved recipe."""
    words = command(name, real, tmp_path / "run", bases)
    recipe = resolve(words)
    typed = dict(word[2:].partition("=")[::2] for word in words)
    theirs = {flag: value for flag, value in typed.items() if not flag.startswith(("assets.", "discover"))}
    assert len(theirs) >= (10 if "minimal" in name else 37)
    for flag, value in theirs.items():
        assert_arrived(recipe, flag, value)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_the_pages_tables_are_honoured(policy, tmp_path):
    """Every row: set to what is not LeRobot's default, that is what the resolved recipe has."""
    if not PAGE.is_file():
        pytest.skip(f"the published page is not there ({PAGE})")
    sections = re.split(r"^\d\. .*$", PAGE.read_text(), flags=re.M)[1:]
    row = re.compile(r"^([a-z_]+(?:\.[a-z_]+)?)(?=[A-Z])", flags=re.M)  # the name, before its description
    rows = row.findall(sections[POLICIES.index(policy)])
    assert len(rows) == {"act": 25, "diffusion": 36, "smolvla": 33}.get(policy, 32)
    untouched = resolve(
        [f"--policy.type={policy}", "--dataset.repo_id=a/b", f"--output_dir={tmp_path / 'a'}"]
    )
    typed = {
        "dataset.repo_id": "a/b",
        "dataset.root": str(tmp_path),
        "output_dir": str(tmp_path / "b"),
        "job_name": "mine",
    }
    if policy == "smolvla":
        typed |= {"policy.dtype": "float32", "policy.gradient_checkpointing": "false"}
    elif policy.startswith("pi"):
        typed["policy.dtype"] = "bfloat16"
    elif policy == "diffusion":
        typed["policy.n_obs_steps"] = "3"
    for flag in rows:
        if flag in typed:
            continue
        default = None if flag in FITTING or flag == "policy.type" else arrived(untouched, flag)
        if isinstance(default, bool):
            typed[flag] = str(not default).lower()
        elif isinstance(default, int | float):
            typed[flag] = str(default * 2 or 1)
        else:
            typed[flag] = FITTING.get(flag, policy)
    recipe = resolve([f"--{flag}={value}" for flag, value in typed.items()])
    for flag, value in typed.items():
        assert_arrived(recipe, flag, value)


# ---------------------------------------------------------------------- trained


@pytest.mark.parametrize("name", ["act_minimal", "diffusion"])
def test_published_recipe_trains(name, real, bases, tmp_path):
    summary, events = train_in_process(command(name, real, tmp_path / "run", bases))
    assert summary["status"] == "finished"
    assert [e.step for e in events if isinstance(e, Log)] == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "000002" / "pretrained_model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_published_recipe_on_ray(real, bases, tmp_path):
    """The long ACT command as a user types it: one line for the renamed flag, one for the missing GPU."""
    result = job("ray_jobs.train", *command("act", real, tmp_path / "run", bases))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.count("--eval_freq is called --env_eval_freq today") == 1
    assert result.stdout.count("No cuda device on this machine") == 1
    assert "precision bf16" in result.stdout  # --policy.use_amp=true is honoured
    assert "step 2/2  loss" in result.stdout


def test_device_is_the_workers(real, tmp_path):
    """A driver without a GPU remembers that cuda was asked for: workers with GPUs will use them."""
    assert resolve(command("act", real, tmp_path / "run")).device == "cuda"


DEMO = ("--episodes=4", "--steps=2", "--trials=2", "--rollouts=1")


def test_demo_from_nothing(tmp_path):
    """Records, searches, draws, drives."""
    first = job("ray_jobs.demo", f"--output_dir={tmp_path}", *DEMO)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert "baseline    val/action_error" in first.stdout and "trial 0001" in first.stdout
    assert len(list(tmp_path.glob("search-1/evaluation/*/predicted_against_recorded.png"))) == 2
    assert "In the simulator" in (tmp_path / "search-1" / "report.html").read_text()
    wrong = job("ray_jobs.demo", "--episode=4")
    assert wrong.returncode == 2 and "--episode" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_demo_again(tmp_path):
    """It uses the recording again and overwrites nothing; the last one is ended by Ctrl-C."""
    flags = (f"--output_dir={tmp_path}", *DEMO)
    assert job("ray_jobs.demo", *flags).returncode == 0
    before = (tmp_path / "search-1" / "trials.csv").read_bytes()
    second = job("ray_jobs.demo", *flags)
    assert second.returncode == 0 and "using the 4 recorded episodes" in second.stdout
    third = Run(flags, job="ray_jobs.demo")
    third.wait_for("using the 4 recorded episodes")
    third.wait_for("searching with 2 trials")
    third.process.send_signal(signal.SIGINT)
    assert third.end() == 130 and "Traceback" not in third.printed, third.printed
    assert (tmp_path / "search-1" / "trials.csv").read_bytes() == before
