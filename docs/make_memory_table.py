"""The table of policies.md: the memory that a training will take per worker, as it is estimated before it starts.

    python docs/make_memory_table.py

Full-size policies on two cameras of 480x640 and 14 joints, eight samples a step, built on torch's meta device: nothing is
fetched, and no GPU is needed. SmolVLA is not among them: its size comes with the files that it starts from.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from types import SimpleNamespace

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_policy_config

from ray_jobs.config.options import Options
from ray_jobs.policies.build import outline
from ray_jobs.training.memory import Memory, estimate

BATCH_SIZE = 8
CAMERA = PolicyFeature(FeatureType.VISUAL, (3, 480, 640))
FEATURES = {
    "observation.images.top": CAMERA,
    "observation.images.wrist": CAMERA,
    "observation.state": PolicyFeature(FeatureType.STATE, (14,)),
    "action": PolicyFeature(FeatureType.ACTION, (14,)),
}
CHECKPOINTED, EXPERT = {"gradient_checkpointing": True}, {"train_expert_only": True}


def memory_of(kind: str, settings: dict, workers: int) -> Memory:
    """Per worker; with several the policy is sharded (`--ray.parallelism=fsdp`)."""
    policy = make_policy_config(kind, push_to_hub=False, device="cpu", **settings)
    options = Options()
    options.ray.num_workers, options.ray.parallelism = workers, "fsdp" if workers > 1 else "ddp"
    asked = SimpleNamespace(policy=policy, batch_size=BATCH_SIZE, optimizer=policy.get_optimizer_preset())
    recipe = SimpleNamespace(lerobot=asked, options=options)
    return estimate(outline(policy, FEATURES), recipe, FEATURES)


def main() -> None:
    print("| policy | flags | weights | gradients, optimizer | activations, roughly | together, GB |")
    print("|---|---|---|---|---|---|")
    rows = [("act", {}, 1), ("diffusion", {}, 1)]
    for kind in ("pi0", "pi05"):
        rows += [(kind, {"dtype": "float32", **CHECKPOINTED}, 1)]
        rows += [
            (kind, {"dtype": "bfloat16"} | more, 1) for more in ({}, CHECKPOINTED, CHECKPOINTED | EXPERT)
        ]
        rows += [(kind, {"dtype": "bfloat16", **CHECKPOINTED}, 4)]
    for kind, settings, workers in rows:
        memory = memory_of(kind, settings, workers)
        flags = [f"`--policy.{name}={str(value).lower()}`" for name, value in settings.items()]
        flags += [f"`--ray.parallelism=fsdp --ray.num_workers={workers}`"] if workers > 1 else []
        parts = (memory.weights, memory.gradients + memory.optimizer, memory.activations, memory.total)
        print(
            f"| {kind} | {' '.join(flags)} | {' | '.join(f'{part / 1e9:.1f}' for part in parts)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
