"""Is `val/action_error` worth optimising? Its rank correlation with success in the demo's simulator, over many policies.

    uv run python tests/benchmarks/objective_vs_success.py CHECKPOINT [CHECKPOINT ...] [--episodes=50] [--horizon=10]
        [evaluate's flags]

A checkpoint is anything that `ray_jobs.evaluate --checkpoint` takes; a run stands for all of its checkpoints. Policies
should differ in how well they do: other learning rates, other lengths, several checkpoints of one training. All are
scored over the same horizon, on the same episodes if `--dataset.root` and `--data.eval_episodes` name them, and act in
the same unseen ones. Printed are both values of each policy, the best by the error first, and Spearman's correlation with
its 95 % interval (of 1,000 drawings of policies, with replacement).
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from lerobot.utils.constants import CHECKPOINTS_DIR
from scipy.stats import spearmanr

from ray_jobs import evaluate
from ray_jobs.cli.terminal import quiet
from ray_jobs.evaluation.results import RESULTS

IMAGE_SIZE = 64  # the demo's


def checkpoints_of(path: Path) -> list[Path]:
    inside = sorted(p for p in (path / CHECKPOINTS_DIR).glob("[0-9]*") if p.is_dir())
    return inside or [path]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=50, help="in the simulator, for each policy")
    parser.add_argument("--horizon", type=int, default=10, help="actions that are compared")
    args, others = parser.parse_known_args()
    quiet()
    folder = Path(tempfile.mkdtemp()) / "evaluation"
    evaluate.main(
        [
            f"--checkpoint={','.join(str(one) for path in args.checkpoint for one in checkpoints_of(path))}",
            f"--output_dir={folder}",
            f"--data.eval_horizon={args.horizon}",
            "--max_eval_samples=0",
            "--env.type=part_sorting",
            f"--env.image_size={IMAGE_SIZE}",
            f"--eval.n_episodes={args.episodes}",
            "--eval.batch_size=1",
            "--ray.num_workers=0",
            *others,
        ]
    )
    results = json.loads((folder / RESULTS).read_text())["results"]
    pairs = sorted(
        (r["val/action_error"], r["simulator"]["success_rate"], name) for name, r in results.items()
    )
    print(f"\n{'val/action_error':>16}{'success':>9}")
    for error, success, name in pairs:
        print(f"{error:16.4f}{success:9.0%}  {name}")
    errors, successes = np.array([(error, success) for error, success, _ in pairs]).T
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(pairs), size=len(pairs)) for _ in range(1000)]
    low, high = np.nanquantile([spearmanr(-errors[d], successes[d])[0] for d in drawn], (0.025, 0.975))
    value = spearmanr(-errors, successes)[0]
    print(f"\nSpearman's correlation of {len(pairs)} policies: {value:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
