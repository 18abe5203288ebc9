"""Begin a search's study, or go on with it: what is noted there must be what the command asks for."""

import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.study import Study
from sqlalchemy import make_url

from ray_jobs.config.errors import InputError, first_line
from ray_jobs.search.plan import FRAMES, NOT_COMPARED, Plan
from ray_jobs.search.study.recover import recover
from ray_jobs.search.study.samplers import make_pruner, make_sampler
from ray_jobs.search.study.storage import PatientStorage, address_of, open_storage
from ray_jobs.search.study.study import BASELINE, OPTIMIZED, POLICY, SPACE, TERMS, damage


def open_study(plan: Plan, seed: int, stop: Callable[[], object] = lambda: False) -> Study:
    """Open the plan's study, or begin it with the baselines enqueued. A resumed search whose study does not know
    its trials takes them over from their folders.

    Args:
        stop: Whether the search was asked to stop, which does not wait for the study (see `retry`).

    Raises:
        InputError: The storage cannot be opened, or holds a study of that name for something else.
    """
    optuna.logging.disable_default_handler()
    warnings.filterwarnings("ignore", module="optuna")
    options, name = plan.options.tune, plan.study_name
    url = address_of(plan)
    try:
        storage = open_storage(url)
        how: dict[str, Any] = {"storage": storage, "study_name": name, "directions": options.directions}
        study = optuna.create_study(**how, load_if_exists=True)
        if {
            OPTIMIZED,
            TERMS,
        } <= study.user_attrs.keys() and SPACE not in study.user_attrs:  # killed in `_begin`
            optuna.delete_study(study_name=name, storage=storage)
            study = optuna.create_study(**how)
    except Exception as error:
        no_driver = isinstance(error, ImportError) and make_url(url).get_dialect().driver == "psycopg"
        hint = " PostgreSQL needs `pip install 'psycopg[binary]'`." if no_driver else ""
        raise InputError(f"--tune.storage={url} cannot be opened: {first_line(error)}{hint}") from None
    saved, fault, taken = study.user_attrs, None, 0
    if OPTIMIZED not in saved and study.get_trials(deepcopy=False):
        fault = "is not one of ray_jobs.tune"
    elif OPTIMIZED not in saved:
        taken = _begin(plan, study)
    elif text := damage(study):
        fault = f"is damaged: {text}"
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
    elif not plan.remote:  # what the study in a bucket does not know has not been (see `bucket_copy`)
        taken = recover(plan, study)
    if fault:
        raise InputError(
            f"the study {name} in {url} {fault}. Another --tune.study_name or --output_dir begins a new one."
        )
    if taken:
        print(f"{url} did not know {taken} trial(s) of this search: taken over from their folders.")
    # A sampler that is made anew must not draw its first numbers again.
    study.sampler = make_sampler(options, seed + len(study.get_trials(deepcopy=False)))
    study.pruner = make_pruner(plan)
    if isinstance(storage, PatientStorage):
        storage.be_patient(stop)
    return study


def _begin(plan: Plan, study: Study) -> int:
    """Fill a new study, which a resumed search has only if its own is gone; returns how many trials it has taken over."""
    study.set_user_attr(OPTIMIZED, plan.options.tune.metric)
    study.set_user_attr(TERMS, plan.terms)
    taken = recover(plan, study) if plan.resume else 0
    there = {t.user_attrs[POLICY] for t in study.get_trials(deepcopy=False) if BASELINE in t.user_attrs}
    for space, params in zip(plan.space.spaces, plan.space.baselines(), strict=True):
        if space.policy not in there:
            study.enqueue_trial(params, user_attrs={BASELINE: True})
    study.set_user_attr(SPACE, plan.space.fingerprint())
    return taken


def _differs(term: str, before: dict, now: dict) -> bool:
    """Whether a term has changed. Studies that were begun with an older version know nothing of frames."""
    new = term == FRAMES and term not in before
    return not new and not term.startswith(NOT_COMPARED) and before.get(term) != now.get(term)
