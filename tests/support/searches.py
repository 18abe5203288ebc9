"""Searches: space files, and what they leave."""

from pathlib import Path

import optuna
import yaml

from ray_jobs import tune
from ray_jobs.search.plan import make_plan, read_command
from ray_jobs.search.spaces.chosen import read_spaces

ACT = {
    "policy": "act",
    "baseline": {
        "policy.chunk_size": 8,
        "policy.n_action_steps": 8,
        "policy.dim_model": 32,
        "policy.n_heads": 2,
        "policy.dim_feedforward": 64,
        "policy.n_encoder_layers": 1,
        "policy.n_vae_encoder_layers": 1,
        "policy.latent_dim": 8,
        "policy.use_vae": True,
        "policy.kl_weight": 10.0,
        "policy.optimizer_lr": 1e-5,
    },
    "search": {
        "policy.optimizer_lr": {"low": 1e-5, "high": 1e-2, "log": True},
        "policy.chunk_size": {"low": 6, "high": 10, "step": 2},
        "policy.n_action_steps": {"same_as": "policy.chunk_size"},
        "policy.use_vae": {"choices": [True, False]},
        "policy.kl_weight": {"low": 1.0, "high": 100.0, "log": True, "when": {"policy.use_vae": True}},
    },
}


def space_file(folder: Path, content: dict = ACT, name: str = "space") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def search(*flags: str) -> int:
    """Run the tuner in this process, on the session's cluster, as `python -m ray_jobs.tune` does."""
    return tune.main(list(flags))


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")


def plan_of(folder: Path, root: Path, content: dict, *more: str, resume: bool = False):
    command = [
        f"--space={space_file(folder, content)}",
        f"--dataset.root={root}",
        "--dataset.repo_id=local/numbers",
    ]
    command += [
        "--policy.device=cpu",
        "--policy.pretrained_backbone_weights=null",
        "--steps=4",
        f"--output_dir={folder / 'run'}",
        "--data.eval_episodes=[1]",
        *more,
    ]
    if resume:
        command += ["--resume=true"]
    typed, options, resume, notices = read_command(command)
    return make_plan(typed, options, read_spaces(typed, notices), resume, notices, print)


SPACE = {
    "policy": "act",
    "baseline": {"policy.optimizer_lr": 1e-4},
    "search": {"policy.optimizer_lr": {"low": 1e-5, "high": 1e-3, "log": True}},
}


def on_numbers(root: Path) -> list[str]:
    """Flags of searches on a data set without cameras: a step takes milliseconds."""
    return [
        "--dataset.repo_id=local/numbers",
        f"--dataset.root={root}",
        "--policy.device=cpu",
        "--policy.pretrained_backbone_weights=null",
        "--batch_size=4",
        "--num_workers=0",
        "--data.eval_episodes=[2,4]",
        "--seed=5",
    ]
