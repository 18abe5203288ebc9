"""`val/action_error` is the number it says it is, and means the same however a run was set up."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lerobot.policies.act.modeling_act import ACTPolicy

from ray_jobs.config.errors import InputError
from ray_jobs.config.events import Log, Validated
from ray_jobs.training.validation import Validation
from support.commands import tiny_act, tiny_diffusion, train_in_process
from support.data_sets import make
from support.scores import HELD_OUT, SCORES, built, score

FLAGS = {
    "act": tiny_act,
    "diffusion": lambda *args: [*tiny_diffusion(*args), "--policy.pretrained_backbone_weights=null"],
}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Path:
    """Four episodes of different lengths without cameras; the action's last dimension never moves."""
    return make(tmp_path_factory.mktemp("objective") / "numbers", [23, 17, 9, 20], seed=1)


# ---------------------------------------------------------------------- the number


class Constant(ACTPolicy):
    """Predicts one chunk, whatever it sees."""

    def __init__(self, config):
        super().__init__(config)
        self.chunk = torch.randn(config.chunk_size, 3, generator=torch.Generator().manual_seed(4))

    def predict_action_chunk(self, batch):
        return self.chunk.expand(len(batch["observation.state"]), -1, -1)


@pytest.mark.parametrize("horizon", [8, 3])
def test_equals_the_formula(numbers, horizon):
    """A policy that predicts the same chunk everywhere, against the definition written out in numpy."""
    policy, processors, cfg, held_out = built(numbers, policy_class=Constant)
    ours = score(policy, processors, cfg, held_out, horizon=horizon, detailed=True)

    table = pd.concat(map(pd.read_parquet, sorted(numbers.glob("data/*/*.parquet"))))
    everything = np.stack(table["action"]).astype(np.float64)
    std = everything.std(0)
    predicted = policy.chunk.numpy() * std + everything.mean(0)
    per_episode = []
    for episode in HELD_OUT:
        actions = everything[table["episode_index"] == episode]
        steps = [
            abs(predicted[h] - actions[t + h])
            for t in range(len(actions))
            for h in range(horizon)
            if t + h < len(actions)
        ]
        per_episode.append(np.mean(steps, axis=0))
    raw = np.mean(per_episode, axis=0)
    assert std[2] == 0, "the last dimension was not meant to move"
    assert ours["val/action_error_raw"] == pytest.approx(raw, rel=1e-5, abs=1e-6)
    assert ours["val/action_error"] == pytest.approx(np.mean(raw[:2] / std[:2]), rel=1e-5)
    for h, error in enumerate(ours["val/action_error_over_horizon"]):
        actions = [everything[table["episode_index"] == episode][h:] for episode in HELD_OUT]
        alone = np.mean([abs(predicted[h] - a).mean(0) for a in actions], axis=0)
        assert error == pytest.approx(np.mean(alone[:2] / std[:2]), rel=1e-5)


def test_perfect_and_shifted_predictions(numbers):
    """Replaying the record scores 0; being wrong by one standard deviation everywhere scores 1."""

    class Replay(Constant):
        offset = 0.0

        def predict_action_chunk(self, batch):
            return batch["action"] + self.offset  # normalised: in standard deviations

    parts = built(numbers, policy_class=Replay)
    assert score(*parts)["val/action_error"] == pytest.approx(0, abs=1e-6)
    parts[0].offset = 1.0
    assert score(*parts)["val/action_error"] == pytest.approx(1, rel=1e-5)


# ---------------------------------------------------------------------- what it does not depend on


def validated(root: Path, output_dir: Path, policy: str, *flags: str) -> dict:
    """What a run of one step reports whose weights do not move (a learning rate of 0)."""
    frozen = ["--policy.optimizer_lr=0"] + ["--policy.optimizer_lr_backbone=0"] * (policy == "act")
    run = (f"--data.eval_episodes={HELD_OUT}", "--steps=1", "--save_checkpoint=false", *frozen, *flags)
    _, events = train_in_process(FLAGS[policy](root, output_dir, *run))
    event = next(event for event in events if isinstance(event, Validated))
    return {key: event.values[key] for key in SCORES}


@pytest.fixture(scope="module")
def plain(numbers, tmp_path_factory) -> dict:
    """The scores of the unchanged recipes."""
    folder = tmp_path_factory.mktemp("plain")
    return {policy: validated(numbers, folder / policy, policy) for policy in FLAGS}


