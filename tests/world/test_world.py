"""Data sets of the world: what LeRobot trains, we train with the same losses; what it does not, we refuse in a line.

The table is in `properties.py`, what LeRobot makes of each set in `stock.json`, from `python tests/world/stock.py`.
"""

import json
import re

import pytest
import torch
from conftest import train_in_process
from make import write
from properties import TABLE, DataSet
from stock import RECORD, STEPS, flags_for

from ray_jobs.engine.errors import InputError, RunError

torch.set_num_threads(1)  # tiny networks: more threads would only wait for each other
STOCK = json.loads(RECORD.read_text())


def outcome(properties: DataSet, folder) -> list[float] | str:
    """What our training makes of a data set: its losses, or what it says."""
    root = write(properties, folder)
    try:
        _, events = train_in_process(flags_for(properties, root, folder / "run"))
    except (InputError, RunError) as error:
        return str(error)
    return [event["train/loss"] for event in events if event["kind"] == "log"]


@pytest.mark.parametrize("name", TABLE)
def test_trains_as_lerobot_or_says_why_not(tmp_path, name):
    properties = TABLE[name]
    ours, theirs = outcome(properties, tmp_path), STOCK[properties.like or name]
    if properties.refused:
        assert isinstance(ours, str), "it was to be refused"
        assert re.search(properties.refused, ours, re.DOTALL) and len(ours.splitlines()) <= 3, ours
    else:
        assert len(theirs) == STEPS and ours == pytest.approx(theirs, rel=1e-4), ours
