"""The frame cache builds once, survives kills, finds damage and change, and gives way where it cannot work."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from ray.cluster_utils import Cluster
from torch.utils.data import default_collate

from ray_jobs import cache as cache_job
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.config.events import Log, Notice
from ray_jobs.config.options import DataOptions
from ray_jobs.data import columns, frame_store
from ray_jobs.data.frame_cache import FrameCache, open_frames
from ray_jobs.data.frames import FrameSource
from ray_jobs.data.reader import FrameReader
from support.commands import job, tiny_act, train_in_process
from support.data_sets import assert_same, make, opened
from support.machine import small_disk

torch.set_num_threads(1)
FORK = multiprocessing.get_context("fork")  # children that have LeRobot already
TOP = "observation.images.top"
LENGTHS = [9, 5, 12, 7]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two cameras, four episodes, in a file per camera."""
    return make(tmp_path_factory.mktemp("frame_cache") / "pictures", LENGTHS, cameras=2)


@pytest.fixture(autouse=True)
def new_process() -> Iterator[None]:
    """Nothing is open or known to be good yet."""
    frame_store._opened.clear()
    columns._checked.clear()
    yield


class Counting(FrameSource):
    """Counts the episodes it decodes, and takes its time."""

    def __init__(self, dataset: LeRobotDataset, pause_s: float = 0):
        super().__init__(dataset)
        self.decoded, self.pause_s = [], pause_s

    def episode(self, key, episode, rows, timestamps):
        self.decoded.append((key, episode))
        for frame in super().episode(key, episode, rows, timestamps):
            time.sleep(self.pause_s)
            yield frame


def fill(dataset: LeRobotDataset, folder: Path, pause_s: float = 0) -> tuple[FrameCache, list]:
    source = Counting(dataset, pause_s)
    cache = FrameCache(source, folder)
    cache.fill()
    return cache, source.decoded


def assert_right(dataset: LeRobotDataset, cache: FrameCache) -> None:
    """Every frame is LeRobot's."""
    indices = list(range(len(dataset)))
    assert_same(FrameReader(dataset, 0, cache)(indices), default_collate([dataset[i] for i in indices]))


# ---------------------------------------------------------------------- built once


def test_four_that_open_it_at_once_build_it_once(pictures, tmp_path):
    dataset, answers = opened(pictures, "none"), FORK.Queue()

    def open_it() -> None:
        answers.put(len(fill(dataset, tmp_path, pause_s=0.02)[1]))

    processes = [FORK.Process(target=open_it) for _ in range(4)]
    for process in processes:
        process.start()
    assert sum(answers.get(timeout=60) for _ in processes) == 2 * len(LENGTHS)
    for process in processes:
        process.join()
    cache, decoded = fill(dataset, tmp_path)
    assert not decoded
    assert_right(dataset, cache)


def test_a_killed_build_is_resumed(pictures, tmp_path):
    """SIGKILL half-way, while another process waits for the build: that one goes on where it was."""
    dataset, answers = opened(pictures, "none"), FORK.Queue()
    builder = FORK.Process(target=fill, args=(dataset, tmp_path, 0.1))
    builder.start()
    before = FrameCache(FrameSource(dataset), tmp_path)
    give_up = time.monotonic() + 60
    while len(before.missing().get(TOP, [])) in (0, len(LENGTHS)) and time.monotonic() < give_up:
        time.sleep(0.01)
        before = FrameCache(FrameSource(dataset), tmp_path)
    waiting = FORK.Process(target=lambda: answers.put(fill(dataset, tmp_path)[1]))
    waiting.start()
    time.sleep(0.3)
    os.kill(builder.pid, signal.SIGKILL)
    decoded = answers.get(timeout=60)
    waiting.join()
    assert 0 < len(decoded) < 2 * len(LENGTHS)
    cache, again = fill(dataset, tmp_path)
    assert not again
    assert_right(dataset, cache)


def test_only_the_episodes_that_are_asked_for(pictures, tmp_path):
    """And the others when they are."""
    some, everything = opened(pictures, "none", [2, 1]), opened(pictures, "none")
    cache, decoded = fill(some, tmp_path)
    assert {episode for _, episode in decoded} == {1, 2}
    assert_right(some, cache)
    cache, decoded = fill(everything, tmp_path)
    assert {episode for _, episode in decoded} == {0, 3}
    assert_right(everything, cache)


