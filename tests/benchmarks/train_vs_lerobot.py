"""The ACT recipe through `lerobot-train` and through `ray_jobs.train`: which starts and steps faster?

    uv run python tests/benchmarks/train_vs_lerobot.py --root=DATASET [--steps=30] [--rounds=3] [--amp] [--cold]
        [--turns=5] [--ours="--data.resize=[120,160]"]

Both sides run whole, as a user would start them, interleaved: one after the other, or, for long runs, --turns: both are
alive, each has the machine for so many seconds in turn while the other stands still, and only its own time is counted.
Printed are medians and ratios of the time to the end of the first step, seconds per step after it (whole loop, data
included), samples/s, and peak memory of the process tree (sum of proportional set sizes: pages shared between processes
count once). Machines are noisy: only ratios count. The frame cache is warm, as for all but the first run on a machine, or --cold: empty before each run, so
that frames are decoded before the first step.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import psutil

RECIPE = [  # the published ACT recipe
    "--dataset.repo_id=your_org/your_dataset",
    "--dataset.video_backend=pyav",
    "--policy.type=act",
    "--policy.n_obs_steps=1",
    "--policy.chunk_size=50",
    "--policy.n_action_steps=50",
    "--policy.vision_backbone=resnet18",
    "--policy.pretrained_backbone_weights=null",
    "--policy.dim_model=256",
    "--policy.n_heads=4",
    "--policy.dim_feedforward=1024",
    "--policy.n_encoder_layers=4",
    "--policy.n_decoder_layers=1",
    "--policy.use_vae=true",
    "--policy.latent_dim=32",
    "--policy.n_vae_encoder_layers=4",
    "--policy.dropout=0.1",
    "--policy.kl_weight=10.0",
    "--policy.optimizer_lr=1e-5",
    "--policy.optimizer_weight_decay=1e-4",
    "--policy.optimizer_lr_backbone=1e-5",
    "--policy.device=cuda",
    "--policy.push_to_hub=false",
    "--seed=1000",
    "--batch_size=8",
    "--env_eval_freq=0",
    "--log_freq=1",
    "--save_checkpoint=false",
]
STEP = {"lerobot-train": re.compile(r"step:(\d+) "), "ray_jobs.train": re.compile(r"step (\d+)/\d+  loss")}
MODULE = {"lerobot-train": "lerobot.scripts.lerobot_train", "ray_jobs.train": "ray_jobs.train"}


class Turn:
    """One side's time on the machine."""

    def __init__(self) -> None:
        self.spent, self.since, self.began = 0.0, 0.0, threading.Event()
        self.process: subprocess.Popen | None = None

    def now(self) -> float:
        """Seconds that this side has had."""
        return self.spent + (time.perf_counter() - self.since if self.since else 0.0)

    def begin(self) -> None:
        self.since = time.perf_counter()
        self.began.set()
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        self._signal(signal.SIGSTOP)
        self.spent, self.since = self.now(), 0.0

    def _signal(self, number: int) -> None:
        with contextlib.suppress(psutil.Error, AttributeError):  # it has ended, or not begun
            root = psutil.Process(self.process.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)


def run(side: str, flags: list[str], steps: int, cache: Path, turn: Turn) -> dict[str, float]:
    """Start one side when its turn has begun, time its log lines, sample its memory."""
    if side == "ray_jobs.train":
        flags = [*flags, f"--data.cache={cache}"]
    output_dir = Path(tempfile.mkdtemp()) / "run"
    command = [
        sys.executable,
        "-m",
        MODULE[side],
        *RECIPE,
        *flags,
        f"--output_dir={output_dir}",
        f"--steps={steps}",
    ]
    turn.began.wait()
    begin = turn.now()
    process = turn.process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    at, printed = {}, []
    try:
        for line in process.stdout:
            printed.append(line)
            for match in STEP[side].finditer(line):
                at.setdefault(int(match[1]), turn.now())
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        raise
    if process.wait() or len(at) < steps:
        sys.exit(f"{side} failed:\n" + "".join(printed[-30:]))
    shutil.rmtree(output_dir.parent, ignore_errors=True)
    step_s = (at[steps] - at[2]) / (steps - 2)
    return {
        "first step [s]": at[1] - begin,
        "step [s]": step_s,
        "samples/s": 8 / step_s,
        "peak memory [GB]": peak[0] / 1e9,
        "whole run [s]": turn.now() - begin,
    }


