"""The tuner's own flags, `--space` and `--tune.*`; all others are those of `ray_jobs.train`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from ray_jobs.cli.command_line import build
from ray_jobs.cli.flags import closest
from ray_jobs.config.errors import all_mistakes
from ray_jobs.config.options import at_least

METRICS = ("val/action_error", "val/loss", "val/inference_ms", "env/success_rate")  # what trials report
MORE_IS_BETTER = ("env/success_rate",)
SAMPLERS = ("tpe", "random", "cmaes", "gp", "nsga2")
SCHEDULERS = ("asha", "hyperband", "median", "none")
LEAST = {
    "num_samples": 1, "workers_per_trial": 1, "seeds": 1, "finalists": 1, "keep_trials": 1, "final_steps": 1,
    "cost_per_hour": 0, "grace_steps": 1, "max_concurrent": 1, "reduction_factor": 2, "gpus_per_trial": 0,
}  # fmt: skip


@dataclass
class TuneOptions:
    """How the search is run."""

    num_samples: int = 16
    """Trials of the search, the baseline (trial 0) included."""
    metric: str = "val/action_error"
    """What is minimized; env/success_rate is maximized (with --env.type). Several, with commas, give a Pareto front."""
    sampler: str = "tpe"
    """Optuna's sampler: tpe, random, cmaes, gp or nsga2."""
    scheduler: str = "asha"
    """How hopeless trials are stopped early: asha, hyperband, median or none."""
    grace_steps: int | None = None
    """Steps no trial is stopped before. Default: the first validation."""
    reduction_factor: int = 3
    """asha and hyperband let one of so many trials go on at each rung."""
    max_concurrent: int | None = None
    """Trials at a time. Default: what the cluster holds, and more when nodes join."""
    gpus_per_trial: float | None = None
    """GPUs of each trial; 0.25 packs four on one card. Default: 1 where there are GPUs."""
    workers_per_trial: int = 1
    """Data-parallel workers of each trial."""
    seeds: int = 1
    """Train the best trials again, until each was trained with so many seeds, and rank them by the mean."""
    finalists: int = 3
    """How many of the best are trained with several seeds."""
    keep_trials: int = 3
    """Trials whose checkpoints stay on disk: the best so far."""
    storage: str | None = None
    """Optuna storage: sqlite:///file, postgresql://user@host/database, or journal:///file. Default: study.db in
    output_dir."""
    study_name: str | None = None
    """The study's name in its storage. Default: the name of output_dir."""
    time_budget_s: float | None = None
    """Seconds after which the search ends, with what it has found; --resume=true goes on from there."""
    final_steps: int = 100_000
    """Steps of the training that best/command.sh starts."""
    dry_run: bool = False
    """Check everything, time a few steps, print the plan, and stop. `--dry-run` is short for it."""
    cost_per_hour: float | None = None
    """What an hour of the cluster costs, for --dry-run to tell what the search does. `--cost_per_hour` is short for it."""

    @property
    def metrics(self) -> list[str]:
        return [name.strip() for name in self.metric.split(",")]

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        return ["maximize" if name in MORE_IS_BETTER else "minimize" for name in self.metrics]

    def __post_init__(self) -> None:
        with all_mistakes() as mistakes:
            for name, least in LEAST.items():
                mistakes += at_least(f"tune.{name}", getattr(self, name), least)
            if self.time_budget_s is not None and self.time_budget_s <= 0:
                mistakes.append(f"--tune.time_budget_s={self.time_budget_s}: must be above 0.")
            mistakes += _one_of("sampler", self.sampler, SAMPLERS)
            mistakes += _one_of("scheduler", self.scheduler, SCHEDULERS)
            for name in self.metrics:
                if name not in METRICS:
                    mistakes.append(
                        f"--tune.metric={self.metric}: nothing reports {name}. Validations report "
                        f"{', '.join(METRICS)}."
                    )
            url = urlsplit(self.storage or "")
            if url.password or "password" in parse_qs(url.query):
                mistakes.append(
                    "--tune.storage has a password in it, which would be written down with the command. Leave it out; "
                    "PGPASSWORD or ~/.pgpass is where PostgreSQL looks."
                )
            if len(set(self.metrics)) < len(self.metrics):
                mistakes.append(f"--tune.metric={self.metric}: names a metric twice.")
            if len(self.metrics) > 1 and self.sampler == "cmaes":
                mistakes.append("--tune.sampler=cmaes knows one metric only; tpe, nsga2 and gp take several.")
            if len(self.metrics) > 1 and self.seeds > 1:
                mistakes.append("--tune.seeds ranks by one metric; --tune.metric names several.")


@dataclass
class SearchFlags:
    """What the tuner's command line has and the trainer's has not."""

    space: str | None = None
    tune: TuneOptions = field(default_factory=TuneOptions)


def in_full(argv: Sequence[str]) -> list[str]:
    """The command line, with the flags in full that have a short name."""
    full = [re.sub("^--dry-run|^--dry_run", "--tune.dry_run", word) for word in argv]
    full = ["--tune.dry_run=true" if word == "--tune.dry_run" else word for word in full]
    return [f"--tune.{word[2:]}" if word.partition("=")[0] == "--cost_per_hour" else word for word in full]


def is_ours(flag: str) -> bool:
    return flag == "space" or flag.startswith("tune.")


def parse_search_flags(flags: dict[str, str]) -> SearchFlags:
    """The tuner's flags among `flags`, which were looked over by `check_flags`.

    Raises:
        InputError: One has a value that will not do.
    """
    return build(SearchFlags, {name: value for name, value in flags.items() if is_ours(name)})


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> list[str]:
    if value in choices:
        return []
    guess = closest(value, choices, cutoff=0.7)
    meant = f"did you mean {guess}? " if guess else ""
    return [f"--tune.{name}={value}: {meant}It can be {', '.join(choices)}."]
