"""What is in a search's study: the names of what is noted there, and questions about it."""

import json

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from ray_jobs.storage.records import parse_json

CONFIG, POLICY, BASELINE, SKIPPED, REASON, STEPS, LOST, BEST_STEP, WALL_S, TIMES = (  # user attributes of trials
    "config", "policy", "baseline", "skipped", "reason", "steps", "lost_steps", "best_step", "wall_s", "times",
)  # fmt: skip
SPACE, OPTIMIZED, TERMS, REPEATS, REPEATS_COST, WALL = (  # user attributes of the study
    "space", "metric", "terms", "repeats", "repeats_cost", "wall_s",
)  # fmt: skip


def damage(study: Study) -> str | None:
    """What is not in a study of ours as we have written it."""
    notes = study.user_attrs
    for name, kind in ((SPACE, str), (TERMS, dict), (REPEATS_COST, dict), (WALL, float)):
        if name in notes and not isinstance(notes[name], kind):
            return f"its {name} is {json.dumps(notes[name])[:60]}"
    try:
        parse_json(notes.get(REPEATS, "{}"))
    except (ValueError, TypeError) as error:
        return f"its {REPEATS} {error}"
    for trial in study.get_trials(deepcopy=False):
        if not isinstance(trial.user_attrs.get(CONFIG, {}), dict):
            return f"the {CONFIG} of trial {trial.number} is {json.dumps(trial.user_attrs[CONFIG])[:60]}"
    return None


def id_of(trial: Trial | FrozenTrial) -> int:
    """A trial's id in its storage, which `Trial` and `storage.get_trial` take. Optuna 5 tells it nowhere in public."""
    return trial._trial_id  # noqa: SLF001


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
