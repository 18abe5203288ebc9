"""A search of ours against stock `lerobot-train` runs of the same configurations, one after the other.

    uv run python tests/benchmarks/tune_vs_loop.py --root=DATASET [--trials=16] [--steps=220] [--amp] [--eval_steps=55]

The data set is first copied at 96x128, so that both sides do the same work. Then: the search (ASHA), whole, as a user
starts it; every one of its configurations with `lerobot-train`, whole; and every one trained to its end by our loop,
to see how good the best of them would have been. Printed are the wall times, their ratio, and how much worse the
search's winner is than the best of all trained in full.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna

from ray_jobs.cli.terminal import quiet
from ray_jobs.search.files import SEARCH_FILE
from ray_jobs.search.spaces.space import flags

SIZE = (96, 128)
SMALL = ["--policy.dim_model=128", "--policy.dim_feedforward=512", "--policy.n_encoder_layers=2"]
HELD_OUT = [18, 19]
SPACE = Path(__file__).parent.parent.parent / "search_spaces" / "act.yaml"


def resized_copy(root: Path, target: Path) -> Path:
    """The data set with its videos at SIZE, recorded anew by LeRobot."""
    import torch
    from lerobot.datasets import LeRobotDataset

    source = LeRobotDataset("local/source", root=root, video_backend="pyav", return_uint8=True)
    cameras = source.meta.video_keys
    ours = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    features = {k: dict(v) for k, v in source.meta.features.items() if k not in ours}
    for key in cameras:
        features[key] = {"dtype": "video", "shape": (*SIZE, 3), "names": ["height", "width", "channels"]}
    copy = LeRobotDataset.create("local/copy", source.meta.fps, features, root=target, use_videos=True)
    episode = 0
    for row in range(len(source)):
        item = source[row]
        if int(item["episode_index"]) != episode:
            copy.save_episode()
            episode = int(item["episode_index"])
        frame = {k: item[k].numpy() for k in features if k not in cameras}
        for key in cameras:
            small = torch.nn.functional.interpolate(
                item[key][None].float(), SIZE, mode="bilinear", antialias=True
            )
            frame[key] = small[0].round().byte().permute(1, 2, 0).numpy()
        copy.add_frame({**frame, "task": item["task"]})
    copy.save_episode()
    copy.finalize()
    return target


def run(module: str, *flags: str) -> float:
    """Wall time of one whole command, in seconds."""
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, "-m", module, *flags], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{module} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="a LeRobot v3.0 data set with a camera")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--amp", action="store_true", help="mixed precision on all sides")
    parser.add_argument("--eval_steps", type=int, help="of the search: trials are judged there first")
    parser.add_argument("--copy", type=Path, help="where the resized copy is, or shall be")
    parser.add_argument(
        "--skip-full", action="store_true", help="leave out the trainings in full by our loop"
    )
    parser.add_argument("--skip-stock", action="store_true", help="leave out lerobot-train")
    args = parser.parse_args()
    quiet()
    os.environ["SVT_LOG"] = "1"  # the AV1 encoder: errors only
    folder = Path(tempfile.mkdtemp())
    root = args.copy or folder / "copy"
    if not root.exists():
        print("making the resized copy", flush=True)
        resized_copy(args.root, root)
    common = [
        "--dataset.repo_id=local/copy", f"--dataset.root={root}", "--dataset.video_backend=pyav",
        "--policy.pretrained_backbone_weights=null", "--policy.device=cpu", "--policy.push_to_hub=false",
        "--batch_size=8", f"--steps={args.steps}", "--seed=1000", "--num_workers=2", "--env_eval_freq=0", *SMALL,
        f"--policy.use_amp={str(args.amp).lower()}",
    ]  # fmt: skip
    judged = [f"--eval_steps={args.eval_steps}"] if args.eval_steps else []
    output = folder / "search"
    search_s = run(
        "ray_jobs.tune", f"--space={SPACE}", f"--output_dir={output}", f"--tune.num_samples={args.trials}",
        f"--data.eval_episodes={HELD_OUT}", f"--data.cache={folder / 'frames'}", *judged, *common,
    )  # fmt: skip
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{output / 'study.db'}")
    trials = [t for t in study.trials if "config" in t.user_attrs]
    states = [t.state.name for t in trials]
    print(f"search: {search_s:.0f} s, {states.count('COMPLETE')} trained in full, {states.count('PRUNED')} pruned, "
          f"best {study.best_value:.4f}", flush=True)  # fmt: skip
    decided = json.loads((output / SEARCH_FILE).read_text())["flags"]
    validations = [f"--{name}={decided[name]}" for name in ("eval_steps", "max_eval_samples")]
    validations.append(f"--data.eval_horizon={json.loads((output / 'summary.json').read_text())['horizon']}")
    episodes = f"--dataset.episodes={[e for e in range(20) if e not in HELD_OUT]}"
    configs = {t.number: flags(t.user_attrs["config"]) for t in trials}
    stock_s = 0.0
    for number, config in configs.items() if not args.skip_stock else ():
        seconds = run(
            "lerobot.scripts.lerobot_train", *common, *config, episodes, f"--output_dir={folder}/stock-{number}",
            f"--save_freq={args.steps}",
        )  # fmt: skip
        stock_s += seconds
        print(f"lerobot-train, configuration {number}: {seconds:.0f} s", flush=True)
    if not args.skip_stock:
        print(f"\nlerobot-train, {len(trials)} runs      {stock_s:8.0f} s")
        print(f"ray_jobs.tune, the same         {search_s:8.0f} s")
        print(f"ratio                           {stock_s / search_s:8.1f}")
    if not args.skip_full:

        def in_full(number: int) -> float:
            out = folder / f"full-{number}"
            run(
                "ray_jobs.train", *common, *configs[number], *validations, f"--output_dir={out}",
                f"--data.eval_episodes={HELD_OUT}", "--save_checkpoint=false", "--ray.num_workers=0",
            )  # fmt: skip
            return json.loads((out / "summary.json").read_text())["best"]["val/action_error"]

        os.environ["OMP_NUM_THREADS"] = "1"  # as a trial has
        pruned = [t.number for t in trials if t.state.name == "PRUNED"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            full = dict(zip(pruned, pool.map(in_full, pruned), strict=True))
        full |= {t.number: t.value for t in trials if t.state.name == "COMPLETE"}
        for number, value in sorted(full.items()):
            print(f"trained in full, configuration {number}: {value:.4f}")
        best = min(full.values())
        print(f"best of all trained in full     {best:8.4f}")
        print(
            f"the search's winner             {study.best_value:8.4f}  ({study.best_value / best - 1:+.1%})"
        )


if __name__ == "__main__":
    main()
