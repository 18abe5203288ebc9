"""Trials that the study does not know, since its file was removed or emptied, taken over from their folders."""

import json
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import Trial, TrialState

from ray_jobs.config.options import ASKED, OPTIONS_FILE
from ray_jobs.search.files import A_TRIAL, ENDED, TRIALS_DIR, best_values, validations
from ray_jobs.search.plan import Plan
from ray_jobs.search.spaces.space import POLICY_TYPE, Parameter, SearchSpace, Space, flag_text
from ray_jobs.search.study.study import (
    BASELINE,
    BEST_STEP,
    CONFIG,
    LOST,
    POLICY,
    REASON,
    REPEATS,
    REPEATS_COST,
    SKIPPED,
    STEPS,
    WALL_S,
)
from ray_jobs.storage.records import Damaged, read_json, read_summary


def trials_left(folder: Path) -> list[Path]:
    """Folders of the trials that have begun in a search, its finalists' repetitions among them."""
    found = (path for path in (folder / TRIALS_DIR).glob("*") if A_TRIAL.fullmatch(path.name))
    return sorted(path for path in found if (path / OPTIONS_FILE).is_file())


def recover(plan: Plan, study: Study) -> int:
    """Add the trials to the study that have a folder and a number which it does not know; returns how many that are.

    By their numbers their folders are called, so they keep them. Those that had not ended are RUNNING, and are taken up.

    Raises:
        Damaged: A file of a trial is.
    """
    known = study.get_trials(deepcopy=False)
    if any(
        trial.state == TrialState.WAITING for trial in known
    ):  # the first ones: nothing was begun after them
        return 0
    trials: dict[int, Path] = {}
    repeats: dict[str, dict[str, Path]] = {}
    for path in trials_left(plan.output_dir):
        name = A_TRIAL.fullmatch(path.name)
        assert name is not None
        number, seed = name.groups()
        if seed:
            repeats.setdefault(number, {})[seed] = path
        elif int(number) >= len(known):
            trials[int(number)] = path
    if not trials:
        return 0
    study.sampler = RandomSampler(seed=0)  # draws nothing here: all is known
    for number in range(len(known), max(trials) + 1):
        if number in trials:
            _take_over(plan, study, trials[number])
        else:  # drawn twice or against a constraint, or killed before it began
            trial = study.ask()
            trial.set_user_attr(SKIPPED, "not known any more")
            study.tell(trial, state=TrialState.FAIL)
    if not known:
        _take_over_repeats(plan, study, repeats)
    return len(trials)


def _take_over(plan: Plan, study: Study, folder: Path) -> None:
    metrics, space = plan.options.tune.metrics, plan.space
    file = folder / OPTIONS_FILE
    typed = read_json(file, **{ASKED: dict})[ASKED].get("typed")
    try:
        params = params_of(space, typed)
    except (LookupError, TypeError, ValueError) as error:
        raise Damaged(file, f"its flags are none of this search's space ({error})") from None
    study.enqueue_trial(params)
    trial = study.ask()
    its_space, config = space.suggest(trial)
    summary, validated = read_summary(folder), validations(folder, metrics)
    status = summary.get("status")
    pruned = status == "pruned" and validated  # by the last one, not by the best
    best = validated[-1] if pruned else best_values(folder, metrics)
    noted = {POLICY: its_space.policy, CONFIG: config, BEST_STEP: best.get("step"), STEPS: summary.get("step"),
             LOST: summary.get("lost_steps"), WALL_S: summary.get("wall_s"), REASON: summary.get("error")}  # fmt: skip
    if config == its_space.first(space.fixed):
        noted[BASELINE] = True
    for name, value in noted.items():
        if value is not None:
            trial.set_user_attr(name, value)
    if len(metrics) == 1:
        for record in validated:
            trial.report(record[metrics[0]], record["step"])
    _tell(study, trial, status, [best.get(name) for name in metrics])


def _tell(study: Study, trial: Trial, status: str | None, values: list) -> None:
    """How a trial has ended, by its summary; one that has none, or was interrupted, stays RUNNING."""
    if status == "failed" or (status in ENDED and None in values):
        study.tell(trial, state=TrialState.FAIL)
    elif status == "pruned":
        study.tell(trial, state=TrialState.PRUNED)
    elif status in ENDED:
        study.tell(trial, values)


def _take_over_repeats(plan: Plan, study: Study, repeats: dict[str, dict[str, Path]]) -> None:
    found: dict[str, dict[str, float]] = {}
    cost = {STEPS: 0, WALL_S: 0.0}
    for number, folders in repeats.items():
        for seed, folder in folders.items():
            summary, best = read_summary(folder), best_values(folder, plan.options.tune.metrics)
            if summary.get("status") in ENDED and best:
                found.setdefault(str(int(number)), {})[seed] = best[plan.options.tune.metrics[0]]
                cost[STEPS] += summary["step"]
                cost[WALL_S] += summary["wall_s"]
    if found:
        study.set_user_attr(REPEATS, json.dumps(found))
        study.set_user_attr(REPEATS_COST, cost)


def params_of(space: SearchSpace, typed: dict[str, str]) -> dict[str, Any]:
    """Optuna's parameters of a trial, from the flags that it was begun with."""
    names = [one.policy for one in space.spaces]
    several = len(names) > 1
    its_space: Space = space.spaces[names.index(typed[POLICY_TYPE]) if several else 0]
    searched = (p for p in its_space.parameters if p.distribution is not None and p.flag not in space.fixed)
    params = {
        space.parameter_name(its_space, p.flag): _value(p, typed[p.flag]) for p in searched if p.flag in typed
    }
    return params | ({POLICY_TYPE: its_space.policy} if several else {})


def _value(parameter: Parameter, text: str) -> Any:
    """A parameter's value, from a flag as `flags` writes it."""
    d = parameter.distribution
    if isinstance(d, CategoricalDistribution):
        return {flag_text(choice): choice for choice in d.choices}[text]
    return int(text) if isinstance(d, IntDistribution) else float(text)
