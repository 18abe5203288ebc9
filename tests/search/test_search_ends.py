"""How a search ends that cannot deliver, whose study is lost, or that is asked to stop while storage is away; and where all of
it lies, whatever the folder is called.
"""

import json
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from ray_jobs.config.errors import RunError
from support.commands import tiny_act, train_in_process
from support.data_sets import make
from support.processes import Run
from support.searches import ACT, on_numbers, search, space_file

ODD = "a b#c? 100%41 [v2] {x}, ü"  # legal in a name, and something else in an address or a pattern
DIVERGE = {
    **ACT,
    "baseline": {**ACT["baseline"], "policy.optimizer_lr": 1e30},
    "search": {"policy.optimizer_lr": {"low": 1e30, "high": 1e35, "log": True}},
}


def strict(text: str):
    """JSON as everybody else reads it: it knows no NaN."""

    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> list[str]:
    numbers = make(tmp_path_factory.mktemp("ends") / "numbers", [23, 17, 9, 20, 21], seed=2)
    return on_numbers(numbers)


def trials_in(folder: Path, name: str = "run") -> list[FrozenTrial]:
    """A study as it was left, opened without the help of an address."""
    copy = Path(shutil.copy(folder / "study.db", folder.parent / ".copy.db"))
    storage = optuna.storages.RDBStorage(
        "sqlite://", engine_kwargs={"creator": lambda: sqlite3.connect(copy, check_same_thread=False)}
    )
    return optuna.load_study(study_name=name, storage=storage).trials


def told(trial: FrozenTrial) -> dict:
    """What a study must not forget of a trial."""
    known = ("config", "policy", "baseline", "steps", "best_step", "lost_steps", "reason")
    attributes = {name: trial.user_attrs[name] for name in known if name in trial.user_attrs}
    values = trial.values if trial.state != TrialState.FAIL else None
    return {"state": trial.state, "values": values, "params": trial.params,
            "intermediate": trial.intermediate_values, **attributes}  # fmt: skip


@pytest.fixture(scope="module")
def found(common, tmp_path_factory) -> Path:
    """A search that has ended, with pruned trials and repetitions, in a folder with an odd name."""
    folder = tmp_path_factory.mktemp("odd") / ODD
    folder.mkdir()
    flags = [f"--space={space_file(folder)}", f"--output_dir={folder / 'run'}", "--tune.num_samples=6"]
    flags += ["--steps=18", "--eval_steps=2", "--tune.seeds=2", "--tune.finalists=1"]
    assert search(*common, *flags) == 0
    return folder / "run"


def test_all_lies_in_a_folder_with_an_odd_name(found):
    assert {path.name for path in found.parent.iterdir()} - {".copy.db"} == {"space.yaml", "run"}
    assert {path.name for path in found.parent.parent.iterdir()} == {ODD}
    assert {t.state for t in trials_in(found)} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert {path.name for path in (found / "trials").iterdir()} >= {f"{n:04d}" for n in range(6)}


@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_resumed_without_its_study(found, tmp_path, capsys, how):
    """The trials' folders tell what it knew: the states, the values, the validations, the seeds of the finalists. And nothing is
    trained again."""
    copy = Path(shutil.copytree(found, tmp_path / "run", symlinks=True))
    before = trials_in(copy)
    records = {path: path.read_bytes() for path in copy.glob("trials/*/metrics.jsonl")}
    repeats = strict((copy / "summary.json").read_text())["repeats"]
    (copy / "study.db").unlink() if how == "removed" else (copy / "study.db").write_bytes(b"")
    assert search(f"--output_dir={copy}", "--resume=true") == 0
    assert "did not know 6 trial(s) of this search: taken over from their folders" in capsys.readouterr().out
    assert [told(t) for t in trials_in(copy)] == [told(t) for t in before]
    assert {path: path.read_bytes() for path in copy.glob("trials/*/metrics.jsonl")} == records
    summary = strict((copy / "summary.json").read_text())
    assert summary["repeats"]["steps"] == repeats["steps"] and summary["best"]["seeds"]


