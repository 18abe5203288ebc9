"""Recordings that people made go through every job: trained, resumed bit for bit, scored and searched, or refused rightly.

They are not part of the project (`make.RECORDINGS`): a test whose recording is not there is skipped.
"""

import math
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make import made
from properties import TABLE

from ray_jobs import cache, doctor, evaluate, train, tune
from ray_jobs.storage.records import read_json
from support.commands import said_by, tiny_act
from support.runs import assert_same_checkpoint
from support.searches import space_file, study_of

JITTER = "CR5 with its jitter"
TRAINED = [name for name, properties in TABLE.items() if properties.recording and name != JITTER]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trained_resumed_scored_searched(tmp_path, capsys, name):
    root = made(TABLE[name], tmp_path)

    def does(job, *flags: str) -> None:
        status, told = said_by(job, list(flags), capsys)
        assert status == 0, told

    def training(output_dir: str, *more: str) -> list[str]:
        return tiny_act(
            root, tmp_path / output_dir, "--batch_size=2", "--num_workers=0", "--ray.num_workers=0", *more
        )

    does(train, *training("at once", "--steps=5", "--save_freq=5"))
    does(train, *training("in two", "--steps=3", "--save_freq=3"))
    does(train, *training("in two", "--steps=5", "--save_freq=3", "--resume=true"))
    assert_same_checkpoint(*(tmp_path / run / "checkpoints/000005" for run in ("at once", "in two")))

    some = ("--data.eval_episodes=[0]", "--max_eval_samples=16")
    scores = tmp_path / "scores"
    does(evaluate, f"--checkpoint={tmp_path / 'in two'}", f"--output_dir={scores}", *some)
    (scored,) = read_json(scores / "evaluation.json")["results"].values()
    assert math.isfinite(scored["val/action_error"])

    does(
        tune,
        "--dataset.repo_id=local/parts",
        f"--dataset.root={root}",
        "--policy.device=cpu",
        "--policy.pretrained_backbone_weights=null",
        "--batch_size=2",
        "--num_workers=0",
        "--steps=2",
        "--eval_steps=2",
        *some,
        f"--space={space_file(tmp_path)}",
        f"--output_dir={tmp_path / 'search'}",
        "--tune.num_samples=2",
        "--tune.scheduler=none",
    )
    trials = study_of(tmp_path / "search").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    assert all(math.isfinite(trial.value) for trial in trials)


@pytest.mark.slow
def test_jitter_is_refused_with_what_helps(tmp_path, capsys):
    """The command of the refusal tells of two ways, and both are gone: a tolerance that holds for every frame, and timestamps
    on the grid."""
    root = made(TABLE[JITTER], tmp_path)

    def training(root, output_dir: str, *more: str) -> list[str]:
        few = (
            "--steps=2",
            "--batch_size=2",
            "--save_checkpoint=false",
            "--ray.num_workers=0",
            "--num_workers=0",
        )
        return tiny_act(root, tmp_path / output_dir, *few, *more)

    status, told = said_by(train, training(root, "refused"), capsys)
    assert status == 1, told
    command = shlex.split(told.splitlines()[-1])
    assert command[:3] == ["python", "-m", "ray_jobs.doctor"]
    status, told = said_by(doctor, command[3:], capsys)
    assert status == 1
    (tolerance,) = re.findall(r"With (--tolerance_s=\S+) it trains", told)
    of_set = ["--dataset.repo_id=local/parts", f"--dataset.root={root}", "--dataset.video_backend=pyav"]
    status, told = said_by(cache, ["build", *of_set, tolerance, f"--data.cache={tmp_path / 'cache'}"], capsys)
    assert status == 0 and "all frames are there" in told  # each has been looked for
    status, told = said_by(train, training(root, "tolerated", tolerance), capsys)
    assert status == 0, told

    copy = shutil.copytree(root, tmp_path / "copy")
    for path in copy.glob("data/*/*.parquet"):
        table = pd.read_parquet(path)
        table["timestamp"] = (table["frame_index"] / 10).astype(np.float32)
        pq.write_table(pa.Table.from_pandas(table, schema=pq.read_schema(path), preserve_index=False), path)
    status, told = said_by(
        doctor, ["--dataset.repo_id=local/parts", f"--dataset.root={copy}", "--measure=false"], capsys
    )
    assert status == 0 and "off the grid" not in told, told
    status, told = said_by(train, training(copy, "on the grid"), capsys)
    assert status == 0, told
