"""Run by itself, under any LeRobot: what checkpoints do with recorded frames.

    python acting.py FRAMES.npz CHECKPOINT=OUTPUT.npy ...

Each frame goes through the checkpoint's own processors and `predict_action_chunk`, with the noise of a fixed seed.
"""

import os
import sys

import numpy as np
import torch


def from_pretrained(policy_class, config, checkpoint: str):
    return policy_class.from_pretrained(checkpoint, config=config)


def act(checkpoint: str, frames: dict[str, np.ndarray], task: str, load=from_pretrained) -> np.ndarray:
    """(frames, chunk, dims)"""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(checkpoint)
    config.device = "cpu"
    policy = load(get_policy_class(config.type), config, checkpoint).eval()
    on_cpu = {"preprocessor_overrides": {"device_processor": {"device": "cpu"}}}  # wherever it was trained
    before, after = make_pre_post_processors(config, pretrained_path=checkpoint, **on_cpu)
    actions = []
    for number in range(len(next(iter(frames.values())))):
        frame = {key: torch.from_numpy(values[number]) for key, values in frames.items()}
        policy.reset()
        torch.manual_seed(number)
        with torch.no_grad():
            batch = before({**frame, "task": task})
            if config.type == "diffusion":
                action = torch.stack(
                    [policy.select_action(dict(batch)) for _ in range(config.n_action_steps)], 1
                )
            else:
                action = policy.predict_action_chunk(batch)
            actions.append(after(action)[0].numpy())
    return np.stack(actions)


if __name__ == "__main__":
    if "PI_GEMMA" in os.environ:
        import openpi_transformers

        openpi_transformers.install()
    import tiny_vla  # noqa: F401

    recorded = dict(np.load(sys.argv[1]))
    name = str(recorded.pop("task"))
    for pair in sys.argv[2:]:
        folder, _, output = pair.partition("=")
        np.save(output, act(folder, recorded, name))
