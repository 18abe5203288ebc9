"""Two hundred trials in as many slots as there are CPUs: what a trial costs the driver, and that nothing is left behind.

    uv run python tests/benchmarks/many_trials.py [--trials=200]

Every trial is a real training of two steps on data without cameras, and ASHA ends many after one. Printed are seconds per trial, the memory of the
slots as the search goes on, and after it: processes, actors and placement groups that still live, and W&B runs that
were not finished.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import optuna
import psutil

from ray_jobs import tune as job
from ray_jobs.cluster import connect


def slots() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ImplicitFunc" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=200)
    args = parser.parse_args()
    from support.data_sets import make
    from support.runs import wandb_runs
    from support.searches import space_file

    folder = Path(tempfile.mkdtemp())
    dataset = make(folder / "numbers", [23, 17, 9, 20, 21], seed=2)
    output = folder / "run"
    memory: list[tuple[int, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(2):
            done = len(list(output.glob("trials/*/summary.json")))
            for process in slots():
                try:
                    memory.append((done, process.memory_info().rss / 1e6))
                except psutil.Error:
                    continue

    threading.Thread(target=watch, daemon=True).start()
    flags = [f"--dataset.root={dataset}", "--dataset.repo_id=local/numbers", "--policy.device=cpu"]
    flags += ["--policy.pretrained_backbone_weights=null", "--batch_size=4", "--num_workers=0", "--steps=2"]
    flags += ["--data.eval_episodes=[2,4]", "--max_eval_samples=4", "--tune.sampler=random"]
    flags += [f"--tune.num_samples={args.trials}", "--ray.cpus_per_worker=1"]
    flags += ["--wandb.enable=true", "--wandb.mode=offline", "--wandb.project=many"]
    begin = time.perf_counter()
    assert job.main([f"--space={space_file(folder)}", f"--output_dir={output}", *flags]) == 0
    wall = time.perf_counter() - begin
    over.set()
    time.sleep(5)

    import ray
    from ray.util import placement_group_table
    from ray.util.state import list_actors

    study = optuna.load_study(study_name="run", storage=f"sqlite:///{output / 'study.db'}")
    times = sorted((t.user_attrs["times"] for t in study.trials), key=lambda t: t["begun"])
    by_slot: dict[str, list[dict]] = {}
    for row in times:
        by_slot.setdefault(row["slot"], []).append(row)
    gaps = [b["begun"] - a["end"] for rows in by_slot.values() for a, b in zip(rows, rows[1:], strict=False)]
    pruned = sum(t.state.name == "PRUNED" for t in study.trials)
    print(f"\n{len(study.trials)} trials ({pruned} pruned) in {len(by_slot)} processes, {wall:.0f} s")
    print(f"between two trials of a slot (driver): median {statistics.median(gaps):.3f} s, "
          f"last tenth {statistics.median(gaps[-len(gaps) // 10:]):.3f} s")  # fmt: skip
    for share in (0.1, 0.25, 0.5, 1.0):
        near = [mb for done, mb in memory if abs(done - share * args.trials) <= 0.03 * args.trials + 1]
        if near:
            print(f"memory of a slot after {share:4.0%} of the trials: {statistics.median(near):.0f} MB")
    alive = [a for a in _actors(list_actors) if "ImplicitFunc" in a or "Train" in a]
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    finished = sum("exit" in wandb_runs(output / f"trials/{t.number:04d}")[0] for t in study.trials)
    print(f"left: {len(slots())} slot processes, {len(alive)} actors, {len(groups)} placement groups, "
          f"{len(study.trials) - finished} unfinished W&B runs")  # fmt: skip
    print(*alive, sep="\n")
    ray.shutdown()
    connect.leave()


def _actors(list_actors) -> list[str]:
    try:
        return [actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")])]
    except Exception:  # the state API needs a dashboard, which a cluster of our own has not
        import ray

        return [
            row["ActorClassName"] for row in ray._private.state.actors().values() if row["State"] == "ALIVE"
        ]


if __name__ == "__main__":
    main()
