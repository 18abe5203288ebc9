"""Commands as tests give them: tiny policies, ours and LeRobot's jobs, in this process or another."""

import os
import subprocess
import sys
from pathlib import Path

import support.environment  # noqa: F401
from ray_jobs.config.errors import InputError, RunError

ROOT = Path(__file__).parent.parent.parent
REAL = ROOT.parent / "shared" / "datasets" / "g1_yellow_bottle"
DEVICE = os.environ.get("RAY_JOBS_TEST_DEVICE", "cpu")  # of the bare loop
PATIENCE = float(os.environ.get("RAY_JOBS_TEST_PATIENCE", "1"))  # with other processes


def common(root: Path, output_dir: Path) -> list[str]:
    return [
        "--dataset.repo_id=local/parts",
        f"--dataset.root={root}",
        "--dataset.video_backend=pyav",
        f"--policy.device={DEVICE}",
        "--policy.push_to_hub=false",
        "--policy.pretrained_backbone_weights=null",
        f"--output_dir={output_dir}",
        "--batch_size=4",
        "--num_workers=1",
        "--log_freq=1",
        "--env_eval_freq=0",
    ]


def tiny_act(root: Path, output_dir: Path, *more: str) -> list[str]:
    """Flags of an ACT small enough for a CPU test; `more` overrides."""
    return [
        *common(root, output_dir),
        "--policy.type=act",
        "--policy.chunk_size=8",
        "--policy.n_action_steps=8",
        "--policy.dim_model=32",
        "--policy.n_heads=2",
        "--policy.dim_feedforward=64",
        "--policy.n_encoder_layers=1",
        "--policy.n_vae_encoder_layers=1",
        "--policy.latent_dim=8",
        *more,
    ]


def tiny_diffusion(root: Path, output_dir: Path, *more: str) -> list[str]:
    """Flags of a Diffusion Policy small enough for a CPU test; `more` overrides."""
    return [
        *common(root, output_dir),
        "--policy.type=diffusion",
        "--policy.down_dims=[32,64]",
        "--policy.horizon=8",
        "--policy.n_action_steps=4",
        "--policy.n_groups=4",
        "--policy.diffusion_step_embed_dim=16",
        "--policy.spatial_softmax_num_keypoints=8",
        "--policy.num_train_timesteps=10",
        *more,
    ]


def train_in_process(flags: list[str]) -> tuple[dict, list[dict]]:
    """Run the bare loop; returns its summary and the events it reported."""
    from ray_jobs.checks import preflight
    from ray_jobs.cli.resolve import resolve
    from ray_jobs.training import loop

    recipe = resolve(flags)
    recipe = preflight.check(recipe)
    events: list[dict] = []
    return loop.train(recipe, device=DEVICE, report=events.append), events


def job(*args: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """Run `python -m <args>` as a user would and capture what it prints."""
    return subprocess.run(
        [sys.executable, "-m", *args],
        capture_output=True,
        text=True,
        timeout=timeout * PATIENCE,
        cwd=ROOT,
        env={**os.environ, **env},
    )


def stock(module: str, *args: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """Run one of LeRobot's own scripts (`lerobot_train`, `lerobot_eval`); fails the test if it fails."""
    result = job(f"lerobot.scripts.{module}", *args, timeout=timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def said_by(job, argv: list[str], capsys) -> tuple[int, str]:
    """Exit status and what was printed, of a job that runs in this process: anything but our own errors would have
    been a traceback."""
    capsys.readouterr()
    try:
        status, told = job.main(argv), ""
    except (InputError, RunError) as error:
        status, told = 2 if isinstance(error, InputError) else 1, str(error)
    return status, capsys.readouterr().out + told
