"""What a search leaves behind: trials.csv, summary.json, best/, and the last screen."""

import contextlib
import csv
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import optuna
from huggingface_hub import HfApi
from lerobot.utils.constants import PRETRAINED_MODEL_DIR
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ray_jobs.cluster.resources import Resources
from ray_jobs.config.errors import InputError, first_line
from ray_jobs.config.options import OPTIONS_FILE
from ray_jobs.config.units import duration
from ray_jobs.search import card
from ray_jobs.search.files import (
    BEST_DIR,
    COMMAND_FILE,
    DONE,
    GOING_ON,
    STUDY_FILE,
    TIME_IS_UP,
    TRIALS_FILE,
    ranked_checkpoint,
    trial_dir,
    trial_name,
    trial_place,
)
from ray_jobs.search.options import MORE_IS_BETTER
from ray_jobs.search.plan import Plan
from ray_jobs.search.spaces.space import flags
from ray_jobs.search.spaces.space_file import PUSH
from ray_jobs.search.study.study import (
    BASELINE,
    BEST_STEP,
    CONFIG,
    LOST,
    POLICY,
    REASON,
    STEPS,
    TIMES,
    WALL,
    WALL_S,
    finished,
    maximizes,
    mean_value,
    ranking,
    repeats_cost,
    repeats_of,
    trials_of,
)
from ray_jobs.storage.records import SUMMARY_FILE, read_summary, write_json

# Trials; with fewer, what mattered most is another in every other search.
SURE_OF_IMPORTANCES = 30
OF_THE_SEARCH = (
    "eval_steps",
    "env_eval_freq",
    "log_freq",
    "save_freq",
    "steps",
    "checkpoint.keep_last",
)  # not of the long training


def note(plan: Plan, study: Study) -> set[str]:
    """Bring the folder up to date: trials.csv, and no checkpoints of trials that cannot win any more: only the best
    few keep theirs. Returns the others' names."""
    trials, keep = trials_of(study), _winners(plan, study)
    _trials_csv(plan, study, trials)
    hopeless = {trial_name(t.number) for t in trials if t.state.is_finished() and t.number not in keep}
    for name in hopeless:
        shutil.rmtree(trial_dir(plan.output_dir, name) / "checkpoints", ignore_errors=True)
    return hopeless


def reopen(plan: Plan) -> None:
    """A search is resumed: its summary is of an earlier session."""
    if summary := read_summary(plan.output_dir):
        write_json(plan.output_dir / SUMMARY_FILE, {**summary, "status": GOING_ON})


def _winners(plan: Plan, study: Study) -> set[int]:
    options = plan.options.tune
    if len(options.metrics) > 1:
        return {t.number for t in study.best_trials}
    room = max(options.keep_trials, options.finalists if options.seeds > 1 else 1)
    # With several seeds the baseline is ranked by its mean, and may win by it.
    baseline = [t for t in finished(study) if BASELINE in t.user_attrs] if options.seeds > 1 else []
    best = ranking(study)[: options.keep_trials]
    return {t.number for t in (*finished(study)[:room], *best, *baseline)}


