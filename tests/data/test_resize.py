"""`--data.resize`: what is trained on small images resizes full-size ones by itself, in stock LeRobot."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.policies import get_policy_class, make_pre_post_processors

from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError
from ray_jobs.storage.cache_folder import default_folder
from ray_jobs.storage.records import read_json, read_metrics
from support.commands import stock, tiny_act, tiny_diffusion, train_in_process
from support.scores import HELD_OUT, built, score

SIZE = [32, 48]  # of 64x64
RUN = ["--batch_size=2", "--steps=6", "--save_freq=3", f"--data.resize={SIZE}"]
CAMERA = "observation.images.top"


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory) -> Iterator[Path]:
    """An ACT with held-out episodes and a Diffusion Policy, with its observation history."""
    folder = tmp_path_factory.mktemp("resize")
    held_out = [f"--data.eval_episodes={HELD_OUT}", "--eval_steps=6"]
    train_in_process(tiny_act(parts, folder / "act", *RUN, *held_out, "--dataset.episodes=[0,1,2]"))
    train_in_process(tiny_diffusion(parts, folder / "diffusion", *RUN, "--dataset.episodes=[1]"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("policy_type", ["act", "diffusion"])
def test_checkpoint_resizes_what_it_is_given(runs, parts, policy_type):
    """Config and processors say so, and a full-size frame leads to the action that the resized one leads to."""
    path = runs / policy_type / "checkpoints" / "last" / "pretrained_model"
    shape = [3, *SIZE]
    assert read_json(path / "config.json")["input_features"][CAMERA]["shape"] == shape
    assert read_json(path / "train_config.json")["policy"]["input_features"][CAMERA]["shape"] == shape
    policy = get_policy_class(policy_type).from_pretrained(path)
    before, after = make_pre_post_processors(policy.config, pretrained_path=path)
    frame = LeRobotDataset("local/parts", root=parts, video_backend="pyav")[0]
    frame = {key: value for key, value in frame.items() if key.startswith("observation.")}
    assert before(dict(frame))[CAMERA].shape == (1, *shape)

    def action(observation: dict) -> torch.Tensor:
        policy.reset()
        torch.manual_seed(0)
        return after(policy.select_action(before(observation)))

    small = torch.nn.functional.interpolate(frame[CAMERA][None], SIZE, mode="bilinear", antialias=True)[0]
    assert torch.allclose(action(dict(frame)), action(frame | {CAMERA: small}), atol=1e-4)


def test_validation_sees_what_the_robot_will(runs, parts):
    """The run's own score, on frames from the cache, is that of full-size frames through the saved processors."""
    full_size = score(*built(parts, checkpoint=runs / "act" / "checkpoints" / "last"))
    recorded = read_metrics(runs / "act")[-1]
    assert recorded["val/action_error"] == pytest.approx(full_size["val/action_error"], rel=1e-3)
    assert any(default_folder().glob(f"*.{CAMERA}.{SIZE[0]}x{SIZE[1]}.*"))


def test_drives_the_robot_at_full_size(runs):
    """`lerobot-eval` in the simulator, whose camera has 64x64 pixels."""
    stock(
        "lerobot_eval",
        f"--policy.path={runs / 'act' / 'checkpoints' / 'last' / 'pretrained_model'}",
        "--policy.device=cpu",
        "--env.type=part_sorting",
        "--env.discover_packages_path=ray_jobs.part_sorting",
        "--env.image_size=64",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        "--eval.use_async_envs=false",
        f"--output_dir={runs / 'eval'}",
    )
    assert read_json(runs / "eval" / "eval_info.json")["overall"]["n_episodes"] == 1


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_resumes_exactly(runs, parts, tmp_path, cache):
    """Stopped at step 3 and gone on with frames from the cache or without it: the same weights, bit for bit."""
    out = tmp_path / "run"
    flags = tiny_diffusion(parts, out, *RUN, "--dataset.episodes=[1]", f"--data.cache={cache}")
    train_in_process([*flags, "--steps=3"])
    train_in_process([*flags, "--resume=true"])
    ours, whole = (
        run / "checkpoints/000006/pretrained_model/model.safetensors" for run in (out, runs / "diffusion")
    )
    assert ours.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "value, said",
    [
        ("[32]", "height and width"),
        ("32", "height and width|list"),
        ("[0,32]", "height and width"),
        ("[128,128]", r"larger than the recorded images \(64x64\)"),
    ],
)
def test_sizes_that_will_not_do(parts, tmp_path, value, said):
    with pytest.raises(InputError, match=rf"--data.resize=.*({said})"):
        preflight.check(resolve(tiny_act(parts, tmp_path / "run", f"--data.resize={value}")))
