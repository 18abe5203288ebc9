"""`--data.source=stream`: Ray Data's reader gives LeRobot's samples, out of a folder and out of a bucket."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from numpy.random import SeedSequence
from torch.utils.data import default_collate

from ray_jobs import train
from ray_jobs.checks import preflight
from ray_jobs.checks.dataset import open_dataset, with_episodes
from ray_jobs.cli.resolve import resolve
from ray_jobs.cluster import connect as our_cluster
from ray_jobs.cluster import stream_reader
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.config.recipe import Recipe
from ray_jobs.data.dataset import make_datasets, to_device
from ray_jobs.data.frames import FrameSource
from ray_jobs.data.position import START
from ray_jobs.data.reader import FrameReader
from ray_jobs.data.stream import make_streamed_datasets, streamed_batches
from ray_jobs.search.plan import read_command
from ray_jobs.search.spaces.chosen import read_spaces
from ray_jobs.storage import bucket
from support.commands import job, tiny_act, tiny_diffusion
from support.data_sets import make
from support.processes import Run

STREAM = "--data.source=stream"


@pytest.fixture(scope="module")
def s3(parts):
    """The address of `parts` in a bucket that a server on this machine has."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    address = server.stdout.readline().decode().strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        system.put(str(parts), "bucket/sets/parts", recursive=True)
        yield "s3://bucket/sets/parts"
    server.communicate()


@pytest.fixture(scope="module")
def cluster(s3):
    """A Ray of this process, whose workers know the bucket; `train.main` joins it."""
    our_cluster.start("local").result()


SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


def checked(flags: list[str]) -> Recipe:
    recipe = resolve(flags)
    recipe = preflight.check(recipe)
    return recipe


def epochs(recipe: Recipe, workers: int = 1) -> list:
    shards = stream_reader.source_of(recipe)().streaming_split(workers, equal=True)
    return [stream_reader.epochs(recipe, shard, pinned=False) for shard in shards]


@pytest.fixture(
    params=["parts"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("many_files", "images_in_parquet", "real")]
)
def root(request, tmp_path) -> Path:
    lengths, where = [9, 5, 12, 7, 6], tmp_path / "set"
    if request.param == "many_files":
        return make(where, lengths, cameras=2, video_files_size_in_mb=0.01, data_files_size_in_mb=0.01)
    if request.param == "images_in_parquet":
        return make(where, lengths, cameras=1, use_videos=False)
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("policy", [tiny_act, pytest.param(tiny_diffusion, marks=pytest.mark.slow)])
def test_an_epoch_holds_lerobots_samples(policy, root, tmp_path, cluster):
    """Every frame once (Diffusion leaves out the last ones of an episode), bit for bit as `LeRobotDataset` gives it."""
    recipe = resolve(policy(root, tmp_path / "run", STREAM, "--data.eval_episodes=[3]"))
    recipe = with_episodes(
        recipe, open_dataset(recipe.lerobot.dataset)
    )  # all but this would refuse such small images
    (epoch,) = epochs(recipe)
    dataset, _ = make_datasets(recipe.lerobot, recipe.options.data.eval_episodes)
    dropped = getattr(recipe.lerobot.policy, "drop_n_last_frames", 0)
    last = {e: length - dropped for e, length in enumerate(dataset.meta.episodes["length"])}
    table = dataset.hf_dataset.with_format("numpy")
    wanted = [
        int(index)
        for index, frame, episode in zip(
            table["index"][:], table["frame_index"][:], table["episode_index"][:], strict=True
        )
        if frame < last[int(episode)]
    ]
    seen = []
    for batch in epoch(0):
        seen += batch["index"].tolist()
        rows = [dataset.absolute_to_relative_idx[index] for index in batch["index"].tolist()]
        theirs = default_collate([dataset[row] for row in rows])
        assert theirs.keys() == batch.keys()
        assert theirs.pop("task") == batch.pop("task")
        for key, value in theirs.items():
            ours = batch[key]
            if key in dataset.meta.camera_keys and value.dtype == torch.float32:
                # LeRobot divides images that lie in parquet when it reads them, the loop all of them on the device.
                assert ours.dtype == torch.uint8
                ours = to_device({key: ours}, [key], torch.device("cpu"))[key]
            assert value.dtype == ours.dtype and torch.equal(value, ours), key
    assert sorted(seen) == sorted(wanted)

    if policy is tiny_act and dataset.num_episodes > 6:
        again = [batch["index"].tolist() for batch in epoch(1)]
        order = sum(again, [])
        assert sorted(order) == sorted(wanted) and order != seen
        # A batch is not a stretch of one episode.
        episodes = [
            dataset.hf_dataset[dataset.absolute_to_relative_idx[i]]["episode_index"] for i in order[:40]
        ]
        assert len({int(episode) for episode in episodes}) > 6


