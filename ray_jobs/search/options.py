"""The tuner's own flags, `--space` and `--tune.*`; all others are those of `ray_jobs.train`."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

import draccus

from ray_jobs.engine.errors import InputError
from ray_jobs.engine.explain import parse
from ray_jobs.engine.options import at_least

METRICS = ("val/action_error", "val/loss", "val/inference_ms", "env/success_rate")  # what trials report
MORE_IS_BETTER = ("env/success_rate",)
SAMPLERS = ("tpe", "random", "cmaes", "gp", "nsga2")
SCHEDULERS = ("asha", "hyperband", "median", "none")


@dataclass
class TuneOptions:
    """How the search is run."""

    num_samples: int = 16
    """Trials of the search, the published recipe (trial 0) included."""
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

    @property
    def metrics(self) -> list[str]:
        return [name.strip() for name in self.metric.split(",")]

    @property
    def directions(self) -> list[str]:
        return ["maximize" if name in MORE_IS_BETTER else "minimize" for name in self.metrics]

    def __post_init__(self) -> None:
        for name in ("num_samples", "workers_per_trial", "seeds", "finalists", "keep_trials", "final_steps"):
            at_least(f"tune.{name}", getattr(self, name), 1)
        at_least("tune.grace_steps", self.grace_steps, 1)
        at_least("tune.max_concurrent", self.max_concurrent, 1)
        at_least("tune.reduction_factor", self.reduction_factor, 2)
        at_least("tune.gpus_per_trial", self.gpus_per_trial, 0)
        if self.time_budget_s is not None and self.time_budget_s <= 0:
            raise InputError(f"--tune.time_budget_s={self.time_budget_s}: must be above 0.")
        _one_of("sampler", self.sampler, SAMPLERS)
        _one_of("scheduler", self.scheduler, SCHEDULERS)
        for name in self.metrics:
            if name not in METRICS:
                raise InputError(
                    f"--tune.metric={self.metric}: nothing reports {name}. Validations report "
                    f"{', '.join(METRICS)}."
                )
        url = urlsplit(self.storage or "")
        if url.password or "password" in parse_qs(url.query):
            raise InputError(
                "--tune.storage has a password in it, which would be written down with the command. Leave it out; "
                "PGPASSWORD or ~/.pgpass is where PostgreSQL looks."
            )
        if len(set(self.metrics)) < len(self.metrics):
            raise InputError(f"--tune.metric={self.metric}: names a metric twice.")
        if len(self.metrics) > 1 and self.sampler == "cmaes":
            raise InputError("--tune.sampler=cmaes knows one metric only; tpe, nsga2 and gp take several.")
        if len(self.metrics) > 1 and self.seeds > 1:
            raise InputError("--tune.seeds ranks by one metric; --tune.metric names several.")


@dataclass
class SearchFlags:
    """What the tuner's command line has and the trainer's has not."""

    space: str | None = None
    tune: TuneOptions = field(default_factory=TuneOptions)


def is_ours(flag: str) -> bool:
    return flag == "space" or flag.startswith("tune.")


def parse_search_flags(flags: dict[str, str]) -> SearchFlags:
    """The tuner's flags among `flags`.

    Raises:
        InputError: One is unknown, or has a value that will not do.
    """
    ours = {name: value for name, value in flags.items() if is_ours(name)}
    known = ["space", *(f"tune.{option.name}" for option in dataclasses.fields(TuneOptions))]
    for name, value in ours.items():
        if name not in known:
            guess = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise InputError(
                f"unknown flag --{name}; " + (f"did you mean --{guess[0]}?" if guess else "see --help.")
            )
        if not value:
            raise InputError(f"--{name}: its value is missing, as in --{name}=VALUE.")
    return parse(lambda: draccus.parse(SearchFlags, args=[f"--{k}={v}" for k, v in ours.items()]), ours)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        guess = difflib.get_close_matches(value, choices, n=1)
        meant = f"did you mean {guess[0]}? " if guess else ""
        raise InputError(f"--tune.{name}={value}: {meant}It can be {', '.join(choices)}.")
