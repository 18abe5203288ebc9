"""Data sets as people have them: clones without Git LFS, older formats, other names, timestamps off the grid. What is said of
them is true, all of it is said at once, and what is advised helps."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets import CODEBASE_VERSION, LeRobotDataset
from torch.utils.data import default_collate

from ray_jobs import doctor
from ray_jobs.checks import dataset_files, preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError
from ray_jobs.config.options import DataOptions
from ray_jobs.data.frame_cache import open_frames
from ray_jobs.data.frames import FrameSource, NoFrame
from ray_jobs.data.reader import FrameReader
from ray_jobs.training import memory
from ray_jobs.training.checkpoint import pretrained_dir
from support.commands import REAL, job, tiny_act, tiny_diffusion, train_in_process
from support.data_sets import assert_same, make
from support.refusals import check, refusal

TOP, SIDE = "observation.images.top", "observation.images.side"
LENGTHS = [30, 25, 40]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three episodes, two cameras, several files."""
    root = tmp_path_factory.mktemp("found") / "pictures"
    return make(root, LENGTHS, cameras=2, video_files_size_in_mb=0.01, data_files_size_in_mb=0.001)


@pytest.fixture
def found(pictures, tmp_path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "set"))


@pytest.fixture
def diagnosis(capsys) -> Callable[..., dict]:
    """What the doctor says of a data set, as JSON."""

    def said(root: Path, *more: str) -> dict:
        command = ["--dataset.repo_id=local/found", f"--dataset.root={root}", "--policy.device=cpu", "--json"]
        status = doctor.main([*command, "--measure=false", *more])
        content = json.loads(capsys.readouterr().out)
        assert status == bool(content["faults"])
        return content

    return said


def put_pointer(path: Path) -> None:
    """What `git clone` leaves of a file where Git LFS is not installed."""
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4711\n")


def test_the_format_is_lerobots():
    assert dataset_files.FORMAT == CODEBASE_VERSION


# ---------------------------------------------------------------------- Git LFS


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("**/*.parquet", r"5 files are Git LFS pointers.*git lfs pull"),
        ("videos/**/*.mp4", r"\d files are Git LFS pointers.*git lfs pull"),
        ("meta/info.json", r"meta/info.json is a Git LFS pointer.*git lfs pull"),
        ("meta/stats.json", r"meta/stats.json is a Git LFS pointer.*git lfs pull"),
        ("data/chunk-000/file-001.parquet", r"file-001.parquet is a Git LFS pointer.*git lfs pull"),
    ],
)
def test_a_clone_without_git_lfs(found, tmp_path, diagnosis, pattern, said):
    """One line, by the training and by the doctor, whatever kind of file it is."""
    for path in found.glob(pattern):
        put_pointer(path)
    assert re.search(said, refusal(*tiny_act(found, tmp_path / "run")))
    faults = diagnosis(found)["faults"]
    assert len(faults) == 1 and re.search(said, faults[0]), faults


def test_a_policy_cloned_without_git_lfs(run, parts, tmp_path):
    """To start from, to resume from, to score."""
    torn = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    folder = torn / "checkpoints/000002/pretrained_model"
    put_pointer(folder / "model.safetensors")
    said = "model.safetensors is a Git LFS pointer"
    start = [flag for flag in tiny_act(parts, tmp_path / "other") if "policy.type" not in flag]
    assert said in refusal(*start, f"--policy.path={folder}")
    assert said in refusal(*tiny_act(parts, torn, "--resume=true", "--steps=4"))
    with pytest.raises(InputError, match=said):
        pretrained_dir(folder)


# ---------------------------------------------------------------------- missing files, other formats


def test_all_that_is_missing_is_said_at_once(found, diagnosis):
    """A line for each file, also those of the metadata; nothing of key frames that are not there."""
    for path in [*found.glob("videos/*/*/file-001.mp4"), found / "data/chunk-000/file-001.parquet"]:
        path.unlink()
    said = diagnosis(found)
    assert sorted(said["faults"][:3]) == [
        "data/chunk-000/file-001.parquet (episode 1 is in it) is missing.",
        f"videos/{SIDE}/chunk-000/file-001.mp4 (episode 1 is in it) is missing.",
        f"videos/{TOP}/chunk-000/file-001.mp4 (episode 1 is in it) is missing.",
    ]
    assert "cut short" not in "".join(said["faults"])
    (found / "meta/tasks.parquet").unlink()
    shutil.rmtree(found / "meta/episodes")
    assert [fault.rpartition(": ")[2] for fault in diagnosis(found)["faults"]] == [
        "meta/tasks.parquet is missing.",
        "meta/episodes is missing.",
    ]


