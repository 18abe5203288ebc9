"""`python -m ray_jobs.list`: an empty folder, forty runs, torn ones, one at work."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from ray_jobs import list as job
from ray_jobs.cli.command_line import read_flags
from ray_jobs.cli.early_checks import check_command
from ray_jobs.config.errors import InputError
from ray_jobs.search.early_checks import check_search
from support.commands import ROOT

MADE = ROOT / "tests" / "data" / "made_by_0.1.0"
NOW = 1_796_000_000


@pytest.fixture
def made(tmp_path):
    """A folder with a finished run and a finished search."""
    shutil.copytree(MADE / "run", tmp_path / "act", symlinks=True)
    shutil.copytree(MADE / "search", tmp_path / "searches" / "first", symlinks=True)
    return tmp_path


def listed(folder, capsys) -> list[str]:
    assert job.main([str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


def change(file, **members) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **members}))


def test_what_is_finished(made, capsys):
    lines = listed(made, capsys)
    assert len(lines) == 2, lines  # the search's trials are not listed
    run, search = sorted(lines, key=lambda line: " search " in line)
    assert run.split()[1:5] == ["run", "finished", "step", "4/4"] and "val/action_error 0.9173 at 4" in run
    assert search.split()[1:5] == ["search", "done", "2/2", "trials"] and "0.7747, trial 1" in search


def test_an_empty_folder(tmp_path, capsys):
    assert listed(tmp_path, capsys) == [f"there is no run and no search below {tmp_path}"]


def test_forty_runs(made, capsys):
    """The newest first, in straight columns."""
    for number in range(40):
        run = shutil.copytree(made / "act", made / f"run-{number}", symlinks=True)
        for file in (run, *run.iterdir()):
            os.utime(file, (NOW - 60 * number, NOW - 60 * number))
    lines = [line for line in listed(made, capsys) if "/run-" in line]
    assert [line.split()[0].rpartition("-")[2] for line in lines] == [str(number) for number in range(40)]
    assert len({line.index(" run ") for line in lines}) == 1


def test_what_is_not_at_its_end(made, capsys):
    """The command below it goes on with it: it passes the job's own look at its command line."""
    odd = (made / "act").rename(made / "act #2")
    change(odd / "summary.json", status="interrupted", step=3)
    change(made / "searches" / "first" / "summary.json", status="interrupted")
    cut_off = shutil.copytree(odd, made / "cut off", symlinks=True)
    (cut_off / "summary.json").unlink()
    lines = listed(made, capsys)
    assert sum(" interrupted " in line for line in lines) == 2
    assert any("cut off  " in line and "step 4/4" in line for line in lines)
    commands = [shlex.split(line) for line in lines if line.startswith("    python")]
    assert len(commands) == 3
    for _, _, module, *words in commands:
        flags, _ = read_flags(words)
        (check_search if module.endswith("tune") else check_command)(flags)


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "options.json"])
def test_a_torn_one(name, made, capsys):
    """It is told, and the others are listed."""
    (made / "act" / name).write_text('{"step": \n{"step": 1}\n')
    lines = listed(made, capsys)
    assert len(lines) == 2
    assert [line for line in lines if "unreadable" in line and name in line and str(made / "act") in line]


def test_one_that_is_at_work(made, capsys):
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", hold, made / "act" / ".driver"], stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        assert any(" running " in line for line in listed(made, capsys))
        other.kill()


@pytest.mark.parametrize(
    "words, told",
    [
        (["/nowhere"], "no such folder"),
        (["s3://bucket/runs"], "must be a folder"),
        (["--all"], "one folder is wanted"),
        (["a", "b"], "one folder is wanted"),
    ],
)
def test_refusals(words, told):
    with pytest.raises(InputError, match=told):
        job.main(words)