def test_two_workers_share_epochs_of_resized_frames(parts, tmp_path, cluster):
    """As many batches for both, no sample twice, and a second epoch after the first, with its episodes in another
    order."""
    recipe = checked(tiny_act(parts, tmp_path / "run", STREAM, "--data.resize=[32,48]"))
    source = stream_reader.source_of(recipe)
    (reads,) = (argument for argument in source.args if isinstance(argument, stream_reader.ShuffledEpisodes))
    orders = [
        [task.metadata.num_rows for task in reads.get_read_tasks(reads.default_num_blocks())]
        for _ in range(2)
    ]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) and len(orders[0]) > 6
    with ThreadPoolExecutor(2) as threads:  # an epoch begins when all workers ask for it
        both = list(threads.map(lambda epoch: [list(epoch(0)), list(epoch(1))], epochs(recipe, workers=2)))
    assert len(both[0][1]) == len(both[1][1]) > 0
    first, second = both[0][0], both[1][0]
    dataset, _ = make_datasets(recipe.lerobot, None, [32, 48])
    reader = FrameReader(dataset, 0, FrameSource(dataset, [32, 48]))
    seen = []
    for pair in zip(first, second, strict=True):  # as many batches for both
        for batch in pair:
            seen += batch["index"].tolist()
            assert torch.equal(
                batch["observation.images.top"], reader(batch["index"].tolist())["observation.images.top"]
            )
    assert len(set(seen)) == len(seen) == len(dataset) // 2 * 2


@pytest.mark.slow
def test_trains_from_a_bucket(s3, cluster, parts, tmp_path, capsys):
    """Two workers, fed by CPU tasks, with held-out episodes; stock LeRobot opens the result, and acts."""
    out = tmp_path / "run"
    flags = tiny_act(s3, out, STREAM, "--ray.num_workers=2")
    more = ["--data.eval_episodes=[3]", "--eval_steps=4", "--save_freq=4"]
    assert train.main([*flags, *more, "--steps=4"]) == 0
    assert "val/action_error" in capsys.readouterr().out
    saved = out / "checkpoints" / "000004" / "pretrained_model"
    policy = ACTPolicy.from_pretrained(saved).eval()
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(saved))
    recipe = resolve(tiny_act(parts, tmp_path / "other"))
    dataset, _ = make_datasets(recipe.lerobot, None)
    frame = to_device(default_collate([dataset[5]]), dataset.meta.camera_keys, torch.device("cpu"))
    assert after(policy.select_action(before(frame))).shape == (1, 3)