def write(plan: Plan, study: Study, status: str, wall_s: float, each: Resources) -> dict:
    """Write everything that the search has found; returns the summary.

    Args:
        wall_s: The seconds of this session.
        each: What each worker of a trial has reserved.
    """
    wall_s += study.user_attrs.get(WALL, 0.0)
    study.set_user_attr(WALL, wall_s)
    trials = trials_of(study)
    note(plan, study)
    ranked = ranking(study)
    baselines = [t for t in ranked if BASELINE in t.user_attrs]
    # With several policies: that of the winner's, if it was trained to its end.
    baselines.sort(key=lambda t: t.user_attrs[POLICY] != ranked[0].user_attrs[POLICY])
    baseline = baselines[0] if baselines else None
    full = plan.steps * len(trials)
    trained = sum(t.user_attrs.get(STEPS, t.last_step or 0) for t in trials)
    states = [t.state for t in trials]
    workers = plan.options.tune.workers_per_trial
    summary = {
        "status": status if ranked or status != DONE else "failed",
        "study": study.study_name,
        "metric": plan.options.tune.metric,
        "horizon": plan.horizon,
        "steps": plan.steps,
        "trials": len(trials),
        **{state.name.lower(): states.count(state) for state in dict.fromkeys(states)},
        "trained_steps": trained,
        "lost_steps": sum(t.user_attrs.get(LOST, 0) for t in trials),
        "trained_share": round(trained / full, 3) if full else None,
        "wall_s": round(wall_s, 1),
        "each_trial": {"cpus": each.cpus * workers, "gpus": each.gpus * workers},
        "importances": importances(study),
        "baseline": _described(plan, study, baseline),
        "best": _described(plan, study, ranked[0] if ranked else None),
    }
    if repeats_of(study):
        summary["repeats"] = repeats_cost(study)
    if len(plan.options.tune.metrics) > 1:
        front = sorted(study.best_trials, key=lambda t: t.values)
        summary["front"] = [_described(plan, study, t) for t in front]
    if ranked:
        summary["command"] = _best(plan, ranked[0], summary)
    write_json(plan.output_dir / SUMMARY_FILE, summary)
    return summary


def _described(plan: Plan, study: Study, trial: FrozenTrial | None) -> dict | None:
    if trial is None:
        return None
    repeats = repeats_of(study).get(str(trial.number), {})
    described = {
        "trial": trial.number,
        "policy": trial.user_attrs[POLICY],
        "values": dict(zip(plan.options.tune.metrics, trial.values, strict=True)),
        "step": trial.user_attrs.get(BEST_STEP),
        "config": trial.user_attrs[CONFIG],
        "folder": trial_place(plan.place, trial_name(trial.number)),
    }
    if repeats:
        values = [trial.values[0], *repeats.values()]
        described |= {"seeds": values, "mean": mean_value(study, trial), "spread": max(values) - min(values)}
    return described


def _trials_csv(plan: Plan, study: Study, trials: list[FrozenTrial]) -> None:
    metrics, repeats = plan.options.tune.metrics, repeats_of(study)
    searched = sorted({flag for t in trials for flag in t.user_attrs.get(CONFIG, {})})
    scratch = plan.output_dir / f".{TRIALS_FILE}.tmp"
    with scratch.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            [
                "trial",
                "state",
                *metrics,
                "best_step",
                "steps",
                "wall_s",
                "baseline",
                "other_seeds",
                "reason",
                *searched,
            ]
        )
        for t in trials:
            values = t.values or [t.intermediate_values.get(t.last_step) if t.last_step else None]
            values = (values + [None] * len(metrics))[: len(metrics)]
            config = t.user_attrs.get(CONFIG, {})
            table.writerow(
                [t.number, t.state.name, *values, t.user_attrs.get(BEST_STEP),
                 t.user_attrs.get(STEPS, t.last_step), t.user_attrs.get(WALL_S, _seconds(t)),
                 BASELINE in t.user_attrs, json.dumps(repeats.get(str(t.number), {})), t.user_attrs.get(REASON),
                 *(config.get(flag) for flag in searched)]
            )  # fmt: skip
    scratch.replace(plan.output_dir / TRIALS_FILE)


def _seconds(trial: FrozenTrial) -> float | None:
    """How long a trial lasted that failed: it left no summary."""
    times = trial.user_attrs.get(TIMES, {})
    return round(times["end"] - times["begun"], 1) if {"begun", "end"} <= times.keys() else None


