"""How long a person waits: for the answer to a typo or a wrong path, `--help`, each job's first word, the first step.

    python tests/benchmarks/time_to_answer.py [--other=CHECKOUT] [--runs=3]

Seconds until a command has said its first word and until it has ended (or has logged its first step), medians, in turns with another checkout of this
repository where one is named (both with this Python and its packages). Machines are noisy: only ratios count.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
SPACE = "policy: act\nsearch:\n  policy.optimiser_lr: {low: 1.0e-6, high: 1.0e-4}\n"
BASELINE = "baseline:\n  policy.optimizer_lr: 1.0e-5\n"  # which earlier versions want
DATA = "--dataset.repo_id=me/parts --dataset.root={data} --policy.push_to_hub=false --policy.pretrained_backbone_weights=null"
COMMANDS = {
    "typo in a flag": f"train {DATA} --policy.type=act --stepz=3",
    "wrong type": f"train {DATA} --policy.type=act --steps=foo",
    "missing data set": "train --dataset.repo_id=me/parts --dataset.root={folder}/none --policy.type=act",
    "missing space": f"tune {DATA} --space={{folder}}/none.yaml --steps=10",
    "typo in a space": f"tune {DATA} --space={{folder}}/space.yaml --steps=10",
    "train --help": "train --help",
    "tune --help": "tune --help",
    "evaluate: no checkpoint": "evaluate --checkpoint={folder}/none",
    "doctor: broken set": "doctor --dataset.repo_id=me/parts --dataset.root={broken}",
    "cache list": "cache list",
    "report": "report --output_dir={run}",
    "train, first step": f"train {DATA} --policy.type=act --steps=3 --log_freq=1 --output_dir={{new}}",
    "tune, first step": f"tune {DATA} --space={{folder}}/right.yaml --steps=20 --log_freq=1 --tune.num_samples=2 "
    "--tune.max_concurrent=1 --dataset.eval_split=0.3 --eval_steps=10 --output_dir={new}",
}


def timed(checkout: Path, command: str, new: Path) -> tuple[float, float]:
    """Seconds until the first word, and until the end or the first step that is written below `new`."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *f"ray_jobs.{command}".split()],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    first = None

    def listen() -> None:
        nonlocal first
        while process.stdout.read(1):
            first = first or time.perf_counter() - begin

    listener = threading.Thread(target=listen)
    listener.start()
    while process.poll() is None and not any(new.rglob("metrics.jsonl")):
        time.sleep(0.02)
    end = time.perf_counter() - begin
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait()
    listener.join()
    return min(first or end, end), end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, help="another checkout, measured in turns")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    sides = [HERE, *([asked.other.absolute()] if asked.other else [])]
    with tempfile.TemporaryDirectory() as folder:
        from ray_jobs.part_sorting.record import record

        data = record(Path(folder) / "data", episodes=4, image_size=64, seed=0)
        broken = record(Path(folder) / "broken", episodes=2, image_size=64, seed=0)
        next((broken / "videos").rglob("*.mp4")).unlink()
        (Path(folder) / "space.yaml").write_text(SPACE)
        run = Path(folder) / "run"
        names = {"folder": folder, "data": data, "broken": broken, "run": run}
        (Path(folder) / "right.yaml").write_text(SPACE.replace("optimiser", "optimizer") + BASELINE)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "ray_jobs.train",
                *DATA.format(**names).split(),
                "--policy.type=act",
                "--steps=1",
            ]
            + ["--ray.num_workers=0", f"--output_dir={run}"],
            cwd=HERE,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        print(f"{'':28}{'first word':>12}{'end':>8}" + (f"{'other':>12}{'':>8}" if asked.other else ""))
        for name, command in COMMANDS.items():
            seconds = {side: [] for side in sides}
            for number in range(asked.runs):
                for side in sides:
                    new = Path(folder) / f"{name}-{number}-{sides.index(side)}".replace(" ", "_").replace(
                        ",", ""
                    )
                    seconds[side].append(timed(side, command.format(**names, new=new), new))
            medians = [
                [statistics.median(of_one) for of_one in zip(*seconds[side], strict=True)] for side in sides
            ]
            print(f"{name:28}" + "".join(f"{first:12.2f}{end:8.2f}" for first, end in medians), flush=True)


if __name__ == "__main__":
    main()