def run_alone(side: str, flags: list[str], steps: int, cache: Path) -> dict[str, float]:
    turn = Turn()
    turn.begin()
    return run(side, flags, steps, cache, turn)


def run_in_turns(
    flags: dict[str, list[str]], steps: int, cache: Path, seconds: float
) -> dict[str, dict[str, float]]:
    """Both sides at once, each with the machine for `seconds` in turn."""
    turns = {side: Turn() for side in MODULE}
    with ThreadPoolExecutor(len(turns)) as pool:
        runs = {side: pool.submit(run, side, flags[side], steps, cache, turns[side]) for side in turns}
        while not all(job.done() for job in runs.values()):
            for side, turn in turns.items():
                if not runs[side].done():
                    turn.begin()
                    wait([runs[side]], timeout=seconds)
                    turn.end()
    return {side: job.result() for side, job in runs.items()}


def show(number: int, side: str, figures: dict[str, float]) -> None:
    print(f"round {number + 1} {side:15}", {k: round(v, 2) for k, v in figures.items()}, flush=True)


def _watch(pid: int, peak: list[int]) -> None:
    while True:
        total = 0
        try:
            for process in (root := psutil.Process(pid), *root.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
        except psutil.Error:
            return
        peak[0] = max(peak[0], total)
        time.sleep(5)  # a look holds the processes up


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="a LeRobot v3.0 data set with a camera")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--amp", action="store_true", help="--policy.use_amp=true on both sides")
    parser.add_argument("--cold", action="store_true", help="an empty frame cache before each run")
    parser.add_argument("--turns", type=float, help="seconds that each side has the machine, in turn")
    parser.add_argument("--ours", default="", help="flags for ray_jobs.train alone")
    parser.add_argument(
        "--num_workers", type=int, default=4, help="decoding workers, LeRobot's flag and its default"
    )
    args, more = parser.parse_known_args()
    if args.cold and args.turns:
        parser.error("--cold empties the cache before each run; with --turns both run at once")
    flags = [f"--dataset.root={args.root}", f"--num_workers={args.num_workers}", *more]
    flags += [f"--policy.use_amp={str(args.amp).lower()}"]
    ours = {"lerobot-train": [], "ray_jobs.train": shlex.split(args.ours)}
    cache = Path(tempfile.mkdtemp(prefix="ray_jobs_cache_"))
    if not args.cold:
        run_alone("ray_jobs.train", [*flags, *ours["ray_jobs.train"]], 3, cache)
    results: dict[str, list[dict]] = {side: [] for side in MODULE}
    for number in range(args.rounds):
        if args.turns:
            found = run_in_turns(
                {side: [*flags, *ours[side]] for side in MODULE}, args.steps, cache, args.turns
            )
            for side, figures in found.items():
                show(number, side, figures)
        else:
            found = {}
            for side in sorted(MODULE, reverse=number % 2 == 1):
                if args.cold:
                    shutil.rmtree(cache, ignore_errors=True)
                found[side] = run_alone(side, [*flags, *ours[side]], args.steps, cache)
                show(number, side, found[side])
        for side, figures in found.items():
            results[side].append(figures)
    shutil.rmtree(cache, ignore_errors=True)
    print(f"\n{'median of ' + str(args.rounds):18} {'lerobot-train':>14} {'ray_jobs.train':>15} {'ratio':>7}")
    for key in results["lerobot-train"][0]:
        stock, ours = (
            statistics.median(r[key] for r in results[side]) for side in ("lerobot-train", "ray_jobs.train")
        )
        print(f"{key:18} {stock:14.2f} {ours:15.2f} {ours / stock:7.2f}")


if __name__ == "__main__":
    main()
