"""Data sets of the world: what LeRobot trains, we train with the same losses; what it does not, we refuse in a line.

The table is in `properties.py`, what LeRobot makes of each set in `stock.json`, from `python tests/world/stock.py`.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from drawn import data_sets
from hypothesis import given, settings
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from make import made, write
from properties import TABLE, DataSet
from stock import RECORD, STEPS, flags_for, train_as_stock

from ray_jobs import cache, doctor, evaluate, train
from ray_jobs.checks.columns import check_kinds
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.config.events import Log
from ray_jobs.storage.records import read_metrics
from support.commands import job, said_by, train_in_process

torch.set_num_threads(1)  # tiny networks: more threads would only wait for each other
STOCK = json.loads(RECORD.read_text())


def outcome(properties: DataSet, folder: Path) -> list[float] | str:
    """What our training makes of a data set: its losses, or what it says."""
    root = made(properties, folder)
    try:
        _, events = train_in_process(flags_for(properties, root, folder / "run"))
    except (InputError, RunError) as error:
        return str(error)
    return [event.values["train/loss"] for event in events if isinstance(event, Log)]


QUICK = [pytest.param(name, marks=[pytest.mark.slow] * TABLE[name].slow) for name in TABLE]


@pytest.mark.parametrize("name", QUICK)
def test_trains_as_lerobot_or_says_why_not(tmp_path, name):
    properties = TABLE[name]
    ours, theirs = outcome(properties, tmp_path), STOCK[properties.like or name]
    if properties.refused:
        assert isinstance(ours, str), "it was to be refused"
        assert re.search(properties.refused, ours, re.DOTALL) and len(ours.splitlines()) <= 3, ours
    else:
        assert len(theirs) == STEPS and ours == pytest.approx(theirs, rel=1e-4), ours


@pytest.mark.slow
def test_lerobot_does_what_is_recorded(tmp_path):
    """In a process of its own, as it was recorded."""
    command = [sys.executable, str(Path(__file__).with_name("stock.py")), f"--into={tmp_path / 'again.json'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=3600)
    again = json.loads((tmp_path / "again.json").read_text())
    assert TABLE.keys() == STOCK.keys()
    for name, now in again.items():
        if isinstance(now, str):
            assert isinstance(STOCK[name], str) and now.split(":")[0] == STOCK[name].split(":")[0], name
        else:
            then = [math.nan if loss is None else loss for loss in STOCK[name]]
            now = [math.nan if loss is None else loss for loss in now]
            assert now == pytest.approx(then, rel=1e-4, nan_ok=True), name


@pytest.mark.slow
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(properties=data_sets())
def test_agrees_with_lerobot_on_what_is_drawn(properties):
    """What fails here is shrunk, and becomes a line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        ours = outcome(properties, Path(folder) / "ours")
        root = write(properties, Path(folder) / "theirs")
        flags = flags_for(properties, root, Path(folder) / "run")
        theirs = train_as_stock([flag for flag in flags if not flag.startswith("--data.")])
    if isinstance(theirs, str) or None in theirs:
        assert isinstance(ours, str), theirs
    else:
        assert ours == pytest.approx(theirs, rel=1e-4)


# ---------------------------------------------------------------------- every job, as its users call it


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_every_job(tmp_path, capsys, name):
    """`doctor`, `cache build`, `train`, `--resume=true` and `evaluate`: three steps and then two more have the losses of
    five."""
    properties = TABLE[name]
    root, run = made(properties, tmp_path), tmp_path / "run"
    of_set = ["--dataset.repo_id=local/parts", f"--dataset.root={root}", "--dataset.video_backend=pyav"]
    flags = flags_for(properties, root, run)
    training = [*flags, "--save_checkpoint=true", "--save_freq=3", "--ray.num_workers=0"]
    policy = [
        flag for flag in flags if flag.startswith(("--policy.", *(f.split("=")[0] for f in properties.flags)))
    ]

    status, told = said_by(doctor, [*of_set, *policy, "--measure=false", "--json"], capsys)
    found = json.loads(told)
    faults = found["faults"]
    assert (status == 1) == bool(faults)
    assert re.search(properties.warned, "\n".join(found["warnings"])), found["warnings"]
    if not properties.refused:
        assert bool(faults) == bool(properties.fault) and re.search(properties.fault, "\n".join(faults)), (
            faults
        )
    else:
        assert faults
    tolerance = [flag for flag in properties.flags if flag.startswith("--tolerance_s")]
    status, told = said_by(cache, ["build", *of_set, *tolerance], capsys)
    if not properties.cameras and not properties.recording:
        assert status
    elif not properties.refused:
        assert status == 0 or "nothing to cache" in told, told

    status, told = said_by(train, [*training, "--steps=3"], capsys)
    if properties.refused:
        assert status and re.search(properties.refused, told, re.DOTALL), told
        return
    assert status == 0, told
    status, told = said_by(train, [*training, "--resume=true"], capsys)
    assert status == 0, told
    losses = [record["train/loss"] for record in read_metrics(run)]
    assert losses == pytest.approx(STOCK[properties.like or name], rel=1e-4)
    scored = [f"--checkpoint={run}", f"--output_dir={tmp_path / 'scores'}", "--data.eval_episodes=[0]"]
    status, told = said_by(evaluate, scored, capsys)
    assert (status == 0) != bool(properties.unscored) and re.search(properties.unscored, told), told


def test_who_reads_the_task_is_refused_a_set_without_its_text(tmp_path):
    root = made(TABLE["tasks as a column"], tmp_path)
    assert LeRobotDataset("local/parts", root=root)[0]["task"] == 0  # which its tokenizer step does not take
    meta = LeRobotDatasetMetadata("local/parts", root=root)
    with pytest.raises(InputError, match="takes 0 for the first one's text, and smolvla reads the task"):
        check_kinds("set", SmolVLAConfig(), meta, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows in another order", "NaN", "one camera of two sizes"])
def test_what_shows_in_a_worker_only_is_told_as_here(tmp_path, name):
    """In a line, and once: no worker is started again for it."""
    root = made(TABLE[name], tmp_path)
    result = job(
        "ray_jobs.train", *flags_for(TABLE[name], root, tmp_path / "run"), "--ray.num_workers=1", timeout=600
    )
    told = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert result.returncode == 1 and len(told) == 1 and re.search(TABLE[name].refused, told[0]), (
        result.stderr
    )
    assert "Traceback" not in result.stdout + result.stderr and "goes on" not in result.stdout
