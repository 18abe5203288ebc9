"""Files of a run or a search that hold something else than we have written: one line says which, and nothing is changed."""

import json
import shutil
from pathlib import Path

import pytest

from ray_jobs import evaluate, report, tune
from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError
from support.commands import tiny_act

TABLE = "trial,state,val/action_error,best_step,steps,wall_s,baseline,other_seeds,reason,policy.type\n"
ROW = "0,COMPLETE,0.5,2,2,1.5,True,{},,act\n"
SUMMARY = {"status": "done", "metric": "val/action_error", "wall_s": 1.0, "best": None}


@pytest.fixture
def searched(tmp_path) -> Path:
    """What a search leaves, in small."""
    folder = tmp_path / "search"
    (folder / "trials" / "0000").mkdir(parents=True)
    flags = {"steps": "2", "dataset.repo_id": "local/parts"}
    (folder / "search.json").write_text(json.dumps({"flags": flags, "policies": ["act"]}))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "trials.csv").write_text(TABLE + ROW)
    (folder / "trials/0000/metrics.jsonl").write_text('{"step": 2, "val/action_error": 0.5}\n')
    return folder


def told(do, *args) -> str:
    """The line that a user gets to read."""
    with pytest.raises(InputError) as refused:
        do(*args)
    assert len(str(refused.value).splitlines()) <= 2
    return str(refused.value)


WRONG = ["[1]", "null", '"text"', "{", "", "\xff", pytest.param("[" * 100_000, id="deep")]


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.parametrize("name", ["search.json", "summary.json"])
def test_report_of_a_search(searched, name, text):
    assert report.main([f"--output_dir={searched}"]) == 0
    (searched / name).write_text(text, encoding="latin-1")
    assert f"{searched / name} is damaged" in told(report.main, [f"--output_dir={searched}"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("search.json", '{"flags": [1], "policies": ["act"]}'),
        ("search.json", '{"flags": {"steps": 5}, "policies": ["act"]}'),
        ("search.json", '{"flags": {"steps": "many"}, "policies": ["act"]}'),
        ("summary.json", json.dumps({**SUMMARY, "best": [1]})),
        ("summary.json", json.dumps({**SUMMARY, "front": [1]})),
        ("summary.json", json.dumps({**SUMMARY, "importances": 1})),
        ("trials.csv", TABLE + "x" + ROW),
        ("trials.csv", TABLE + "1,COMPLETE\n"),
        ("trials.csv", "a,b\n1,2\n"),
        ("trials/0000/metrics.jsonl", '[1]\n{"step": 2}\n'),
        ("trials/0000/metrics.jsonl", '{"step": "x"}\n{"step": 2}\n'),
    ],
)
def test_report_of_a_search_whose_files_are_of_another_shape(searched, name, text):
    (searched / name).write_text(text)
    assert f"{searched / name} is damaged" in told(report.main, [f"--output_dir={searched}"])


def test_report_of_a_search_with_a_trial_whose_value_is_no_number(searched):
    """Older versions let a trial end with NaN."""
    (searched / "trials.csv").write_text(TABLE + ROW + ROW.replace("0,COMPLETE,0.5", "1,COMPLETE,nan"))
    assert report.main([f"--output_dir={searched}"]) == 0


@pytest.mark.parametrize("text", [*WRONG, '{"flags": [1], "policies": []}', '{"flags": {}}'])
def test_resuming_and_evaluating_a_search(searched, text):
    (searched / "search.json").write_text(text, encoding="latin-1")
    damaged = f"{searched / 'search.json'} is damaged"
    assert damaged in told(tune.main, [f"--output_dir={searched}", "--resume=true"])
    assert damaged in told(evaluate.main, [f"--checkpoint={searched}"])


@pytest.mark.parametrize("text", [*WRONG, '{"step": 2, "steps": "2", "status": "finished"}'])
def test_report_of_a_run(run, tmp_path, text):
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    (copy / "summary.json").write_text(text, encoding="latin-1")
    assert f"{copy / 'summary.json'} is damaged" in told(report.main, [f"--output_dir={copy}"])


def test_lines_that_are_no_records(run, parts, tmp_path):
    """A torn last line is a kill's; another one would be lost with all that follow it, if the run went on."""
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    metrics = copy / "metrics.jsonl"
    good = metrics.read_text()
    flags = tiny_act(parts, copy, "--steps=3", "--resume=true")
    metrics.write_text(good + '{"step": 3, "tr')
    preflight.check(resolve(flags))
    metrics.write_text("[1]\n" + good)
    damaged = f"{metrics} is damaged: line 1 is no record"
    assert damaged in told(preflight.check, resolve(flags))
    assert damaged in told(report.main, [f"--output_dir={copy}"])
    assert metrics.read_text() == "[1]\n" + good


@pytest.mark.parametrize("name", ["options.json", "checkpoints/last/training_state/training_step.json",
                                  "checkpoints/last/pretrained_model/train_config.json"])  # fmt: skip
@pytest.mark.parametrize("text", ["[1]", "{"])
def test_evaluating_a_run(run, tmp_path, name, text):
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    (copy / name).resolve().write_text(text)
    message = told(evaluate.main, [f"--checkpoint={copy}", f"--output_dir={tmp_path / 'scores'}"])
    assert Path(name).name in message and "is damaged" in message


def test_notes_of_a_cache_are_made_again(tmp_path):
    """What is kept to be faster is no reason to stop."""
    from ray_jobs.storage.fingerprint import file_hashes

    root = tmp_path / "data"
    root.mkdir()
    (root / "a").write_text("a")
    right = file_hashes(root, ("*",), tmp_path)
    for text in ("[1]", "{", json.dumps({str(root / "a"): 1}), json.dumps({str(root / "a"): []})):
        (tmp_path / "files.json").write_text(text)
        assert file_hashes(root, ("*",), tmp_path) == right
