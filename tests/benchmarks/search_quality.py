"""Is the search worth its steps? Searches replayed on two recorded tables of real ACT trainings.

    uv run python tests/benchmarks/search_quality.py [--seeds=50] [--table=demo]

`act_trials_demo.json` and `act_trials_real.json` hold over a hundred configurations of `table_space.yaml` each, drawn
at random and trained to their end by the tuner itself, with every validation. A replayed search draws as the real one
does; each drawing stands for the nearest configuration of the table that it has not tried yet. Counted are the training
steps until a value within 1 % (5 %, 10 %, 20 %) of the table's best is seen, one trial at a time; of all seeds the
median, and the mean:

    tpe + asha      what `ray_jobs.tune` does: Optuna is told PRUNED, with the intermediate values
    ray's own       Ray's OptunaSearch and ASHAScheduler, unchanged: Optuna is told COMPLETE, with the last value
    random + asha, random

The tables were made by `ray_jobs.tune --space=tests/benchmarks/table_space.yaml --tune.sampler=random
--tune.scheduler=none --tune.num_samples=104 --ray.cpus_per_worker=1 --max_eval_samples=96 --steps=240` and

    demo    --dataset.root=outputs/demo/dataset (200 episodes) --data.eval_episodes='[180, ..., 199]' --batch_size=4
            --eval_steps=30, on two CPU cores
    real    --dataset.root=DATASET (a Unitree G1, 20 episodes) --data.resize='[96,128]' --data.eval_episodes='[17,18,19]'
            --batch_size=8 --eval_steps=15, eight at a time on an H100 (99), the others on a CPU

and kept with `search_quality.py --table=real --record=outputs/table`.
"""

import argparse
import json
import math
import statistics
import warnings
from pathlib import Path
from types import SimpleNamespace

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from ray_jobs.search.options import TuneOptions
from ray_jobs.search.plan import steps_between
from ray_jobs.search.spaces.space import SearchSpace
from ray_jobs.search.spaces.space_file import read_space
from ray_jobs.search.study.samplers import make_sampler

HERE = Path(__file__).parent
TABLES = {name: HERE / f"act_trials_{name}.json" for name in ("demo", "real")}
REDUCTION = 3
METRIC = "val/action_error"


class Table:
    """Recorded trials: a configuration's parameters, and its validations by step."""

    def __init__(self, path: Path) -> None:
        self.rows = json.loads(path.read_text())
        self.space = SearchSpace((read_space(HERE / "table_space.yaml"),), {})
        self.parameters = [p for p in self.space.spaces[0].parameters if p.drawn is not None]
        self.points = [self._point(row["params"]) for row in self.rows]
        self.steps = sorted(int(step) for step in self.rows[0]["values"])
        wanted = steps_between(self.steps[-1])
        self.first = min(self.steps, key=lambda step: abs(step - wanted))  # where trials are judged
        self.best = min(min(row["values"].values()) for row in self.rows)

    def _point(self, params: dict) -> dict:
        """Coordinates between 0 and 1, logarithmic where the search is."""
        point = {}
        for p in self.parameters:
            if p.flag in params:
                d, value = p.distribution, params[p.flag]
                if isinstance(d, CategoricalDistribution):
                    point[p.flag] = value
                else:
                    scale = math.log if d.log else float
                    point[p.flag] = (scale(value) - scale(d.low)) / (scale(d.high) - scale(d.low))
        return point

    def nearest(self, params: dict, tried: set[int]) -> int:
        """The row most like a configuration that has not been tried yet."""
        point = self._point(params)

        def distance(other: dict) -> float:
            names = point.keys() | other.keys()
            parts = []
            for name in names:
                a, b = point.get(name), other.get(name)
                both = isinstance(a, float) and isinstance(b, float)
                parts.append((a - b) ** 2 if both else float(a != b))
            return sum(parts)

        return min(
            (n for n in range(len(self.rows)) if n not in tried), key=lambda n: distance(self.points[n])
        )

    def trial(self, row: int) -> list[tuple[int, float]]:
        return [(step, self.rows[row]["values"][str(step)]) for step in self.steps]


class Search:
    """Optuna as `ray_jobs.tune` uses it: the same sampler, the same pruner, the same words."""

    def __init__(self, table: Table, seed: int, *, sampler: str, asha: bool):
        options = TuneOptions(num_samples=len(table.rows), sampler=sampler)
        pruner = SuccessiveHalvingPruner(table.first, REDUCTION) if asha else optuna.pruners.NopPruner()
        chosen = RandomSampler(seed=seed) if sampler == "random" else make_sampler(options, seed)
        self.study = optuna.create_study(sampler=chosen, pruner=pruner)
        self.space = table.space

    def ask(self) -> dict:
        self.trial = self.study.ask()
        self.space.suggest(self.trial)
        return self.trial.params

    def report(self, step: int, value: float) -> bool:
        self.trial.report(value, step)
        return self.trial.should_prune()

    def end(self, pruned: bool, values: list[float]) -> None:
        if pruned:
            self.study.tell(self.trial, state=TrialState.PRUNED)
        else:
            self.study.tell(self.trial, min(values))