def test_a_camera_without_any_video(found, diagnosis, capsys):
    shutil.rmtree(found / "videos")
    doctor.main(["--dataset.repo_id=local/found", f"--dataset.root={found}", "--policy.device=cpu"])
    printed = capsys.readouterr().out
    assert "no video can be read" in printed and "apart" not in printed and "cut short" not in printed


def test_only_the_episodes_that_are_asked_for(found, tmp_path, diagnosis):
    """A recording of which a part has been fetched trains on that part."""
    for path in found.glob("videos/*/*/file-001.mp4"):
        path.unlink()
    (found / "data/chunk-000/file-001.parquet").unlink()
    said = diagnosis(found, "--dataset.episodes=[0,2]")
    assert said["faults"] == [] and said["facts"]["episodes"] == 2 and said["facts"]["frames"] == 70
    train_in_process(tiny_act(found, tmp_path / "run", "--dataset.episodes=[0,2]", "--steps=1"))


def test_something_else_than_a_lerobot_data_set(found, tmp_path):
    (found / "meta/info.json").write_text('{"name": "clips", "license": "mit"}')
    message = refusal(*tiny_act(found, tmp_path / "run"))
    assert "not a LeRobot data set: meta/info.json has no codebase_version, it has name, license." in message


@pytest.mark.parametrize("name", ["g1 [v2]", "what?", "a::b"])
def test_names_that_are_taken_for_patterns(pictures, tmp_path, name):
    """Brackets lead nowhere, `?` and `*` to other data sets as well. The link that is advised helps."""
    root = Path(shutil.copytree(pictures, tmp_path / name))
    shutil.copytree(pictures, tmp_path / "whatX")  # which `what?` means, too
    flags = tiny_act(root, tmp_path / "run", "--steps=1")
    said, command = refusal(*flags).splitlines()
    assert "in the folder's name for a pattern" in said
    subprocess.run(command, shell=True, check=True)
    train_in_process(tiny_act(Path(shlex.split(command)[-1]), tmp_path / "run", "--steps=1"))


def test_a_name_that_only_looks_like_a_pattern(pictures, tmp_path):
    root = Path(shutil.copytree(pictures, tmp_path / "my#1={best}*"))
    train_in_process(tiny_act(root, tmp_path / "run", "--steps=1"))


