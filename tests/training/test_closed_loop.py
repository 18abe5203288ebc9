"""The simulator in the midst of a training and as what a search maximizes.

The policy is `colour_follower`, whose success hangs on one field of its config and needs no training.
"""

import json
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from ray_jobs.config.errors import InputError
from ray_jobs.config.events import Log, Validated
from ray_jobs.storage.records import read_json, read_metrics
from support.commands import tiny_act, train_in_process
from support.evaluations import IN_PARTS, PLUGIN, evaluated
from support.searches import search

EPISODES = (*IN_PARTS, "--eval.n_episodes=6", "--eval.batch_size=1")


def follower(root: Path, output_dir: Path, *more: str) -> list[str]:
    """Flags of a training of the colour follower."""
    shared = [w for w in tiny_act(root, output_dir) if not w.startswith(("--policy.", "--env_eval"))]
    own = ["--policy.type=colour_follower", "--policy.device=cpu", "--policy.push_to_hub=false", PLUGIN]
    return [*shared, *own, "--data.eval_episodes=[10,11]", "--max_eval_samples=4", *more]


def test_while_training(parts, tmp_path):
    """Every `--env_eval_freq` steps and at the end, the value that `evaluate` and so `lerobot-eval` would give."""
    flags = follower(parts, tmp_path / "run", *EPISODES, "--env_eval_freq=2", "--eval_steps=3", "--steps=5")
    summary, events = train_in_process(flags)
    rates = {
        e.step: e.values["env/success_rate"]
        for e in events
        if isinstance(e, Validated) and "env/success_rate" in e.values
    }
    assert list(rates) == [2, 4, 5] and len(set(rates.values())) == 1
    lines = read_metrics(tmp_path / "run")
    assert {r["step"]: r["env/success_rate"] for r in lines if "env/success_rate" in r} == rates
    assert summary["last"]["env/success_rate"] == rates[5]
    again = (f"--checkpoint={summary['checkpoint']}", *EPISODES, PLUGIN, "--ray.num_workers=0")
    (result,) = evaluated(tmp_path / "out", *again, "--data.eval_episodes=[10]").values()
    assert result["simulator"]["success_rate"] == pytest.approx(rates[5])
    assert 0 < rates[5] < 1, "too easy or too hard to tell anything"


def test_leaves_the_training_alone(parts, tmp_path):
    """Losses and gradients are the same, bit for bit, with the simulator every other step and without it."""

    def losses(name: str, *flags: str) -> list:
        _, events = train_in_process(
            tiny_act(parts, tmp_path / name, "--steps=4", "--save_checkpoint=false", *flags)
        )
        return [(e.values["train/loss"], e.values["train/grad_norm"]) for e in events if isinstance(e, Log)]

    one = (*IN_PARTS, "--eval.n_episodes=2", "--eval.batch_size=1", "--env_eval_freq=2")
    assert losses("with", *one) == losses("without")


@pytest.mark.slow
def test_a_search_maximizes_it(parts, tmp_path, capsys):
    """The study is told to maximize; what succeeds less is pruned, and the best succeeds most."""
    space = {
        "policy": "colour_follower",
        "baseline": {"policy.release_at": 0.7},
        "search": {"policy.release_at": {"choices": [0.7, 0.18, 0.3, 0.5, 0.6]}},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    flags = [w for w in follower(parts, tmp_path / "run") if not w.startswith("--policy.type")]
    more = (
        *EPISODES,
        "--steps=3",
        "--tune.num_samples=5",
        "--tune.metric=env/success_rate",
        "--tune.max_concurrent=1",
    )
    assert search(*flags, *more, f"--space={tmp_path / 'space.yaml'}") == 0
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    assert study.direction.name == "MAXIMIZE"
    done = {t.number: t.value for t in study.trials if t.state == TrialState.COMPLETE}
    pruned = {t.number: t.value for t in study.trials if t.state == TrialState.PRUNED}
    best = read_json(tmp_path / "run" / "summary.json")["best"]
    assert best["values"]["env/success_rate"] == max(done.values()) > 0
    assert best["trial"] == study.best_trial.number
    assert pruned and max(pruned.values()) < max(done.values())
    assert best["config"]["policy.release_at"] == 0.18 and done[0] == 0, (
        "the published recipe lets go too early"
    )
    assert f"best is {100 * max(done.values()):.1f} points higher" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"<b>{max(done.values()):.4g}</b>" in page and json.dumps("env/success_rate")[1:-1] in page


def test_mistakes(parts, tmp_path):
    wrong = "--env.type=aloha"
    with pytest.raises(InputError, match=r"--env.type=aloha: this environment is not installed here"):
        train_in_process(tiny_act(parts, tmp_path / "run", wrong, "--env_eval_freq=2"))
    train_in_process(tiny_act(parts, tmp_path / "run", wrong, "--steps=1", "--save_checkpoint=false"))
    with pytest.raises(InputError, match="needs a simulator: --env.type"):
        more = ("--tune.metric=env/success_rate", "--steps=4", "--space=search_spaces/act.yaml")
        search(*tiny_act(parts, tmp_path / "search")[:3], f"--output_dir={tmp_path / 'search'}", *more)
