"""Make all that lies beside this file again, in a checkout of the old version and with its Python:

.venv/bin/python PATH_TO_THIS_FILE
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.append("tests")
from test_data import make  # noqa: E402

HERE = Path(__file__).resolve().parent
NETWORK = {
    "policy.chunk_size": 4,
    "policy.n_action_steps": 4,
    "policy.dim_model": 8,
    "policy.n_heads": 2,
    "policy.dim_feedforward": 8,
    "policy.n_encoder_layers": 1,
    "policy.n_vae_encoder_layers": 1,
    "policy.latent_dim": 2,
    "policy.optimizer_lr": 0.01,  # each step has an effect on the next one's loss
}
SPACE = {
    "policy": "act",
    "baseline": {**NETWORK, "policy.use_vae": True},
    "search": {
        "policy.optimizer_lr": {"low": 1e-5, "high": 1e-1, "log": True},
        "policy.chunk_size": {"low": 4, "high": 8, "step": 2},
        "policy.n_action_steps": {"same_as": "policy.chunk_size"},
        "policy.use_vae": {"choices": [True, False]},
    },
}
ENVIRONMENT = {
    # How sums are rounded depends on these; the tests have the same.
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    # A bucket has no folders that must be made first.
    "FSSPEC_FILE_AUTO_MKDIR": "true",
}
# Locks, what another program reads, and what is made again because it is older than what it was made of.
UNUSED = (
    ".driver",
    ".lock",
    "lock",
    "events.out.tfevents.*",
    "report.html",
    ".predictions.json",
    "files.json",
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder).resolve()
        make_all(made)
        for file in (file for pattern in UNUSED for file in made.rglob(pattern)):
            file.unlink()
        replace_in_files(made, str(made), "/made")
        replace_in_files(made, os.getcwd(), "/checkout")
        replace_in_files(made / "search", f'"{platform.node()}:', '"')  # `times` in study.db
        for path in made.iterdir():
            shutil.rmtree(HERE / path.name, ignore_errors=True)
            shutil.copytree(path, HERE / path.name, symlinks=True)
    decoded_with = {package: version(package) for package in ("lerobot", "av")}
    (HERE / "decoded_with.json").write_text(json.dumps(decoded_with, indent=1) + "\n")


def make_all(made: Path) -> None:
    make(made / "numbers", [9, 7, 8], seed=2)
    make(made / "pictures", [5, 4], cameras=1, seed=3)
    numbers = ["--dataset.repo_id=local/numbers", f"--dataset.root={made / 'numbers'}"]
    cpu = ["--policy.device=cpu", "--batch_size=4", "--num_workers=0", "--log_freq=1"]
    validated = ["--data.eval_episodes=[2]", "--eval_steps=2", "--steps=4"]
    common = [*numbers, *cpu, *validated]

    act = ["--policy.type=act", *(f"--{flag}={value}" for flag, value in NETWORK.items())]
    training = [*common, *act, "--save_freq=2", "--ray.num_workers=0", "--ray.ema=true"]
    job(made, "train", *training, f"--output_dir={made / 'run'}")
    job(made, "train", *training, f"--output_dir=file://{made / 'bucket/run'}", "--checkpoint.keep_last=1")

    space = made / "space.yaml"
    space.write_text(json.dumps(SPACE))
    trials = [f"--space={space}", "--tune.num_samples=2", "--ray.address=local"]
    job(made, "tune", *common, *trials, f"--output_dir={made / 'search'}")
    space.unlink()  # the search has a copy

    pictures = ["--dataset.repo_id=local/pictures", f"--dataset.root={made / 'pictures'}"]
    job(made, "cache", "build", *pictures, f"--data.cache={made / 'cache'}")
    shutil.rmtree(made / "node")


def job(made: Path, name: str, *words: str) -> None:
    env = {**os.environ, **ENVIRONMENT, "RAY_JOBS_CACHE": str(made / "node")}
    subprocess.run([sys.executable, "-m", f"ray_jobs.{name}", *words], check=True, cwd=made, env=env)


def replace_in_files(folder: Path, text: str, instead: str) -> None:
    """Replace a text by one that is made as long: sizes are noted elsewhere, and a database has its pages."""
    for file in (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        before = file.read_bytes()
        after = before.replace(text.encode(), instead.ljust(len(text), "_").encode())
        if after != before:
            file.write_bytes(after)


main()
