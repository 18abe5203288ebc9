"""`ray_jobs.doctor` names what is wrong with a data set, and only that."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

from ray_jobs import doctor
from support.data_sets import make

LENGTHS = [30, 25, 40, 35]
TINY = [
    "--policy.chunk_size=8",
    "--policy.n_action_steps=8",
    "--policy.dim_model=32",
    "--policy.n_heads=2",
    "--policy.dim_feedforward=64",
    "--policy.device=cpu",
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """One camera, several files; the last dimension of the action never moves."""
    root = tmp_path_factory.mktemp("doctor") / "set"
    return make(root, LENGTHS, cameras=1, video_files_size_in_mb=0.05, data_files_size_in_mb=0.001)


def examined(root: Path, capsys, *more: str) -> tuple[int, dict]:
    command = [
        "--dataset.repo_id=local/made",
        f"--dataset.root={root}",
        *TINY,
        "--measure=false",
        "--json",
        *more,
    ]
    status = doctor.main(command)
    return status, json.loads(capsys.readouterr().out)


def edit(pattern: str, change: Callable[[pd.DataFrame], pd.DataFrame | None]) -> Callable[[Path], None]:
    """Change the table in which the third episode is."""

    def spoil(root: Path) -> None:
        for file in sorted(root.glob(pattern)):
            table = pd.read_parquet(file)
            if 2 in table["episode_index"].values:
                changed = change(table)
                table = table if changed is None else changed
                schema = pq.read_schema(file)
                pq.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False), file)

    return spoil


def put_nan(table: pd.DataFrame) -> None:
    row = table.index[table["episode_index"] == 2][7]
    table.at[row, "observation.state"] = np.array([0, np.nan, 0], np.float32)


def shift_times(table: pd.DataFrame) -> None:
    table.loc[table["episode_index"] == 2, "timestamp"] += 0.04


def drop_rows(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(table.index[table["episode_index"] == 2][-3:])


def stop_moving(table: pd.DataFrame) -> None:
    table["observation.state"] = [np.array([a, 1.5, c], np.float32) for a, _, c in table["observation.state"]]


def replace(file: str, pattern: str, by: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        text = (root / file).read_text()
        changed = re.sub(pattern, by, text, count=1)
        assert changed != text
        (root / file).write_text(changed)

    return spoil


def last_video(root: Path) -> Path:
    return sorted(root.glob("videos/*/*/*.mp4"))[-1]


def cut(root: Path) -> None:
    """As if the recording had ended early: the file is whole, frames are missing."""
    path = last_video(root)
    whole = path.rename(path.with_suffix(".whole"))
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in itertools.islice(source.demux(video=0), 10):
            packet.stream = stream
            target.mux(packet)


def drop_statistics(root: Path) -> None:
    stats = json.loads((root / "meta/stats.json").read_text())
    del stats["action"]
    (root / "meta/stats.json").write_text(json.dumps(stats))


def add_a_dimension(root: Path) -> None:
    stats = json.loads((root / "meta/stats.json").read_text())
    for values in stats["action"].values():
        values.append(1.0)
    (root / "meta/stats.json").write_text(json.dumps(stats))


def every_table_still(root: Path) -> None:
    for file in root.glob("data/*/*.parquet"):
        table = pd.read_parquet(file)
        stop_moving(table)
        pq.write_table(pa.Table.from_pandas(table, schema=pq.read_schema(file), preserve_index=False), file)


SPOILED = {
    "NaN": (edit("data/*/*.parquet", put_nan), r"state: 1 value.* NaN .*episode 2, frame 7, dimension 1"),
    "a missing mp4": (
        lambda root: last_video(root).unlink(),
        r"videos/.*mp4 \(episode \d is in it\) is missing",
    ),
    "an mp4 cut short": (
        cut,
        r"images.top: \d+ frames of episode.* 3 are not in the video within --tolerance_s=0.0001: it is cut short",
    ),
    "an mp4 without its end": (
        lambda root: last_video(root).write_bytes(last_video(root).read_bytes()[:-2000]),
        r"videos/.*mp4 \(episode \d is in it\) is damaged: Invalid data",
    ),
    "an mp4 that is only its beginning": (
        lambda root: last_video(root).write_bytes(last_video(root).read_bytes()[:100]),
        r"videos/.*mp4 \(episode \d is in it\) is damaged",
    ),
    "shifted timestamps": (
        edit("data/*/*.parquet", shift_times),
        r"40 frames of episode\(s\) 2 are up to 0.04 s away from their timestamps, --tolerance_s=0.0001",
    ),
    "missing statistics": (drop_statistics, r"stats.json has no \(whole\) statistics of action"),
    "no statistics at all": (lambda root: (root / "meta/stats.json").unlink(), r"meta/stats.json is missing"),
    "wrong fps": (
        replace("meta/info.json", r'"fps": 10\b', '"fps": 20'),
        r"info.json says 20 fps, the timestamps are 0.1 s apart: 10 fps",
    ),
    "statistics of another robot": (
        add_a_dimension,
        r"action: meta/stats.json is not of these data: it has 4 dimensions, they have 3",
    ),
    "too few rows": (edit("data/*/*.parquet", drop_rows), r"episode 2 has 37 rows .*, meta/episodes says 40"),
    "v2.1 by name alone": (
        replace("meta/info.json", "v3.0", "v2.1"),
        r"a LeRobot v2.1 data set that LeRobot cannot convert: meta/tasks.jsonl is missing",
    ),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_names_the_fault(healthy, tmp_path, capsys, spoil):
    root = Path(shutil.copytree(healthy, tmp_path / "set"))
    how, said = SPOILED[spoil]
    how(root)
    status, found = examined(root, capsys)
    assert status == 1
    assert any(re.search(said, fault) for fault in found["faults"]), found["faults"]


def test_healthy(healthy, capsys):
    """No faults; what it says is what was recorded."""
    status, found = examined(healthy, capsys)
    assert (status, found["faults"], found["advice"]) == (0, [], [])
    assert found["warnings"] == ["action: dimension(s) 2 never move."]
    facts = found["facts"]
    assert (facts["episodes"], facts["frames"], facts["fps"]) == (4, 130, 10)
    assert facts["episode_lengths"] == [25, 32, 40] and set(facts["tasks"]) == {"push", "pull"}
    camera = facts["cameras"]["observation.images.top"]
    assert (
        camera["codecs"] == ["h264"] and camera["shape"] == [32, 32, 3] and camera["key_frame_distance"] == 2
    )


def test_warns_of_what_a_training_survives(healthy, tmp_path, capsys):
    """Constant dimensions, episodes shorter than the chunk, statistics of other data, quantiles."""
    root = Path(shutil.copytree(healthy, tmp_path / "set"))
    every_table_still(root)
    stats = json.loads((root / "meta/stats.json").read_text())
    for name in ("q01", "q99"):
        del stats["action"][name]
    (root / "meta/stats.json").write_text(json.dumps(stats))
    status, found = examined(root, capsys, "--policy.chunk_size=32", "--policy.n_action_steps=32")
    assert (status, found["faults"]) == (0, [])
    said = "\n".join(found["warnings"])
    assert "observation.state: dimension(s) 1 never move." in said
    assert "episode(s) 0, 1 are shorter than the 32 actions that act predicts" in said
    assert "observation.state: meta/stats.json is not of these data (dimension 1)." in said
    assert "no quantiles (q01, q99) of action" in said


def test_real_recording(real, capsys):
    """As counted by hand: 20 episodes of one task, H.264 with a key frame every second frame, nothing broken."""
    status, found = examined(real, capsys)
    assert (status, found["faults"]) == (0, [])
    facts = found["facts"]
    assert (facts["episodes"], facts["frames"], facts["fps"]) == (20, 5735, 30)
    assert facts["tasks"] == ["Pick up the yellow bottle on the table."]
    assert facts["cameras"]["observation.images.cam_high"]["codecs"] == ["h264"]
    table = pd.concat(map(pd.read_parquet, real.glob("data/*/*.parquet")))
    actions = np.stack(table["action"])
    assert facts["numbers"]["action"]["max"] == pytest.approx(actions.max(0).tolist())
    assert facts["numbers"]["action"]["never_move"] == np.flatnonzero(actions.std(0) == 0).tolist()


def test_quantiles_that_a_training_computes_itself(healthy, tmp_path, capsys):
    """pi0.5 takes images as they are: those of states and actions are all that it needs."""
    root = Path(shutil.copytree(healthy, tmp_path / "set"))
    stats = json.loads((root / "meta/stats.json").read_text())
    for feature in stats.values():
        for name in ("q01", "q99"):
            feature.pop(name, None)
    (root / "meta/stats.json").write_text(json.dumps(stats))
    flags = ["--dataset.repo_id=local/made", f"--dataset.root={root}", "--policy.type=pi05"]
    status = doctor.main([*flags, "--policy.device=cpu", "--measure=false", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (status, found["faults"]) == (0, []) and "no quantiles" in "".join(found["warnings"])


def test_cameras_whose_channels_come_first(healthy, tmp_path, capsys):
    root = Path(shutil.copytree(healthy, tmp_path / "set"))
    info = json.loads((root / "meta/info.json").read_text())
    camera = info["features"]["observation.images.top"]
    camera |= {"shape": [3, 32, 32], "names": ["channels", "height", "width"]}
    (root / "meta/info.json").write_text(json.dumps(info))
    status, found = examined(root, capsys)
    assert (status, found["faults"]) == (0, [])
    assert found["facts"]["cameras"]["observation.images.top"]["shape"] == [32, 32, 3]


def test_measures_and_fits_on_a_screen(healthy, capsys):
    """The flags of a training that validates and reports: here it does neither."""
    command = ["--dataset.repo_id=local/made", f"--dataset.root={healthy}", *TINY, "--batch_size=4"]
    command += ["--dataset.eval_split=0.1", "--eval_steps=1", "--wandb.enable=true", "--wandb.project=p"]
    assert doctor.main(command) == 0
    printed = capsys.readouterr().out
    loader = re.search(r"loader +([\d.e+]+) samples/s from the cache, LeRobot's decoding ([\d.e+]+)", printed)
    step = re.search(r"step +([\d.e+]+) samples/s \(act, batch 4\); the (step|loader) is the limit", printed)
    assert float(loader[1]) > float(loader[2]) > 0 and float(step[1]) > 0
    assert re.search(r"cache +0.000399 GB, \d+ s to decode", printed)
    lines = [line for line in printed.splitlines() if not line.endswith(" ...")]  # what goes on
    assert len(lines) <= 24 and "nothing would stop a training." in printed


@pytest.mark.parametrize(
    ("policy", "size"),
    [
        (PI0Config(), "168,224"),
        (SmolVLAConfig(), "384,512"),
        (DiffusionConfig(resize_shape=(96, 128)), "96,128"),
        (ACTConfig(), "240,320"),  # takes images as they are: a suggestion
    ],
)
def test_names_the_size_that_a_policy_shrinks_images_to(policy, size):
    """It is not used unasked: stored frames are anti-aliased and of 8 bit, LeRobot's own resizing is neither."""
    advice = doctor._advice({"cameras": {"observation.images.top": {"shape": [480, 640, 3]}}}, None, policy)
    assert f"--data.resize='[{size}]'" in "".join(advice)
    small = {"cameras": {"observation.images.top": {"shape": [64, 64, 3]}}}
    assert doctor._advice(small, None, policy) == []
