"""Kill, at random moments, workers, controllers and raylets of a training or a search until it is done all the same.

    python tests/end_to_end/soak.py --what=train --workers=2 --kills=80 --steps=2600
    python tests/end_to_end/soak.py --what=train --workers=1 --kills=20 --steps=600      # ends with the bytes of an undisturbed run
    python tests/end_to_end/soak.py --what=tune --kills=50 --steps=200

The driver is a user's: when it gives up, it is started again with --resume=true. After every kill all visible checkpoints
are looked over. Prints a row for a table; exits 1 if anything was torn, lost or different.
"""

import argparse
import csv
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

SAVE_EVERY = 20
EVAL_EVERY = 10  # a search's trials
LONGEST_S = 7200
PREY = {"worker": ("RayTrainWorker", "ImplicitFunc", "run_trial"), "controller": ("TrainController",)}


class Soak:
    """A head without CPUs, where the driver is, and two nodes that are replaced when they are killed."""

    def __init__(self, root: Path, folder: Path, what: str, workers: int, steps: int, seed: int):
        from ray.cluster_utils import Cluster

        self.steps = steps
        self.root, self.run, self.what, self.workers = root, folder / "run", what, workers
        self.random, self.kills, self.starts = random.Random(seed), Counter(), 0
        self.torn: list[str] = []
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        self.driver = self.failed_at = None

    def flags(self) -> list[str]:
        from support.commands import tiny_act

        flags = tiny_act(self.root, self.run, f"--steps={self.steps}", f"--save_freq={SAVE_EVERY}")
        flags += [f"--ray.address={self.cluster.address}", "--ray.cpus_per_worker=1"]
        if self.what == "tune":
            space = self.run.parent / "space.yaml"
            space.write_text(
                "policy: act\nbaseline: {policy.optimizer_lr: 1.0e-4}\n"
                "search:\n  policy.optimizer_lr: {low: 1.0e-5, high: 1.0e-3, log: true}\n"
            )
            flags = [f for f in flags if not f.startswith("--policy.type")]
            more = ("--tune.num_samples=20", "--tune.scheduler=none", f"--eval_steps={EVAL_EVERY}")
            return [*flags, f"--space={space}", *more]
        return [*flags, f"--ray.num_workers={self.workers}", "--ray.max_failures=-1"]

    def start(self) -> None:
        from support.processes import Run

        flags = self.flags()
        if self.starts:
            flags = (
                [f"--output_dir={self.run}", "--resume=true"]
                if self.what == "tune"
                else [*flags, "--resume=true"]
            )
        self.starts += 1
        self.driver = Run(flags, job=f"ray_jobs.{self.what}")

    def finish(self, kills: int) -> None:
        """Run to the end, killing as often as was asked for, as long as it lasts."""
        give_up = time.monotonic() + LONGEST_S
        self.start()
        log, hasty = self.run.parent / "driver.log", False
        while time.monotonic() < give_up:
            if self.driver.process.poll() is not None:
                log.write_text((log.read_text() if log.exists() else "") + self.driver.printed)
                if self.driver.process.returncode == 0:
                    return
                said = "\n".join(self.driver.printed.splitlines()[-5:])
                print(f"the driver has ended with {self.driver.process.returncode}:\n{said}", file=sys.stderr)
                if self.failed_at == sum(self.kills.values()):
                    raise SystemExit(f"the driver failed twice without a kill, see {log}")
                self.failed_at = sum(self.kills.values())
                self.start()
            if sum(self.kills.values()) < kills:
                # Some kills hit what is only being started. Never two in a row in a search: a trial that dies three times
                # without getting further is given up, as it should be.
                hasty = self.random.random() < 0.3 and not (hasty and self.what == "tune")
                if not hasty:
                    self.wait_for_progress()
                time.sleep(self.random.uniform(0, 5))
                self.kill()
            else:
                time.sleep(2)
            self.look()
        raise SystemExit(f"not finished after {LONGEST_S} s, {self.kills}")

    def wait_for_progress(self) -> None:
        """Return once the training has got to another checkpoint, or the trials that run to another validation."""

        def reached() -> dict[Path, int]:
            runs = [self.run, *self.run.glob("trials/*")]
            return {path: int(path.read_text().split()[0]) for run in runs for path in run.glob(".progress")}

        more = EVAL_EVERY if self.what == "tune" else SAVE_EVERY
        wanted = {path: min(step + more, self.steps) for path, step in reached().items()}
        give_up = time.monotonic() + 90
        while self.driver.process.poll() is None and time.monotonic() < give_up:
            now = reached()
            if wanted and all(now[path] >= step for path, step in wanted.items()):
                return
            wanted = wanted or dict.fromkeys(now, 1)
            time.sleep(0.2)

    def kill(self) -> None:
        kind = self.random.choices(["worker", "controller", "raylet"], [6, 2, 2])[0]
        if kind == "raylet":
            at = self.random.randrange(2)
            self.cluster.remove_node(self.nodes[at], allow_graceful=False)
            self.nodes[at] = self.cluster.add_node(num_cpus=1)
            self.kills[kind] += 1
            return
        prey = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if any(name in " ".join(process.cmdline()) for name in PREY[kind]):
                    prey.append(process)
        if prey:
            with suppress(psutil.NoSuchProcess):
                self.random.choice(prey).kill()
                self.kills[kind] += 1

    def look(self) -> None:
        """See that every checkpoint that can be seen is whole."""
        from ray_jobs.training import checkpoint

        runs = [self.run, *self.run.glob("trials/*")]
        for run in runs:
            for path in checkpoint.checkpoint_steps(run).values():
                fault = checkpoint.fault(path)
                if fault and path.exists():  # else it was pruned while it was looked at
                    self.torn.append(fault)