def importances(study: Study) -> dict[str, float]:
    """How much each parameter mattered (PED-ANOVA), the most important first; {} if too little was tried.

    PED-ANOVA compares the best fifth with all. Trials that were stopped early count as well: they are worse than those
    that were not, and of two the one that got further is better. The baseline was not drawn, and does not count.
    """
    if len(study.directions) > 1:
        return {}
    sign = -1 if maximizes(study) else 1

    def furthest_first(trial: FrozenTrial) -> tuple[float, float]:
        step, value = max(trial.intermediate_values.items())
        return -step, sign * value

    # One that the study has out of its folder has no values if its metrics.jsonl is gone.
    told = (t for t in trials_of(study) if t.state == TrialState.PRUNED and t.intermediate_values)
    pruned = sorted(told, key=furthest_first)
    drawn = [t for t in (*finished(study), *pruned) if t.params and BASELINE not in t.user_attrs]
    ranked = optuna.create_study()
    for rank, trial in enumerate(drawn):
        with contextlib.suppress(ValueError):  # a baseline off its range's grid
            ranked.add_trial(
                optuna.create_trial(params=trial.params, distributions=trial.distributions, value=rank)
            )
    try:
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.2)
        return optuna.importance.get_param_importances(ranked, evaluator=evaluator)
    except (ValueError, RuntimeError):
        return {}


def _best(plan: Plan, trial: FrozenTrial, summary: dict) -> str:
    """Write best/: checkpoint with its model card, train_config.json, and the command that trains the configuration in full; returns
    how to start it."""
    target = plan.output_dir / BEST_DIR
    scratch = plan.output_dir / f".{BEST_DIR}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    checkpoints = trial_dir(plan.output_dir, trial_name(trial.number)) / "checkpoints"
    source = ranked_checkpoint(checkpoints.parent, plan.options.tune.metrics)
    if source is not None:
        shutil.copytree(source.resolve(), scratch / "checkpoint", copy_function=_link_or_copy)
        with contextlib.suppress(
            InputError, OSError
        ):  # the data may be gone by now; the answer is worth more
            card.write(plan, summary, scratch / "checkpoint")
        shutil.copyfile(source / "pretrained_model" / "train_config.json", scratch / "train_config.json")
        shutil.copyfile(checkpoints.parent / OPTIONS_FILE, scratch / OPTIONS_FILE)  # what was held out, say
    words = [word for word in plan.base if word[2:].partition("=")[0] not in OF_THE_SEARCH]
    typed = [f"--{flag}={plan.typed[flag]}" for flag in ("log_freq", PUSH) if flag in plan.typed]
    steps = plan.options.tune.final_steps
    seed = plan.recipe.lerobot.seed
    words += typed + flags(trial.user_attrs[CONFIG])
    words += [
        f"--steps={steps}",
        f"--save_freq={max(1, steps // 20)}",
        f"--eval_steps={max(1, steps // 20)}",
        f"--env_eval_freq={max(1, steps // 20) if plan.recipe.lerobot.env_eval_freq else 0}",
        *([f"--seed={seed}"] if seed is not None else []),
        f"--output_dir={plan.place}-best",
    ]
    script = scratch / COMMAND_FILE
    script.write_text(
        "#!/usr/bin/env bash\n"
        f"# The configuration of trial {trial.number}, the best of {plan.name}, trained in full.\n"
        "# More flags may follow and go first, as --ray.num_workers=4 or --output_dir=elsewhere.\n"
        f"python=${{PYTHON:-{shlex.quote(sys.executable)}}}  # the one of the search, if it is here\n"
        'command -v "$python" > /dev/null || python=python\n'
        'exec "$python" -m ray_jobs.train \\\n    '
        + " \\\n    ".join(shlex.quote(word) for word in _last_of_each(words))
        + ' \\\n    "$@"\n'
    )
    script.chmod(0o755)
    old = plan.output_dir / f".{BEST_DIR}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return f"bash {shlex.quote(str(target / COMMAND_FILE))}"


def _last_of_each(words: list[str]) -> list[str]:
    return list({word.partition("=")[0]: word for word in words}.values())


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)  # checkpoints are never written in place
    except OSError:
        shutil.copy2(source, target)


