"""The search's memory: an Optuna study, which says what to try next, what is hopeless, and what has been tried."""

import functools
import json
import warnings
from collections.abc import Callable

import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import OperationalError

from ray_jobs.engine.errors import InputError, StorageLost
from ray_jobs.engine.explain import first_line
from ray_jobs.engine.patience import patiently
from ray_jobs.search.options import TuneOptions
from ray_jobs.search.plan import FRAMES, NOT_COMPARED, Plan

CONFIG, POLICY, BASELINE, SKIPPED, REASON, STEPS, LOST, BEST_STEP, WALL_S, TIMES = (  # user attributes of trials
    "config", "policy", "baseline", "skipped", "reason", "steps", "lost_steps", "best_step", "wall_s", "times",
)  # fmt: skip
SPACE, OPTIMIZED, TERMS, REPEATS, REPEATS_COST, WALL = (  # user attributes of the study
    "space", "metric", "terms", "repeats", "repeats_cost", "wall_s",
)  # fmt: skip
STUDY_FILE = "study.db"
BUSY_S = 120  # how long others, a dashboard say, may hold an SQLite file


def open_study(plan: Plan, seed: int) -> Study:
    """Open the plan's study, or begin it with the published recipes enqueued.

    Raises:
        InputError: The storage cannot be opened, or holds a study of that name for something else.
    """
    optuna.logging.disable_default_handler()
    warnings.filterwarnings("ignore", module="optuna")
    options, name = plan.options.tune, plan.study_name
    url = options.storage or f"sqlite:///{plan.output_dir / STUDY_FILE}"
    try:
        storage = _storage(url)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=options.directions,
            load_if_exists=True,
        )
    except Exception as error:
        hint = " PostgreSQL needs `pip install 'psycopg[binary]'`." if url.startswith("postgres") else ""
        raise InputError(f"--tune.storage={url} cannot be opened: {first_line(error)}{hint}") from None
    saved, fault = study.user_attrs, None
    if OPTIMIZED not in saved and study.get_trials(deepcopy=False):
        fault = "is not one of ray_jobs.tune"
    elif SPACE not in saved:
        study.set_user_attr(OPTIMIZED, options.metric)
        study.set_user_attr(TERMS, plan.terms)
        if not study.get_trials(deepcopy=False):  # else a kill came in between
            for params in plan.space.baselines():
                study.enqueue_trial(params, user_attrs={BASELINE: True})
        study.set_user_attr(SPACE, plan.space.fingerprint())
    elif saved[OPTIMIZED] != options.metric:
        fault = f"optimizes {saved[OPTIMIZED]}, the command {options.metric}"
    elif saved[SPACE] != plan.space.fingerprint():
        fault = "searches another space"
    elif changed := [
        term for term in sorted(saved[TERMS] | plan.terms) if _differs(term, saved[TERMS], plan.terms)
    ]:
        term = changed[0]
        name = term if term == FRAMES else f"--{term}"
        fault = f"was begun with {name}={saved[TERMS].get(term)}, the command has {plan.terms.get(term)}: not comparable"
    elif not plan.resume:
        fault = "has been begun already; in its own folder, --resume=true goes on with it"
    if fault:
        raise InputError(
            f"the study {name} in {url} {fault}. Another --tune.study_name or --output_dir begins a new one."
        )
    # A sampler that is made anew must not draw its first numbers again.
    study.sampler = make_sampler(options, seed + len(study.get_trials(deepcopy=False)))
    study.pruner = _pruner(plan)
    storage.patient = True
    return study


def _differs(term: str, before: dict, now: dict) -> bool:
    """Whether a term has changed. Studies that were begun with an older version know nothing of frames."""
    new = term == FRAMES and term not in before
    return not new and not term.startswith(NOT_COMPARED) and before.get(term) != now.get(term)


def _storage(url: str) -> BaseStorage:
    if url.startswith("journal://"):
        return JournalStorage(JournalFileBackend(url.removeprefix("journal://")))
    if url.startswith("sqlite:"):
        return PatientStorage(url, engine_kwargs={"connect_args": {"timeout": BUSY_S}})
    return PatientStorage(
        url, engine_kwargs={"pool_pre_ping": True}
    )  # else a connection lost overnight stays lost