def test_the_doctor_needs_no_lerobot_for_a_broken_data_set(found):
    (found / "meta/tasks.parquet").unlink()
    script = f"""
import sys
from ray_jobs import doctor
status = doctor.main(["--dataset.repo_id=a/b", {f"--dataset.root={found}"!r}])
print(status, "torch" in sys.modules, "lerobot" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert result.stdout.splitlines() == [
        f"FAULT       --dataset.root={found}: meta/tasks.parquet is missing.",
        "1 False False",
    ], result.stderr


# ---------------------------------------------------------------------- v2.1


def as_v21(root: Path, to: Path) -> Path:
    """The same recording as LeRobot v2.1 laid it out: a table and a video for each episode."""
    dataset = LeRobotDataset("local/found", root=root, video_backend="pyav", return_uint8=True)
    meta, table = dataset.meta, dataset.hf_dataset.with_format(None).to_pandas()
    info = json.loads((root / "meta/info.json").read_text())
    (to / "meta").mkdir(parents=True)
    lines: dict[str, list] = {"episodes": [], "episodes_stats": []}
    for episode, length in enumerate(meta.episodes["length"]):
        rows = table[table["episode_index"] == episode]
        place = to / f"data/chunk-000/episode_{episode:06d}.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(place, index=False)
        for camera in meta.video_keys:
            video = to / f"videos/chunk-000/{camera}/episode_{episode:06d}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            with av.open(str(video), "w") as container:
                stream = container.add_stream("mpeg4", rate=meta.fps)  # as older recordings have it
                stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
                for row in rows.index:
                    picture = dataset[row][camera].permute(1, 2, 0).numpy()
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                container.mux(stream.encode())
        stats = {
            key: {name: np.asarray(v).tolist() for name, v in of.items()} for key, of in meta.stats.items()
        }
        for of in stats.values():
            of["count"] = [length]
        lines["episodes"].append(
            {"episode_index": episode, "tasks": list(meta.episodes["tasks"][episode]), "length": length}
        )
        lines["episodes_stats"].append({"episode_index": episode, "stats": stats})
    lines["tasks"] = [{"task_index": int(n), "task": task} for task, n in meta.tasks["task_index"].items()]
    for name, rows in lines.items():
        (to / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info |= {
        "codebase_version": "v2.1",
        "total_chunks": 1,
        "total_videos": len(LENGTHS) * len(meta.video_keys),
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (to / "meta/info.json").write_text(json.dumps(info))
    return to


@pytest.fixture(scope="module")
def v21(pictures, tmp_path_factory) -> Path:
    return as_v21(pictures, tmp_path_factory.mktemp("older") / "set")


def test_the_command_that_converts_an_older_data_set(v21, tmp_path, diagnosis):
    """As it is printed, in a shell; what comes out trains."""
    root = Path(shutil.copytree(v21, tmp_path / "my set"))
    message = refusal(*tiny_act(root, tmp_path / "run"))
    assert "keeps the old one as my set_old" in message
    (fault,) = diagnosis(root)["faults"]
    assert "keeps the old one as my set_old" in fault
    command = shlex.split(fault.splitlines()[1])
    assert command[0] == "python" and "--push-to-hub=false" in command
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, timeout=300)
    assert diagnosis(root)["faults"] == [] and (tmp_path / "my set_old/meta/tasks.jsonl").is_file()
    train_in_process(tiny_act(root, tmp_path / "run", "--steps=1"))


def without_index(root: Path) -> None:
    for path in root.glob("data/*/*.parquet"):
        pd.read_parquet(path).drop(columns="index").to_parquet(path, index=False)


def shorten(root: Path) -> None:
    path = root / "data/chunk-000/episode_000001.parquet"
    pd.read_parquet(path)[:-2].to_parquet(path, index=False)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "meta/episodes_stats.jsonl").unlink(), "meta/episodes_stats.jsonl is missing"),
        (without_index, "episode_000000.parquet has no column index"),
        (shorten, "episode_000001.parquet has 23 rows, meta/episodes.jsonl says 25"),
        (lambda root: next(root.glob("videos/*/*/*.mp4")).unlink(), "has 2 videos, meta/episodes.jsonl 3"),
        (lambda root: root.with_name("set_old").mkdir(), "set_old is there"),
        (lambda root: [*map(put_pointer, root.glob("data/*/*"))], "3 files are Git LFS pointers"),
    ],
)
def test_older_data_sets_that_cannot_be_converted(v21, tmp_path, spoil, said):
    """No command is given that would end in a traceback, or remove a folder."""
    root = Path(shutil.copytree(v21, tmp_path / "set"))
    spoil(root)
    message = refusal(*tiny_act(root, tmp_path / "run"))
    assert said in message and "convert_dataset" not in message


# ---------------------------------------------------------------------- other names


def rename(root: Path, names: dict[str, str]) -> None:
    """Rename features everywhere, as the program tells how."""
    for file in ("info.json", "stats.json"):
        content = json.loads((root / "meta" / file).read_text())
        features = content["features"] if file == "info.json" else content
        changed = {names.get(key, key): value for key, value in features.items()}
        features.clear()
        features |= changed
        (root / "meta" / file).write_text(json.dumps(content))
    for path in [*root.glob("data/*/*.parquet"), *root.glob("meta/episodes/*/*.parquet")]:
        table = pq.read_table(path).replace_schema_metadata(None)
        parts = [[names.get(part, part) for part in column.split("/")] for column in table.column_names]
        pq.write_table(table.rename_columns(["/".join(column) for column in parts]), path)
    for old, new in names.items():
        if (root / "videos" / old).exists():
            (root / "videos" / old).rename(root / "videos" / new)


def test_missing_files_do_not_hide_other_names(found, diagnosis):
    rename(found, {"action": "actions", "observation.state": "state", TOP: "front"})
    next(found.glob("videos/front/*/*.mp4")).unlink()
    said = diagnosis(found)["faults"]
    assert any("is missing" in fault for fault in said) and any("no 'action'" in fault for fault in said)


def test_renaming_as_advised_trains(found, tmp_path):
    rename(found, {"action": "actions", "observation.state": "state", TOP: "front"})
    message = refusal(*tiny_act(found, tmp_path / "run"))
    assert "no policy reads" in message and "state" in message.splitlines()[0]
    advised = dict(re.findall(r"([\w.]+) to ([\w.]+)", message.splitlines()[1]))
    assert advised == {"front": "observation.images.front", "actions": "action", "state": "observation.state"}
    rename(found, advised)
    train_in_process(tiny_act(found, tmp_path / "run", "--steps=1"))


def test_a_camera_under_another_name(found, tmp_path):
    """LeRobot stops at the first step with a KeyError."""
    rename(found, {TOP: "image"})
    assert "Rename image to observation.images.image" in refusal(*tiny_act(found, tmp_path / "run"))


def test_without_cameras_nobody_assumes_a_policy(tmp_path, diagnosis, capsys):
    """State and action alone: the diagnosis, and what that rules out."""
    root = make(tmp_path / "numbers", LENGTHS)
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["observation.environment_state"]
    (root / "meta/info.json").write_text(json.dumps(info))
    for path in root.glob("data/*/*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("observation.environment_state"), path)
    said = diagnosis(root)
    warned = "\n".join(said["warnings"])
    assert said["faults"] == [] and said["facts"]["frames"] == 95
    assert "act, diffusion cannot be trained on it" in warned and "pi0, pi05, smolvla" in warned
    assert "image or the environment state" in "".join(diagnosis(root, "--policy.type=act")["faults"])
    command = ["--dataset.repo_id=local/found", f"--dataset.root={root}", "--policy.device=cpu"]
    assert doctor.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.index("95 frames") < printed.index("not measured: act cannot train")


# ---------------------------------------------------------------------- timestamps


@pytest.fixture
def jittered(found) -> Path:
    """Timestamps up to 20 ms off the grid, but for one that is 45 ms off."""
    rng, number = np.random.default_rng(0), 0
    for path in sorted(found.glob("data/*/*.parquet")):
        table = pd.read_parquet(path)
        table["timestamp"] += rng.uniform(0, 0.02, len(table)).astype(np.float32)
        if number == 0:
            table.loc[table.index[17], "timestamp"] = np.float32(1.745)
        number += 1
        pq.write_table(pa.Table.from_pandas(table, schema=pq.read_schema(path), preserve_index=False), path)
    return found


def test_timestamps_off_the_grid(jittered, tmp_path, diagnosis):
    """The tolerance that is told holds for every frame, here and in LeRobot; the other way puts them on the grid."""
    said = diagnosis(jittered)
    fault = next(fault for fault in said["faults"] if fault.startswith(TOP))
    told = re.search(
        r"up to ([\d.]+) s away .*--tolerance_s=0.0001 .* With --tolerance_s=([\d.]+) it trains", fault
    )
    assert float(told[1]) == pytest.approx(0.045, abs=1e-4) and told[2] == "0.046"
    stock = LeRobotDataset(
        "local/found", root=jittered, video_backend="pyav", tolerance_s=float(told[2]), return_uint8=True
    )
    frames = open_frames(stock, DataOptions(cache=str(tmp_path / "cache")), reads=0)
    assert_same(
        FrameReader(stock, 0, frames)([*range(95)]), default_collate([stock[row] for row in range(95)])
    )
    assert diagnosis(jittered, f"--tolerance_s={told[2]}")["faults"] == []
    with pytest.raises(Exception, match="tolerance"):
        LeRobotDataset("local/found", root=jittered, video_backend="pyav", tolerance_s=0.0449)[17]

    assert "timestamp = frame_index / 10 in data/*/*.parquet" in "".join(said["advice"])
    for path in jittered.glob("data/*/*.parquet"):
        table = pd.read_parquet(path)
        table["timestamp"] = (table["frame_index"] / 10).astype(np.float32)
        pq.write_table(pa.Table.from_pandas(table, schema=pq.read_schema(path), preserve_index=False), path)
    said = diagnosis(jittered)
    assert said["faults"] == [] and "grid" not in "".join(said["warnings"])


def test_one_frame_too_far_away(jittered, tmp_path):
    """LeRobot trains until it comes to it. So it is here: without the cache, with a line that says why."""
    dataset = LeRobotDataset(
        "local/found", root=jittered, video_backend="pyav", tolerance_s=0.03, return_uint8=True
    )
    said: list[str] = []
    frames = open_frames(dataset, DataOptions(cache=str(tmp_path / "cache")), reads=0, say=said.append)
    assert type(frames) is FrameSource and "0.045" in said[-1]
    reader, others = FrameReader(dataset, 0, frames), [row for row in range(95) if row != 17]
    assert_same(reader(others), default_collate([dataset[row] for row in others]))
    with pytest.raises(NoFrame) as failed:
        reader([17])
    command = shlex.split(str(failed.value).splitlines()[-1])
    assert command[:3] == ["python", "-m", "ray_jobs.doctor"]
    assert doctor.main([*command[3:], "--policy.device=cpu"]) == 1


def test_a_recording_with_jitter(diagnosis, tmp_path):
    root = REAL.parent / "cr5_jitter"
    if not root.is_dir():
        pytest.skip(f"the recording is not there ({root})")
    (fault,) = diagnosis(root)["faults"]
    assert "up to 0.3297 s away" in fault and "--tolerance_s=0.33 it trains" in fault


# ---------------------------------------------------------------------- held out, memory


def test_held_out_episodes_are_counted(pictures, tmp_path):
    """Five tasks with two episodes each: a tenth of each is half of all."""
    root = make(tmp_path / "tasks", [9] * 10)
    tasks = [f"task {episode // 2}" for episode in range(10)]
    (path,) = root.glob("meta/episodes/*/*.parquet")
    table = pq.read_table(path)
    column = pa.array([[task] for task in tasks], table.schema.field("tasks").type)
    pq.write_table(table.set_column(table.column_names.index("tasks"), "tasks", column), path)
    recipe = resolve(tiny_act(root, tmp_path / "run", "--dataset.eval_split=0.1"))
    recipe = preflight.check(recipe)
    assert recipe.context.held_out == (1, 3, 5, 7, 9)
    (warned,) = [line for line in recipe.notices if "eval_split" in line]
    assert "holds out 5 of 10 episodes" in warned and "5 task(s)" in warned
    quiet = resolve(tiny_act(root, tmp_path / "run", "--dataset.eval_split=0.5"))
    quiet = preflight.check(quiet)
    assert not [line for line in quiet.notices if "eval_split" in line]


@pytest.mark.parametrize("held_out", ["--data.eval_episodes=[2,3]", "--dataset.eval_split=0.5"])
def test_training_episodes_that_are_too_short(tmp_path, held_out):
    """Of either task's episodes the longer one is held out, however that is said: LeRobot stops with a traceback."""
    root = make(tmp_path / "short", [5, 5, 30, 30])
    flags = tiny_diffusion(root, tmp_path / "run", "--policy.drop_n_last_frames=7")
    check(*flags)
    assert "no training episode is longer" in refusal(*flags, held_out)