def last_screen(plan: Plan, summary: dict, say: Callable[[str], None]) -> None:
    """Best against the baseline, what mattered, the next command."""
    counts = ", ".join(
        f"{summary[state]} {word}"
        for state, word in (
            ("complete", "trained in full"),
            ("pruned", "pruned"),
            ("fail", "failed"),
            ("running", "unfinished"),
        )
        if summary.get(state)
    )
    say(f"\n{summary['status']}: {summary['trials']} trials in {duration(summary['wall_s'])} ({counts}), "
        f"{summary['trained_share'] or 0:.0%} of the steps of full trials")  # fmt: skip
    best, baseline = summary["best"], summary["baseline"]
    if best is None:
        return
    for row in summary.get("front", ()):
        say(f"front       {_values(row)} (trial {row['trial']})")
    if "front" not in summary:
        say(f"best        {_values(best)} (trial {best['trial']})" + _spread(best))
        if baseline:
            first = next(iter(baseline["values"]))
            ours, theirs = (row.get("mean", row["values"][first]) for row in (best, baseline))
            if first in MORE_IS_BETTER:
                gain = f"best is {100 * (ours - theirs):.1f} points higher"
            else:
                gain = f"best is {1 - ours / theirs if theirs else 0.0:.1%} lower"
            batches = [row["config"].get("batch_size") for row in (best, baseline)]
            equal = "as many steps" + (
                f" of {batches[1]} samples, not {batches[0]}" if batches[0] != batches[1] else ""
            )
            say(f"baseline    {_values(baseline)} (trial {baseline['trial']}, {equal}){_spread(baseline)}; "
                f"{gain}")  # fmt: skip
    if summary["importances"]:
        top = list(summary["importances"].items())[:3]
        ended = summary.get("complete", 0) + summary.get("pruned", 0)
        guess = f" (a rough guess, of {ended} trials)" if ended < SURE_OF_IMPORTANCES else ""
        say("mattered    " + ", ".join(f"{name} {share:.0%}" for name, share in top) + guess)
    changed = {k: v for k, v in best["config"].items() if not baseline or baseline["config"].get(k) != v}
    say("            " + ", ".join(word[2:] for word in flags(changed)) if changed else "")
    study = "" if plan.options.tune.storage else f"{STUDY_FILE},"
    say(f"left        {plan.place}/{{trials.csv,summary.json,{study}best}}")
    say(f"train it    {summary['command']}")
    policy = _policy(plan)
    if policy.is_dir() and not plan.pushes:
        say(f"upload it   hf upload USER/NAME {shlex.quote(str(policy))}")


def why_nothing(study: Study, status: str) -> str:
    """Why a search that has ended has no best trial, in two lines at most."""
    if status == TIME_IS_UP:
        return "the time was up before any trial was trained to its end; --resume=true goes on."
    trials = trials_of(study)
    reasons = Counter(reason for t in trials if (reason := t.user_attrs.get(REASON)))
    often = "".join(f" {count} failed with:\n{first_line(text)}" for text, count in reasons.most_common(1))
    return f"none of {len(trials)} trial(s) was trained to its end, see trials.csv.{often}"


def upload(plan: Plan) -> str:
    """Upload the best policy with its card to `--policy.repo_id`; returns what to tell: a search is none the worse for a
    network that failed."""
    cfg, policy = plan.recipe.lerobot.policy, _policy(plan)
    if not policy.is_dir():
        return "nothing to upload: the best trial has left no checkpoint."
    try:
        api = HfApi()
        repo = api.create_repo(cfg.repo_id, private=cfg.private, exist_ok=True).repo_id
        return f"uploaded    {api.upload_folder(repo_id=repo, folder_path=policy).repo_url}"
    except Exception as error:
        return f"not uploaded to {cfg.repo_id}: {first_line(error)}"


def _policy(plan: Plan) -> Path:
    return plan.output_dir / BEST_DIR / "checkpoint" / PRETRAINED_MODEL_DIR


def _values(row: dict) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in row["values"].items())


def _spread(row: dict) -> str:
    return (
        f", mean of {len(row['seeds'])} seeds {row['mean']:.4g}, spread {row['spread']:.2g}"
        if "seeds" in row
        else ""
    )