@pytest.mark.parametrize(
    ("policy", "flags"),
    [
        ("act", ("--policy.n_action_steps=1",)),
        ("act", ("--batch_size=1", "--ray.grad_accumulation=2")),
        ("act", ("--policy.kl_weight=1000",)),
        ("act", ("--num_workers=0", "--ray.ema=true")),
        ("diffusion", ("--policy.n_action_steps=1",)),
        ("diffusion", ("--policy.n_action_steps=7", "--batch_size=7")),
    ],
    ids=str,
)
def test_same_weights_same_value(numbers, plain, tmp_path, policy, flags):
    """To the last digit, whatever the run executes of a chunk, trains with, or weighs in its loss."""
    assert validated(numbers, tmp_path / "run", policy, *flags) == plain[policy]


def test_weights_and_seed_do_change_it(numbers, plain, tmp_path):
    """The counterpart of the test above: other weights, another value."""
    assert validated(numbers, tmp_path / "run", "act", "--seed=5") != plain["act"]


def test_longer_chunk_with_the_same_beginning(numbers):
    """A chunk of 16 scores like a policy that predicts only its first 8 actions, with --data.eval_horizon=8."""
    long, processors, long_cfg, long_data = built(
        numbers, "--policy.chunk_size=16", "--policy.n_action_steps=16"
    )

    class First8(ACTPolicy):
        def predict_action_chunk(self, batch):
            return long.predict_action_chunk(batch)[:, :8]

    first, _, first_cfg, first_data = built(numbers, policy_class=First8)
    of_long = score(long, processors, long_cfg, long_data, horizon=8)
    of_first = score(first, processors, first_cfg, first_data)
    for key in SCORES[1:]:
        assert of_long[key] == of_first[key]
    assert score(long, processors, long_cfg, long_data)["val/action_error"] != of_long["val/action_error"]


def test_horizon_beyond_the_chunk_is_refused(numbers):
    parts = built(numbers)
    with pytest.raises(InputError, match="eval_horizon=9: the policy predicts 8 actions"):
        score(*parts, horizon=9)


@pytest.mark.parametrize("ema", ["false", "true"])
def test_report_is_what_the_saved_policy_scores(numbers, tmp_path, ema):
    """The checkpoint loaded afresh scores what the run reported; with --ray.ema that is the average."""
    flags = tiny_act(
        numbers,
        tmp_path / "run",
        f"--data.eval_episodes={HELD_OUT}",
        "--steps=3",
        "--policy.optimizer_lr=0.01",
        f"--ray.ema={ema}",
    )
    summary, _ = train_in_process(flags)
    afresh = score(*built(numbers, checkpoint=Path(summary["checkpoint"])))
    for key in SCORES:
        assert summary["last"][key] == afresh[key]


# ---------------------------------------------------------------------- which frames, and what it leaves alone


@pytest.mark.parametrize(
    ("max_frames", "expected"), [(4, [[0, 22], [23, 31]]), (6, [[0, 11, 22], [23, 27, 31]])]
)
def test_few_frames_are_spread_over_episodes_and_time(numbers, max_frames, expected):
    """--max_eval_samples takes frames of every episode, from its first to its last."""
    *_, cfg, held_out = built(numbers)  # held-out rows: 0 to 22, and 23 to 31
    groups = Validation(held_out, cfg, horizon=None, max_frames=max_frames).groups
    assert [rows for _, rows in groups] == expected


def test_one_frame_per_episode_at_least(numbers):
    *_, cfg, held_out = built(numbers)
    groups = Validation(held_out, cfg, horizon=None, max_frames=1).groups
    assert [position for position, rows in groups if len(rows) == 1] == [0, 1]


@pytest.mark.parametrize("policy", FLAGS)
def test_validation_leaves_the_training_alone(numbers, tmp_path, policy):
    """Losses and gradients are the same, bit for bit, with a validation every other step and without any."""

    def losses(name: str, *flags: str) -> list:
        run = FLAGS[policy](numbers, tmp_path / name, "--steps=6", "--save_checkpoint=false", *flags)
        _, events = train_in_process(run)
        return [(e.values["train/loss"], e.values["train/grad_norm"]) for e in events if isinstance(e, Log)]

    with_it = losses("with", f"--data.eval_episodes={HELD_OUT}", "--eval_steps=2")
    assert with_it == losses("without", "--dataset.episodes=[1,3]")
    assert len(with_it) == 6