def test_a_resumed_run_begins_its_epoch_again(parts, tmp_path, monkeypatch):
    """In another order, and another one on each worker; a stream without a sample does not go on for ever."""
    cfg = resolve(tiny_act(parts, tmp_path / "run", STREAM)).lerobot
    dataset, _ = make_streamed_datasets(cfg, None)
    per_epoch = -(-dataset.num_samples // cfg.batch_size)

    def seeds(rank: int, step: int, epochs: int) -> list[int]:
        asked = []

        def stream(seed: int):
            asked.append(seed)
            yield {}

        epoch = START.after(step, dataset.num_samples, cfg.batch_size, 1).epoch
        rank = SimpleNamespace(process_index=rank, num_processes=1)
        batches = streamed_batches(cfg, dataset, rank, stream, epoch=epoch, step=step)
        return [asked[-1] for _ in zip(range(epochs), batches, strict=False)]

    whole, other = seeds(0, 0, 3), seeds(1, 0, 3)
    assert seeds(0, 0, 3) == whole and len({*whole, *other}) == 6
    in_the_second = seeds(0, per_epoch + 2, 2)
    assert not {*in_the_second} & {*whole} and in_the_second != seeds(0, per_epoch + 3, 2)
    begun = []
    monkeypatch.setattr(np.random, "SeedSequence", lambda words: begun.append(words) or SeedSequence(words))
    seeds(0, per_epoch + 2, 1)
    assert begun[0][1] == 1  # the epoch it was in
    with pytest.raises(RunError, match="no sample"):
        next(
            streamed_batches(
                cfg, dataset, SimpleNamespace(process_index=0, num_processes=1), lambda seed: iter(())
            )
        )


@pytest.mark.parametrize("size", [None, [16, 16]])
def test_a_block_of_which_nothing_is_trained_on(size):
    rows = {
        "frame_index": np.array([8, 9]),
        "episode_index": np.array([0, 0]),
        "camera": np.zeros((2, 3, 32, 32, 3), np.uint8),
        "task": np.array(["push", "push"], object),
    }
    samples = stream_reader.AsLeRobot({"camera": False}, size, np.array([8]))(rows)
    assert samples["camera"].shape == (0, 3, 3, *(size or (32, 32))) and len(samples["task"]) == 0


@pytest.mark.slow
def test_goes_on_from_a_folder(parts, tmp_path):
    """Two workers, stopped and resumed; the resumed run begins its epoch again in another order."""
    out = tmp_path / "run"
    flags = tiny_act(parts, out, STREAM, "--ray.address=local", "--ray.num_workers=2", "--save_freq=3")
    assert job("ray_jobs.train", *flags, "--steps=3").returncode == 0
    again = job("ray_jobs.train", *flags, "--steps=70", "--resume=true")  # more than an epoch
    assert again.returncode == 0, again.stderr
    assert (out / "checkpoints" / "000070").is_dir()


@pytest.mark.slow
def test_a_killed_worker_is_replaced(parts, tmp_path):
    """And begins its epoch again, from the last checkpoint."""
    out = tmp_path / "run"
    run = Run(tiny_act(parts, out, STREAM, "--ray.address=local", "--save_freq=5", "--steps=20"))
    run.wait_for("step 12/20")
    for worker in run.workers():
        worker.kill()
    assert run.end() == 0, run.printed
    assert "a worker was lost" in run.printed
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21)) and (out / "checkpoints" / "000020").is_dir()


