"""Flags that were typed and will have no effect, each with the reason: said before the training, since they are written down
with the others. (What a checkpoint overrules is refused, see `resume`.)"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lerobot.datasets import LeRobotDatasetMetadata

from ray_jobs.data.reader import FrameReader

if TYPE_CHECKING:
    from ray_jobs.config.recipe import Recipe

# The beginnings of the flags' names, whether they are idle, and why.
Rule = tuple[tuple[str, ...], Callable[["Recipe", LeRobotDatasetMetadata], bool], str]
RULES: tuple[Rule, ...] = (
    (
        ("optimizer.", "scheduler."),
        lambda recipe, meta: recipe.lerobot.use_policy_training_preset and not recipe.lerobot.resume,
        "the policy brings its own (--policy.optimizer_lr and its like), unless --use_policy_training_preset=false",
    ),
    (
        ("policy.optimizer_", "policy.scheduler_"),
        lambda recipe, meta: not recipe.lerobot.use_policy_training_preset,
        "with --use_policy_training_preset=false, --optimizer.* and --scheduler.* decide",
    ),
    (
        ("policy.use_amp",),
        lambda recipe, meta: hasattr(recipe.lerobot.policy, "dtype"),
        "of this policy --policy.dtype decides",
    ),
    (
        ("policy.pretrained_backbone_weights",),
        lambda recipe, meta: recipe.lerobot.policy.pretrained_path is not None and not recipe.lerobot.resume,
        "all weights come from the policy that the training begins from",
    ),
    (
        ("policy.tokenizer_", "policy.pad_language_to"),
        lambda recipe, meta: recipe.lerobot.policy.pretrained_path is not None and not recipe.lerobot.resume,
        "texts are prepared as for the policy that the training begins from",
    ),
    (
        ("prefetch_factor", "dataloader_multiprocessing_context"),
        lambda recipe, meta: _reads_ahead_without_processes(recipe, meta),
        "batches are not read by processes of torch's here",
    ),
    (("dataset.return_uint8",), lambda recipe, meta: True, "images are read as uint8, by lerobot-train as well"),
    (("eval.", "env_eval_freq"), lambda recipe, meta: recipe.lerobot.env is None, "--env.type names no simulator"),
    (
        ("max_eval_samples", "data.eval_horizon", "data.eval_timing"),
        lambda recipe, meta: not recipe.eval_steps,
        "nothing is validated, see --eval_steps",
    ),
    (
        ("save_freq", "checkpoint."),
        lambda recipe, meta: not recipe.lerobot.save_checkpoint,
        "with --save_checkpoint=false there are no checkpoints",
    ),
    (
        ("data.shuffle_buffer",),
        lambda recipe, meta: recipe.options.data.source != "stream",
        "all of a data set that lies here is shuffled; that is for --data.source=stream",
    ),
    (("data.cache",), lambda recipe, meta: recipe.options.data.source == "stream", "a stream is not kept"),
    (
        ("ray.cpus_per_worker", "ray.gpus_per_worker", "ray.placement", "ray.max_failures", "ray.hang_timeout"),
        lambda recipe, meta: recipe.options.ray.num_workers == 0,
        "with --ray.num_workers=0 all runs in this process",
    ),
)  # fmt: skip
NOTHING = ("0", "off", "null", "false")  # typed to have no effect


def notices(recipe: "Recipe", meta: LeRobotDatasetMetadata) -> list[str]:
    """One line for each reason."""
    told = []
    for names, idle, why in RULES:
        typed = [
            f for f, value in recipe.command.items() if f.startswith(names) and value.lower() not in NOTHING
        ]
        if typed and idle(recipe, meta):
            told.append(f"{', '.join(f'--{flag}' for flag in typed)}: no effect, for {why}.")
    return told


def _reads_ahead_without_processes(recipe: "Recipe", meta: LeRobotDatasetMetadata) -> bool:
    transforms = recipe.lerobot.dataset.image_transforms.enable
    return recipe.options.data.source == "stream" or (
        FrameReader.can_read(SimpleNamespace(meta=meta)) and not transforms
    )