class RaysOwn:
    """Ray's wrapper and scheduler, called as Ray Tune's controller calls them."""

    def __init__(self, table: Table, seed: int):
        from ray.tune.schedulers import ASHAScheduler
        from ray.tune.search.optuna import OptunaSearch

        self.space, self.number, self.last = table.space, 0, table.steps[-1]
        self.search = OptunaSearch(self._define, metric=METRIC, mode="min", seed=seed)
        self.scheduler = ASHAScheduler(
            time_attr="step", metric=METRIC, mode="min",
            grace_period=table.first, max_t=self.last, reduction_factor=REDUCTION,
        )  # fmt: skip

    def _define(self, trial) -> None:
        self.space.suggest(trial)

    def ask(self) -> dict:
        self.number += 1
        self.trial = SimpleNamespace(trial_id=str(self.number))
        params = self.search.suggest(self.trial.trial_id)
        self.scheduler.on_trial_add(None, self.trial)
        return params

    def report(self, step: int, value: float) -> bool:
        self.result = {"step": step, "training_iteration": step, METRIC: value}
        if step >= self.last:
            return False
        decision = self.scheduler.on_trial_result(None, self.trial, self.result)
        if decision == "STOP":
            return True
        self.search.on_trial_result(self.trial.trial_id, self.result)
        return False

    def end(self, pruned: bool, values: list[float]) -> None:
        self.scheduler.on_trial_complete(None, self.trial, self.result)
        self.search.on_trial_complete(self.trial.trial_id, self.result)


METHODS = {
    "tpe + asha": lambda table, seed: Search(table, seed, sampler="tpe", asha=True),
    "ray's own": RaysOwn,
    "random + asha": lambda table, seed: Search(table, seed, sampler="random", asha=True),
    "random": lambda table, seed: Search(table, seed, sampler="random", asha=False),
}


def steps_needed(table: Table, search, within: tuple[float, ...]) -> list[int]:
    """Training steps until a value within each share of the table's best was seen."""
    spent, tried, needed = 0, set(), {}
    while len(tried) < len(table.rows):
        row = table.nearest(search.ask(), tried)
        tried.add(row)
        values, before, pruned = [], 0, False
        for step, value in table.trial(row):
            spent, before = spent + step - before, step
            values.append(value)
            for share in within:
                if value <= table.best * (1 + share):
                    needed.setdefault(share, spent)
            if pruned := search.report(step, value) and step < table.steps[-1]:
                break
        search.end(pruned, values)
    # Pruned just before it would have shown: the search never saw it.
    return [needed.get(share, spent) for share in within]


def record(folders: list[Path], table: Path) -> None:
    """Keep what searches without pruning have trained, as the table."""
    studies = [optuna.load_study(study_name=f.name, storage=f"sqlite:///{f / 'study.db'}") for f in folders]
    rows = {  # by its parameters: every search has the published recipe
        json.dumps(t.params): {str(s): float(f"{v:.6g}") for s, v in t.intermediate_values.items()}
        for study in studies
        for t in study.trials
        if t.state == TrialState.COMPLETE
    }
    rows = [{"params": json.loads(params), "values": values} for params, values in rows.items()]
    table.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} trials in {table}")


def replay(table: Table, seeds: int) -> None:
    within = (0.01, 0.05, 0.1, 0.2)
    print(
        f"{len(table.rows)} configurations of {table.steps[-1]} steps, the best {table.best:.4g}; {seeds} seeds"
    )
    print(
        f"{'steps until within':16}"
        + "".join(f"{share:>14.0%}" for share in within)
        + f"{'(quartiles at 1%)':>24}"
    )
    for name, make in METHODS.items():
        needed = [steps_needed(table, make(table, seed), within) for seed in range(seeds)]
        columns = list(zip(*needed, strict=True))
        low, _, high = statistics.quantiles((row[0] for row in needed), n=4)
        print(
            f"{name:16}"
            + "".join(f"{statistics.median(c):8.0f}{statistics.mean(c):6.0f}" for c in columns)
            + f"{f'{low:.0f} to {high:.0f}':>24}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--table", choices=TABLES, help="one of them; both if left out")
    parser.add_argument("--record", type=Path, nargs="+", help="make the table from the folders of searches")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if args.record:
        if not args.table:
            parser.error("--record needs --table: which one it is")
        return record(args.record, TABLES[args.table])
    for name in [args.table] if args.table else TABLES:
        print(f"\n{name}: ", end="")
        replay(Table(TABLES[name]), args.seeds)


if __name__ == "__main__":
    main()