def test_what_lies_in_a_bucket_is_known_and_little_is_fetched(s3, parts, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOBS_CACHE", str(tmp_path / "cache"))
    bucket.fetch.cache_clear()
    recipe = checked(tiny_act(s3, tmp_path / "run", STREAM, "--dataset.eval_split=0.2", "--eval_steps=2"))
    assert not list((tmp_path / "cache").glob("**/*.mp4"))  # no episode's files yet
    local = resolve(tiny_act(parts, tmp_path / "run", "--dataset.eval_split=0.2", "--eval_steps=2"))
    streamed, held_out = make_streamed_datasets(recipe.lerobot, None)
    dataset, theirs = make_datasets(local.lerobot, None)
    assert streamed.episodes == dataset.episodes and held_out.episodes == theirs.episodes
    assert streamed.num_frames == dataset.num_frames
    for key, stats in dataset.meta.stats.items():
        for name, value in stats.items():
            torch.testing.assert_close(
                torch.as_tensor(streamed.meta.stats[key][name]), torch.as_tensor(value), rtol=0, atol=0
            )
    for row in (0, len(theirs) - 1):
        ours, expected = held_out[row], theirs[row]
        assert all(torch.equal(ours[key], expected[key]) for key in expected if key != "task")

    # What is changed in the bucket is fetched again.
    (video,) = (tmp_path / "cache").glob("fetched/**/*.mp4")
    name = f"bucket/sets/parts/{video.relative_to(next((tmp_path / 'cache/fetched').iterdir()))}"
    system = fsspec.filesystem("s3")
    before = system.cat(name)
    system.pipe(name, before + b"more")
    system.invalidate_cache()
    bucket.fetch.cache_clear()
    make_streamed_datasets(recipe.lerobot, None)
    assert video.read_bytes() == before + b"more"
    system.pipe(name, before)


def refusal(flags: list[str]) -> str:
    with pytest.raises(InputError) as told:
        checked(flags)
    assert len(str(told.value).splitlines()) <= 2
    return str(told.value)


def test_held_out_files_must_fit(s3, tmp_path, monkeypatch):
    bucket.fetch.cache_clear()  # another test's folder, which is gone
    bucket.fetch(s3)  # the metadata, which is small
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    flags = tiny_act(s3, tmp_path / "run", STREAM, "--data.eval_episodes=[3]", "--save_checkpoint=false")
    assert "files of the held-out episodes [3] are" in refusal(flags)


def test_what_a_stream_cannot_do_is_refused(s3, parts, tmp_path, monkeypatch):
    def told(root, *more: str) -> str:
        return refusal(tiny_act(root, tmp_path / "run", *more))

    assert "local or stream" in told(s3, "--data.source=s3")
    assert "num_workers=0" in told(parts, STREAM, "--ray.num_workers=0")
    assert "image_transforms" in told(parts, STREAM, "--dataset.image_transforms.enable=true")
    assert "a folder that every node sees" in told(parts, STREAM, "--dataset.root=null")
    assert "no meta/info.json" in told("s3://bucket/sets/nothing", STREAM)
    assert "no meta/info.json" in told("s3://bucket/sets", STREAM)
    assert "cannot be read: FileNotFoundError" in told("s3://nobucket/sets", STREAM)
    assert "gcsfs" in told("gs://bucket/sets", STREAM)
    assert "is no address of a bucket" in told("nfs3://bucket/sets", STREAM)
    system = fsspec.filesystem("s3")
    system.put(str(parts), "bucket/sets/torn", recursive=True)
    video = next(name for name in system.find("bucket/sets/torn") if name.endswith(".mp4"))
    system.rm(video)
    assert "is missing" in told("s3://bucket/sets/torn", STREAM) and Path(video).name in told(
        "s3://bucket/sets/torn", STREAM
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    fsspec.filesystem("s3").clear_instance_cache()
    bucket.fetch.cache_clear()
    assert "Could not connect" in told(s3, STREAM)


def test_a_search_does_not_stream(parts, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text(
        "policy: act\nbaseline: {policy.optimizer_lr: 1.0e-4}\nsearch:\n  policy.optimizer_lr: {low: 1.0e-5, high: 1.0e-3, log: true}\n"
    )
    with pytest.raises(InputError, match="for every trial"):
        read_spaces(read_command([f"--space={space}", *tiny_act(parts, tmp_path / "run", STREAM)])[0], [])


def test_without_ffmpeg_it_says_so(monkeypatch, tmp_path):
    from ray_jobs.data import ffmpeg

    monkeypatch.setattr(ffmpeg, "link", lambda folder: None)
    monkeypatch.setattr(ffmpeg, "links_folder", lambda: tmp_path)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    try:
        ffmpeg.check()
    except InputError as error:
        assert "apt-get install ffmpeg" in str(error)
    else:
        pytest.skip("this machine has an FFmpeg of its own")