class PatientStorage(RDBStorage):
    """Optuna's database, whose disk or server may be away for a while (see `patience`), once it has been opened. Each of its
    methods is one transaction, which can be tried again."""

    patient = False

    def _may_return(self, error: Exception) -> bool:
        return self.patient and isinstance(error, OperationalError) and "disk is full" not in str(error)


def _patient(method: Callable) -> Callable:
    kept = "What is in it stays; --resume=true goes on."

    @functools.wraps(method)
    def patient(self: PatientStorage, *args, **kwargs):
        def use():
            try:
                return method(self, *args, **kwargs)
            except StorageInternalError as error:
                raise (error.__cause__ or error) from error  # it says what is wrong

        passing = self._may_return
        try:
            return patiently(use, "the study", print, doing="used", passing=passing, kept=lambda: kept)
        except StorageLost:
            self.patient = False  # what is left to be done need not wait as long
            raise

    return patient


# And what Optuna (5.0) itself calls on a database beside a storage's public methods.
PRIVATE = {"_create_new_trial", "_get_best_trial_id", "_get_trials", "_set_trial_param"}
for _name in BaseStorage.__abstractmethods__ | PRIVATE:
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))


def make_sampler(options: TuneOptions, seed: int) -> BaseSampler:
    first = min(10, max(4, options.num_samples // 4))  # random ones, before the model is asked
    match options.sampler:
        case "tpe":
            # Parallel trials keep away from each other; conditional parameters are modelled in groups.
            return TPESampler(
                n_startup_trials=first, multivariate=True, group=True, constant_liar=True, seed=seed
            )
        case "random":
            return RandomSampler(seed=seed)
        case "cmaes":
            return CmaEsSampler(n_startup_trials=first, seed=seed)
        case "gp":
            return GPSampler(n_startup_trials=first, seed=seed)
        case _:
            return NSGAIISampler(population_size=max(4, options.num_samples // 4), seed=seed)


def _pruner(plan: Plan) -> BasePruner:
    grace, factor = plan.grace_steps, plan.options.tune.reduction_factor
    match plan.scheduler:
        case "asha":
            return SuccessiveHalvingPruner(grace, factor)
        case "hyperband":
            return HyperbandPruner(grace, plan.steps, factor)
        case "median":
            return MedianPruner(n_startup_trials=4, n_warmup_steps=grace - 1)
        case _:
            return NopPruner()


# ---------------------------------------------------------------------- what is in a study


def trial_name(number: int, repeat: str | None = None) -> str:
    """What a trial is called in folders and tables; `repeat` is the seed of a finalist's repetition."""
    return f"{number:04d}-seed{repeat}" if repeat else f"{number:04d}"


def trials_of(study: Study) -> list[FrozenTrial]:
    """The trials that were really begun; not those drawn twice or against a constraint."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if SKIPPED not in t.user_attrs and t.state != TrialState.WAITING]


def finished(study: Study) -> list[FrozenTrial]:
    """Trials trained to the end, the best first (by the first metric)."""
    done = [t for t in trials_of(study) if t.state == TrialState.COMPLETE]
    return sorted(done, key=lambda t: t.values[0], reverse=maximizes(study))


def repeats_of(study: Study) -> dict[str, dict[str, float]]:
    """Values of finalists under other seeds: {trial number: {seed: value}}."""
    return json.loads(study.user_attrs.get(REPEATS, "{}"))


def repeats_cost(study: Study) -> dict[str, float]:
    """Training steps and seconds that went into them."""
    return dict(study.user_attrs.get(REPEATS_COST, {STEPS: 0, WALL_S: 0.0}))


def mean_value(study: Study, trial: FrozenTrial) -> float:
    """A trial's value, averaged over all seeds it was trained with."""
    values = [trial.values[0], *repeats_of(study).get(str(trial.number), {}).values()]
    return sum(values) / len(values)


def maximizes(study: Study) -> bool:
    return study.directions[0] == StudyDirection.MAXIMIZE


def ranking(study: Study) -> list[FrozenTrial]:
    """Trials trained to the end, the best first; after --tune.seeds those trained with most seeds go first."""
    repeats = repeats_of(study)
    sign = -1 if maximizes(study) else 1
    return sorted(
        finished(study), key=lambda t: (-len(repeats.get(str(t.number), {})), sign * mean_value(study, t))
    )