def test_a_validation_that_is_no_number(common, tmp_path):
    """It ends the run, which has not delivered; what is written down is JSON."""
    flags = [w for w in tiny_act(tmp_path, tmp_path / "run") if w.startswith("--policy.")]
    more = [f"--output_dir={tmp_path / 'run'}", "--steps=1", "--eval_steps=1", "--policy.optimizer_lr=1e30"]
    with pytest.raises(RunError, match="step 1: val/loss is (nan|inf).*no finite numbers"):
        train_in_process([*common, *flags, *more])
    lines = [strict(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 1 and lines[-1]["val/action_error"] is None
    assert strict((tmp_path / "run/summary.json").read_text())["status"] == "failed"


def test_nothing_was_trained_to_its_end(common, tmp_path, capsys):
    """Status 1 and a line that is true; trials whose validation is no number have failed."""
    output = tmp_path / "run"
    flags = [f"--space={space_file(tmp_path, DIVERGE)}", f"--output_dir={output}", "--tune.num_samples=2"]
    with pytest.raises(
        RunError, match="^none of 2 trial.s. was trained to its end, see trials.csv. 2 failed"
    ):
        search(*common, *flags, "--steps=4", "--eval_steps=1")
    assert [t.state for t in trials_in(output)] == [TrialState.FAIL] * 2
    printed = capsys.readouterr().out
    assert printed.count("failed (step 1: val/loss is ") == 2 and "failed: 2 trials in" in printed
    assert strict((output / "summary.json").read_text())["status"] == "failed"
    for file in (*output.rglob("*.json"), *output.rglob("*.jsonl")):
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            strict(text)
    assert "No trial was trained to its end" in (output / "report.html").read_text()


# ---------------------------------------------------------------------- for real, in a process of its own


def begin(common: list[str], output: Path, *more: str) -> Run:
    """A search of which at least one has ended."""
    flags = [f"--space={space_file(output.parent)}", f"--output_dir={output}", "--tune.num_samples=40"]
    flags += ["--steps=400", "--eval_steps=20", "--tune.grace_steps=40", "--ray.address=local", *more]
    run = Run([*common, *flags], job="ray_jobs.tune")
    run.wait_for(" at step")
    return run


def ends_within(run: Run, seconds: float, since: float) -> int:
    status = run.end(180)
    took = time.monotonic() - since
    print(f"ended after {took:.1f} s, load {os.getloadavg()[0]:.1f}")
    assert took < seconds, run.printed
    return status


@pytest.mark.slow
@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_study_that_vanishes_while_the_search_runs(common, tmp_path, how):
    """It says so and ends, its running trials with a checkpoint; resumed, it knows all that it knew."""
    output = tmp_path / "run"
    run = begin(common, output)
    known = trials_in(output)
    (output / "study.db").unlink() if how == "removed" else os.truncate(output / "study.db", 0)
    gone = time.monotonic()
    assert ends_within(run, 60, gone) == 1, run.printed
    assert f"failed: {output / 'study.db'} is gone, or was emptied." in run.printed, run.printed
    assert "Traceback" not in run.printed
    trained = {path: path.read_text() for path in output.glob("trials/*/metrics.jsonl")}
    begun = {int(path.parent.name) for path in output.glob("trials/*/options.json")}
    again = Run([f"--output_dir={output}", "--resume=true", "--ray.address=local"], job="ray_jobs.tune")
    again.wait_for("taken over from their folders")
    again.wait_for(" at step")
    again.process.send_signal(signal.SIGTERM)
    assert again.end(180) == 130, again.printed
    now = {t.number: t for t in trials_in(output)}
    for trial in known:
        if trial.state.is_finished():
            assert told(now[trial.number]) == told(trial)
        elif trial.number in begun:  # else it was only drawn, and its number is another's now
            assert now[trial.number].params == trial.params
    for path, text in trained.items():
        assert path.read_text().startswith(text), "a trial has begun anew"


@pytest.mark.slow
def test_stopping_does_not_wait_for_the_study(common, tmp_path):
    """Somebody else holds the file: SIGTERM is heard all the same."""
    output = tmp_path / "run"
    run = begin(common, output)
    other = sqlite3.connect(output / "study.db", isolation_level=None, timeout=30)
    other.execute("BEGIN EXCLUSIVE")
    run.wait_for("the study cannot be used, trying again")
    run.process.send_signal(signal.SIGTERM)
    assert ends_within(run, 40, time.monotonic()) == 1, run.printed
    other.execute("COMMIT")
    assert "the study could not be used before this was stopped" in run.printed, run.printed
    assert "Traceback" not in run.printed and "--resume=true goes on" in run.printed
