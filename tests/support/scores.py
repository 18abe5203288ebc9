"""Validations of a policy, scored."""

from pathlib import Path

import torch
from accelerate import Accelerator
from lerobot.policies import make_policy

from ray_jobs.cli.resolve import resolve
from ray_jobs.data.dataset import make_datasets
from ray_jobs.policies.build import make_processors
from ray_jobs.training.validation import Validation
from support.commands import tiny_act

HELD_OUT = [0, 2]


SCORES = ("val/loss", "val/action_error", "val/action_error_raw")


def built(root: Path, *flags: str, policy_class=None, checkpoint: Path | None = None):
    """A policy, untrained or a checkpoint's, with its processors, its config and the held-out episodes."""
    if checkpoint is None:
        cfg = resolve(tiny_act(root, root.parent / "unused", *flags)).lerobot
    else:
        path = checkpoint / "pretrained_model"
        cfg = resolve([f"--policy.path={path}", *tiny_act(root, root.parent / "unused")[:3], *flags]).lerobot
    dataset, held_out = make_datasets(cfg, HELD_OUT)
    torch.manual_seed(0)
    policy = make_policy(cfg.policy, ds_meta=dataset.meta)
    if policy_class is not None:
        policy = policy_class(policy.config)
    processors = make_processors(cfg, policy, dataset.meta.stats, torch.device("cpu"))
    return policy, processors, cfg.policy, held_out


def score(policy, processors, policy_cfg, held_out, **kwargs) -> dict:
    validation = Validation(held_out, policy_cfg, **{"horizon": None, **kwargs})
    return validation(policy, *processors, Accelerator(cpu=True))
