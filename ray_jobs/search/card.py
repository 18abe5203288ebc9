"""The model card of a search's best policy: what it was trained on, how, how good it is, and how sure that is."""

import importlib.metadata
import re
from pathlib import Path

from huggingface_hub import ModelCardData
from lerobot.utils.constants import PRETRAINED_MODEL_DIR

from ray_jobs.checks.dataset import open_dataset
from ray_jobs.search.plan import Plan
from ray_jobs.search.spaces.space import PRETRAINED
from ray_jobs.storage.records import SUCCESS

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write(plan: Plan, summary: dict, checkpoint: Path) -> Path:
    """Write README.md beside the weights, where `hf upload` and the Hub expect it; returns the file.

    Args:
        summary: Of the search, see `results.write`.
        checkpoint: The copy of the best trial's checkpoint.
    """
    best, baseline = summary["best"], summary["baseline"]
    cfg, config = plan.recipe.lerobot, best["config"]
    meta = open_dataset(cfg.dataset)
    start = config.get(PRETRAINED) or plan.typed.get(PRETRAINED) or plan.typed.get("policy.path")
    on_the_hub = start if start and HUB_NAME.fullmatch(str(start)) and not Path(str(start)).exists() else None
    licence = plan.typed.get("policy.license")
    data = ModelCardData(
        library_name="lerobot",
        pipeline_tag="robotics",
        license=licence,
        datasets=[cfg.dataset.repo_id] if "/" in cfg.dataset.repo_id else None,
        base_model=on_the_hub,
        tags=["robotics", "lerobot", best["policy"]],
    )
    simulated = ""
    if cfg.env is not None and SUCCESS in best["values"]:
        simulated = f"`{SUCCESS}` is the share of {cfg.eval.n_episodes} episodes of {cfg.env.type} in which it succeeded. "
    held_out = plan.recipe.options.data.eval_episodes
    which = (
        f"episodes {held_out}"
        if held_out is not None
        else f"the last {cfg.dataset.eval_split:.0%} of every task, rounded up"
    )
    values = [["", "best", *(["baseline"] if baseline else [])]]
    rows = [row for row in (best, baseline) if row]
    for metric in best["values"]:
        values.append([metric, *(f"{row['values'][metric]:.4g}" for row in rows)])
    if "mean" in best:
        values.append(["mean over seeds", *(f"{row['mean']:.4g}" if "mean" in row else "" for row in rows)])
        values.append(
            [
                "spread over seeds (largest - smallest)",
                *(f"{row['spread']:.2g}" if "spread" in row else "" for row in rows),
            ]
        )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("lerobot", "torch", "ray-jobs")
    )
    seeds = len(best.get("seeds", [0]))
    text = f"""---
{data.to_yaml()}
---

# {best["policy"]} on {cfg.dataset.repo_id}

The best of {summary["trials"]} trials of a hyper-parameter search, {summary["steps"]} training steps each (this checkpoint: step
{best["step"]}). `command.sh` in the search's folder trains the same configuration in full.

## Data

{cfg.dataset.repo_id}: {meta.total_episodes} episodes, {meta.total_frames} frames at {meta.fps} fps, robot {meta.robot_type or "not named"}.
Held out from training: {which}.

## How good it is

{_table(values)}

`val/action_error` is the mean absolute error of the first {summary["horizon"]} predicted actions in standard deviations of the
recorded ones, on the held-out episodes. {simulated}{"One seed: nothing is known about its spread." if seeds == 1 else f"{seeds} seeds."}

## Recipe

{_table([["flag", "value"], *([key, str(value)] for key, value in sorted(config.items()))])}

Trained with {versions}.

## Use

    lerobot-eval --policy.path=THIS_REPOSITORY --env.type=...

## Licence

{f"{licence}." if licence else "None was chosen (`--policy.license` of the search names one)."}
{f"The weights were trained on from {start}, whose licence holds for them." if start else ""}
The data has a licence of its own: see its card.
"""
    file = checkpoint / PRETRAINED_MODEL_DIR / "README.md"
    file.unlink(missing_ok=True)  # the copy is made of links
    file.write_text(text)
    return file


def _table(rows: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])
