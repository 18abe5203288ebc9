"""A LeRobot plugin (`--discover_packages_path=colour_follower`) with a policy that needs no training: it goes to the part
it sees, and carries it towards the bin of its colour. Good enough to succeed in some episodes and to fail in others.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.optim import AdamConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

COLOURS = torch.tensor([[214, 40, 40], [24, 90, 220]]) / 255
BINS = torch.tensor([[-0.78, 0.0], [0.78, 0.0]])


@PreTrainedConfig.register_subclass("colour_follower")
@dataclass
class ColourFollowerConfig(PreTrainedConfig):
    n_action_steps: int = 1
    chunk_size: int = 1
    release_at: float = 0.18  # distance to the bin's centre at which it lets go; above 0.22 beside the bin
    normalization_mapping: dict = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )
    observation_delta_indices = reward_delta_indices = None
    action_delta_indices = (0,)

    def get_optimizer_preset(self):
        return AdamConfig(lr=1e-3)

    def get_scheduler_preset(self):
        return None

    def validate_features(self):
        pass


class ColourFollowerPolicy(PreTrainedPolicy):
    config_class = ColourFollowerConfig
    name = "colour_follower"

    def __init__(self, config, **kwargs):
        super().__init__(config)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def reset(self):
        pass

    def get_optim_params(self):
        return self.parameters()

    def forward(self, batch):
        return (self.unused - 1).square().sum(), {}  # something to train

    def predict_action_chunk(self, batch, **kwargs):
        return self.select_action(batch)[:, None]

    def select_action(self, batch, **kwargs):
        actions = zip(batch["observation.images.top"], batch["observation.state"], strict=True)
        return torch.stack([self._act(image, state) for image, state in actions])

    def _act(self, image, state):
        size = image.shape[-1]
        centres = (torch.arange(size) + 0.5) * 2.2 / size - 1.1
        place = torch.stack(torch.meshgrid(centres, -centres, indexing="xy"), -1)  # (H, W, 2) of the table
        seen = [(image - colour[:, None, None]).abs().amax(0) < 0.1 for colour in COLOURS]
        away = (place - state[:2]).norm(dim=-1)
        if state[2] > 0:
            near = [int((mask & (away < 0.15)).sum()) for mask in seen]
            goal = BINS[int(near[1] > near[0])]
            arrived = (state[:2] - goal)[0].abs() < self.config.release_at
            return torch.tensor([goal[0], state[1].clamp(-0.5, 0.5), -1.0 if arrived else 1.0])
        todo = (seen[0] | seen[1]) & (place[..., 0].abs() < 0.56)
        if not todo.any():
            return torch.tensor([state[0], state[1], -1.0])
        first = place.flatten(0, 1)[torch.where(todo, away, torch.inf).argmin()]
        of_it = todo & ((place - first).norm(dim=-1) < 0.25)
        goal = place[of_it].mean(0)
        return torch.tensor([*goal, 1.0 if (goal - state[:2]).norm() < 0.1 else -1.0])


def make_colour_follower_pre_post_processors(config, dataset_stats=None, **kwargs):
    features, norm = {**config.input_features, **config.output_features}, config.normalization_mapping
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device="cpu"),
        NormalizerProcessorStep(features=features, norm_map=norm),
    ]
    after = [
        UnnormalizerProcessorStep(features=config.output_features, norm_map=norm),
        DeviceProcessorStep(device="cpu"),
    ]
    return PolicyProcessorPipeline(
        steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME
    ), PolicyProcessorPipeline(
        steps=after,
        name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )


def save(folder: Path, image_size: int = 64) -> Path:
    """Write a `pretrained_model` folder that stock LeRobot opens."""
    config = ColourFollowerConfig(
        device="cpu",
        input_features={
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size)),
            "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (3,))},
    )
    ColourFollowerPolicy(config).save_pretrained(folder)
    for pipeline in make_colour_follower_pre_post_processors(config):
        pipeline.save_pretrained(folder)
    return folder