def test_a_warm_process_opens_it_in_milliseconds(pictures, tmp_path):
    dataset = opened(pictures, "none")
    fill(dataset, tmp_path)
    begin = time.perf_counter()
    fill(dataset, tmp_path)
    assert time.perf_counter() - begin < 0.1


# ---------------------------------------------------------------------- damage and change


def entry_of(cache: FrameCache) -> Path:
    return cache.entries[TOP].folder


def flip_a_byte(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit in a frame": lambda folder: flip_a_byte(folder / "frames", 15 * 3 * 32 * 32 + 100),
    "a flipped bit in a checksum": lambda folder: flip_a_byte(folder / "checksums", 15 * 8 + 1),
    "frames cut short": lambda folder: os.truncate(folder / "frames", 10_000),
    "frames empty": lambda folder: (folder / "frames").write_bytes(b""),
    "checksums cut short": lambda folder: os.truncate(folder / "checksums", 30),
    "no description": lambda folder: (folder / "entry.json").unlink(),
    "a torn description": lambda folder: (folder / "entry.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_decoded_again_and_never_used(pictures, tmp_path, damage):
    dataset = opened(pictures, "none")
    DAMAGE[damage](entry_of(fill(dataset, tmp_path)[0]))
    frame_store._opened.clear()
    source = Counting(dataset)
    cache = FrameCache(source, tmp_path)
    cache.fill()
    assert_right(dataset, cache)
    assert source.decoded, "nobody noticed"
    if "flipped" in damage:
        assert source.decoded == [(TOP, 2)]  # the episode of frame 15 alone


def test_damaged_columns_are_written_again(pictures, tmp_path):
    dataset = opened(pictures, "act")
    fill(dataset, tmp_path)
    (file,) = tmp_path.glob("*.columns.*/action.npy")
    flip_a_byte(file, file.stat().st_size - 3)
    columns._checked.clear()
    assert_right(dataset, fill(dataset, tmp_path)[0])


def test_a_changed_data_set_is_noticed(pictures, tmp_path):
    """Other pictures in a file of the same name; then the same ones at another place, with another time."""
    root = Path(shutil.copytree(pictures, tmp_path / "set"))
    fill(opened(root, "none"), tmp_path / "cache")
    other = make(tmp_path / "other", LENGTHS, cameras=2, seed=1)
    for file in other.glob("videos/*/*/*.mp4"):
        shutil.copy(file, root / file.relative_to(other))
    dataset = opened(root, "none")
    cache, decoded = fill(dataset, tmp_path / "cache")
    assert len(decoded) == 2 * len(LENGTHS)
    assert_right(dataset, cache)
    moved = Path(shutil.copytree(root, tmp_path / "moved", copy_function=shutil.copyfile))
    assert not fill(opened(moved, "none"), tmp_path / "cache")[1]


@pytest.fixture
def off_the_grid(pictures, tmp_path) -> Path:
    """A recording with a timestamp that fits no frame of the video."""
    root = Path(shutil.copytree(pictures, tmp_path / "set"))
    (file,) = root.glob("data/*/*.parquet")
    table = pd.read_parquet(file)
    table.loc[17, "timestamp"] += 0.03
    pq.write_table(pa.Table.from_pandas(table, schema=pq.read_schema(file)), file)
    return root


def test_frames_off_the_grid_are_refused(off_the_grid, tmp_path):
    """No wrong frame is kept in its place."""
    with pytest.raises(RunError, match=r"episode 2 from .*mp4: no frame at .* 0.0300 s away .*tolerance_s"):
        fill(opened(off_the_grid, "none"), tmp_path / "cache")


def test_an_episode_with_too_few_rows(pictures, tmp_path):
    """It would be missing for ever."""
    root = Path(shutil.copytree(pictures, tmp_path / "set"))
    file = sorted(root.glob("data/*/*.parquet"))[-1]
    table = pq.read_table(file)
    pq.write_table(table.slice(0, len(table) - 2), file)
    last = len(LENGTHS) - 1
    told = f"episode {last} has {LENGTHS[-1] - 2} rows in the tables, meta/episodes says {LENGTHS[-1]}"
    with pytest.raises(RunError, match=told):
        fill(opened(root, "none"), tmp_path / "cache")


def test_frames_found_under_another_tolerance_are_others(off_the_grid, tmp_path):
    dataset = LeRobotDataset("local/made", root=off_the_grid, video_backend="pyav", tolerance_s=0.1)
    fill(dataset, tmp_path / "cache")
    with pytest.raises(RunError, match="tolerance_s"):
        fill(opened(off_the_grid, "none"), tmp_path / "cache")


# ---------------------------------------------------------------------- where it cannot work


def said_by(dataset: LeRobotDataset, cache: str, reads: int = 10**9) -> list[str]:
    """What the user hears of a cache that is not to be; frames can be read all the same."""
    lines: list[str] = []
    frames = open_frames(dataset, DataOptions(cache=cache), reads=reads, say=lines.append)
    assert type(frames) is FrameSource
    assert_same(FrameReader(dataset, 0, frames)([3]), default_collate([dataset[3]]))
    return lines


def test_a_folder_that_cannot_be_written(pictures, tmp_path):
    (tmp_path / "file").touch()
    line = said_by(opened(pictures, "none"), str(tmp_path / "file" / "cache"))[-1]
    assert "file/cache cannot be used (Not a directory); frames are decoded one by one" in line


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A disk of 64 KB: less than the frames of one camera."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        yield disk


def test_a_full_disk(pictures, tiny_disk):
    dataset = opened(pictures, "none")
    lines = said_by(dataset, str(tiny_disk / "cache"))
    assert "cannot be used (No space left on device); frames are decoded one by one" in lines[-1]


def test_a_read_only_disk(pictures, tiny_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    lines = said_by(opened(pictures, "none"), str(tiny_disk / "cache"))
    assert "cannot be used (Read-only file system); frames are decoded one by one" in lines[-1]


def test_auto_looks_at_the_disk_and_at_the_run(pictures, tiny_disk, monkeypatch):
    monkeypatch.setenv("RAY_JOBS_CACHE", str(tiny_disk))
    dataset = opened(pictures, "none")
    assert "the frames need 0.000203 GB and 6.14e-05 GB are free" in said_by(dataset, "auto")[0]
    assert "the run reads 4 frames and 66 would have to be decoded" in said_by(dataset, "auto", reads=2)[0]


def test_training_tells_and_goes_on(pictures, tmp_path):
    """The same losses without the cache, and the reason on the way."""
    (tmp_path / "file").touch()
    losses = []
    for name, cache in (("with", tmp_path / "cache"), ("without", tmp_path / "file" / "x")):
        flags = tiny_act(pictures, tmp_path / name, "--steps=2", "--save_checkpoint=false")
        _, events = train_in_process([*flags, f"--data.cache={cache}"])
        notices = " ".join(event.text for event in events if isinstance(event, Notice))
        assert "decoding" in notices and ("cannot be used" in notices) == (name == "without")
        losses.append([event.values["train/loss"] for event in events if isinstance(event, Log)])
    assert losses[0] == losses[1]


def test_it_is_said_which_frames_are_meant(pictures, tmp_path, monkeypatch):
    """Those of the training are too many for two steps; those of the held-out episode are not."""
    monkeypatch.setenv("RAY_JOBS_CACHE", str(tmp_path / "cache"))
    flags = tiny_act(pictures, tmp_path / "run", "--steps=2", "--eval_steps=1", "--save_checkpoint=false")
    _, events = train_in_process([*flags, "--batch_size=1", "--data.eval_episodes=[1]"])
    told = [e.text.partition(": ")[::2] for e in events if getattr(e, "text", "").startswith("frame cache")]
    assert [name for name, _ in told] == ["frame cache", "frame cache of the held-out episodes"]
    assert told[0][1].startswith("none, the run reads 4 frames") and " camera(s) in " in told[1][1]


# ---------------------------------------------------------------------- large


def test_a_million_frames_open_in_two_seconds_and_take_no_memory(tmp_path, monkeypatch):
    """12 GB of (black) frames, 3000 episodes: opened, and 50,000 of them read, within 200 MB."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    root = make(tmp_path / "large", [3], cameras=1, seed=5)
    episodes, length = 3000, 334
    total = episodes * length
    multiply(root, episodes, length)
    dataset = opened(root, "act")
    cache = FrameCache(FrameSource(dataset), tmp_path / "cache")
    entry = cache.entries[TOP]
    entry.begin()
    black = frame_store._checksum(memoryview(bytes(entry.frame_bytes)))
    entry.set_checksums(slice(0, total), np.full(total, black, np.uint64))
    cache.fill()
    cache = entry = None
    frame_store._opened.clear()
    columns._checked.clear()

    before, begin = psutil.Process().memory_info().rss, time.perf_counter()
    frames = open_frames(dataset, DataOptions(cache=str(tmp_path / "cache")), reads=0)
    reader = FrameReader(dataset, 0, frames)
    assert time.perf_counter() - begin < 2
    for rows in torch.randint(total, (500, 100)).tolist():
        batch = reader(rows)
    assert batch[TOP].shape == (100, 3, 32, 32) and not batch[TOP].any()
    assert batch["index"].tolist() == rows
    assert psutil.Process().memory_info().rss - before < 200e6


def multiply(root: Path, episodes: int, length: int) -> None:
    """Let a data set have many episodes, by its tables."""
    total = episodes * length
    (file,) = root.glob("data/*/*.parquet")
    one = pq.read_table(file)
    table = one.take(np.arange(total) % len(one))
    frame_index = np.tile(np.arange(length), episodes)
    for name, values in {
        "index": np.arange(total),
        "frame_index": frame_index,
        "episode_index": np.repeat(np.arange(episodes), length),
        "timestamp": (frame_index / 10).astype(np.float32),
    }.items():
        table = table.set_column(table.column_names.index(name), one.field(name), pa.array(values))
    pq.write_table(table, file)
    (file,) = root.glob("meta/episodes/*/*.parquet")
    table = pd.concat([pd.read_parquet(file)] * episodes, ignore_index=True)
    table["episode_index"] = np.arange(episodes)
    table["length"] = length
    table["dataset_from_index"] = np.arange(episodes) * length
    table["dataset_to_index"] = (np.arange(episodes) + 1) * length
    table.to_parquet(file)
    info = root / "meta" / "info.json"
    text = info.read_text().replace('"total_episodes": 1', f'"total_episodes": {episodes}')
    info.write_text(text.replace('"total_frames": 3', f'"total_frames": {total}'))


# ---------------------------------------------------------------------- the job


def test_job_builds_lists_verifies_removes(pictures, tmp_path, capsys):
    folder = tmp_path / "cache"
    where = f"--data.cache={folder}"
    root = Path(shutil.copytree(pictures, tmp_path / "set"))
    build = ["ray_jobs.cache", "build", "--dataset.repo_id=local/made", f"--dataset.root={root}", where]
    result = job(*build, "--data.resize=[16,16]")
    assert (result.returncode, result.stderr) == (0, "") and "all frames are there" in result.stdout
    assert not FrameCache(FrameSource(opened(root, "none"), [16, 16]), folder).missing(), "none were decoded"

    assert cache_job.main(["verify", where]) == 0
    (entry,) = folder.glob(f"*{TOP}*")
    flip_a_byte(entry / "frames", 1000)
    assert cache_job.main(["verify", "top", where]) == 1
    assert "1 damaged frames" in capsys.readouterr().out
    info = root / "meta" / "info.json"
    info.write_text(info.read_text() + " ")
    assert cache_job.main(["list", where]) == 0
    listed = capsys.readouterr().out
    assert entry.name in listed and "32/33 frames" in listed and listed.count("stale") == 2
    os.truncate(entry / "frames", 100)
    assert cache_job.main(["verify", "top", where]) == 1
    assert "cut short" in capsys.readouterr().out

    with pytest.raises(InputError, match="name what to remove"):
        cache_job.main(["remove", where])
    with pytest.raises(InputError, match="no such entry.*observation.images.side"):
        cache_job.main(["remove", "bottom", where])
    assert cache_job.main(["remove", "--stale", where]) == 0
    assert [path.name for path in folder.iterdir()] == ["files.json"]


@pytest.mark.slow
def test_job_builds_on_every_node(pictures, tmp_path):
    """Two machines (raylets), which here have one disk: one of them decodes, the other waits for it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        where = [f"--ray.address={cluster.address}", f"--data.cache={tmp_path / 'cache'}"]
        result = job(
            "ray_jobs.cache", "build", "--dataset.repo_id=local/made", f"--dataset.root={pictures}", *where
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.count("all frames are there") == 2
        assert not FrameCache(FrameSource(opened(pictures, "none")), tmp_path / "cache").missing()
        (tmp_path / "file").touch()
        refused = job("ray_jobs.cache", "build", "--dataset.repo_id=local/made", f"--dataset.root={pictures}",
                      where[0], f"--data.cache={tmp_path / 'file'}")  # fmt: skip
        assert refused.returncode == 1 and refused.stderr.count("cannot be used") == 2
    finally:
        cluster.shutdown()