def test_a_batch_that_no_memory_holds(pictures, tmp_path, monkeypatch):
    """Refused with the flags that make it less; where it may just do, a warning."""
    flags = tiny_act(pictures, tmp_path / "run", "--ray.num_workers=0", "--steps=1")
    message = refusal(*flags, "--batch_size=10000000")
    assert "main memory" in message
    less = re.search(r"--batch_size=(\d+) --ray.grad_accumulation=(\d+)", message)
    assert 0.99 * 10**7 < int(less[1]) * int(less[2]) <= 10**7  # as many samples, all but a few
    check(*flags, *less[0].split())
    recipe = resolve(flags)
    recipe = preflight.check(recipe)
    from ray_jobs.training import setup

    monkeypatch.setattr(setup, "main_memory", lambda: int(recipe.context.memory.total / 1.5))
    monkeypatch.setattr(memory, "main_memory", lambda: int(recipe.context.memory.total / 1.5))
    _, events = train_in_process(flags)
    assert any("GB of main memory" in getattr(event, "text", "") for event in events)


# ---------------------------------------------------------------------- what the doctor says when


def test_the_diagnosis_comes_before_the_measurement(pictures, tmp_path):
    """Seen from another process, through a pipe; hours and money at the end."""
    flags = [
        "--dataset.repo_id=local/found",
        f"--dataset.root={pictures}",
        "--cost_per_hour=3.6",
        "--steps=5000",
    ]
    flags += [flag for flag in tiny_act(pictures, tmp_path) if "policy" in flag or "batch" in flag]
    result = job("ray_jobs.doctor", *flags, PYTHONUNBUFFERED="")
    assert result.returncode == 0, result.stderr
    order = [result.stdout.index(word) for word in ("95 frames", "measuring: ", "samples/s", "\ntraining ")]
    assert order == sorted(order)
    told = re.search(
        r"training +5000 steps of ([\d.e-]+) s: (.+) with one worker, which costs ([\d.e-]+)", result.stdout
    )
    assert float(told[3]) >= 0.99 * 5000 * float(told[1]) / 1000
    with pytest.raises(InputError, match="--cost_per_hour=cheap: must be a number"):
        doctor.main([*flags, "--cost_per_hour=cheap"])