def main(argv: list[str]) -> int:
    asked = argparse.ArgumentParser()
    asked.add_argument("--what", choices=["train", "tune"], default="train")
    asked.add_argument("--workers", type=int, default=1)
    asked.add_argument("--kills", type=int, default=30)
    asked.add_argument("--steps", type=int, default=600)
    asked.add_argument("--seed", type=int, default=0)
    asked = asked.parse_args(argv)
    scratch = tempfile.mkdtemp(prefix="rj_")
    os.environ |= {"RAY_TMPDIR": scratch, "RAY_AUTH_MODE": "disabled", "RAY_health_check_period_ms": "1000"}
    from ray_jobs.part_sorting.record import record
    from support.commands import job, tiny_act

    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    root = record(folder / "parts", episodes=12, image_size=64, seed=7)
    soak = Soak(root, folder, asked.what, asked.workers, asked.steps, asked.seed)
    begin = time.monotonic()
    try:
        soak.finish(asked.kills)
    finally:
        soak.cluster.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
    faults, lost, restarts = list(soak.torn), 0, 0
    for run in sorted(soak.run.glob("trials/*")) or [soak.run]:
        if not (run / "summary.json").exists():
            faults.append(f"{run.name}: not finished")
            continue
        trained = json.loads((run / "summary.json").read_text())
        lost, restarts = lost + trained["lost_steps"], restarts + trained["restarts"]
        if trained["lost_steps"] > SAVE_EVERY * trained["restarts"]:
            faults.append(f"{run.name}: {trained['lost_steps']} steps lost, {trained['restarts']} restarts")
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if [r["step"] for r in records if "train/loss" in r] != list(range(1, asked.steps + 1)):
            faults.append(f"{run.name}: a step is missing in metrics.jsonl, or stands there twice")
    if asked.what == "train":
        if asked.workers == 1:
            calm = folder / "calm"
            more = (f"--steps={asked.steps}", f"--save_freq={asked.steps}")
            more += ("--ray.address=local", "--ray.cpus_per_worker=1")  # as many threads
            assert job("ray_jobs.train", *tiny_act(root, calm, *more), timeout=3600).returncode == 0
            file = "checkpoints/last/pretrained_model/model.safetensors"
            if (soak.run / file).read_bytes() != (calm / file).read_bytes():
                faults.append("the final weights are not those of the undisturbed run")
    else:
        with (soak.run / "trials.csv").open() as file:
            states = Counter(row["state"] for row in csv.DictReader(file))
        if states != {"COMPLETE": 20}:
            faults.append(f"trials: {dict(states)}")
    if not soak.kills:
        faults.append("over before the first kill: more --steps")
    kills = ", ".join(f"{count} {kind}s" for kind, count in sorted(soak.kills.items()))
    print("| what | killed | driver started | restarts | steps lost | wall | faults |")
    name = f"{asked.what}, {asked.workers} worker(s)" if asked.what == "train" else "tune, 20 trials"
    wall = time.monotonic() - begin
    print(f"| {name} | {kills} | {soak.starts} | {restarts} | {lost} | {wall:.0f} s | {faults or 'none'} |")
    if not faults:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
