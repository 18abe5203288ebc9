"""Batches are LeRobot's, bit for bit: what a batch holds, and which frames come when, on which rank."""

import copy
import functools
import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import EpisodeAwareSampler, LeRobotDataset
from lerobot.datasets.factory import make_dataset
from lerobot.processor import ImageCropResizeProcessorStep
from torch.utils.data import DataLoader, default_collate

from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import RunError
from ray_jobs.config.options import DataOptions
from ray_jobs.data.dataset import make_datasets, to_device, training_batches
from ray_jobs.data.frame_cache import FrameCache, open_frames
from ray_jobs.data.frames import FrameSource
from ray_jobs.data.position import START, Position
from ray_jobs.data.reader import FrameReader
from support.commands import tiny_act
from support.data_sets import POLICIES, assert_same, make, opened

torch.set_num_threads(1)  # tiny networks: more threads would only wait for each other


@pytest.fixture(scope="module")
def many_files(tmp_path_factory) -> Path:
    """Two cameras; every episode starts a new video file, some a new data file."""
    root = tmp_path_factory.mktemp("many") / "files"
    make(root, [9, 5, 12, 7, 6], cameras=2, video_files_size_in_mb=0.01, data_files_size_in_mb=0.01)
    assert len(list(root.glob("videos/*/*/*.mp4"))) > 2, "the videos were meant to be split"
    return root


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Path:
    """The same lengths without cameras: frames have an order without being pictures."""
    return make(tmp_path_factory.mktemp("numbers") / "numbers", [9, 5, 12, 7, 6])


@pytest.fixture(scope="module")
def images_in_parquet(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("images") / "images", [9, 5], cameras=1, use_videos=False)


def position(dataset: LeRobotDataset, **counter) -> Position:
    """Of a checkpoint that says `counter`, as one of stock LeRobot does."""
    return Position.of(counter, len(dataset), batch_size=99, shards=99)


@pytest.fixture(params=["decoded", "cached"])
def frames_of(request, tmp_path) -> Callable[[LeRobotDataset], FrameSource | FrameCache]:
    """Frames decoded one by one, or a new cache of them: batches are to be the same."""

    def frames(dataset: LeRobotDataset) -> FrameSource | FrameCache:
        where = "off" if request.param == "decoded" else str(tmp_path / "cache")
        found = open_frames(dataset, DataOptions(cache=where), reads=0)
        assert isinstance(found, FrameCache) == (request.param == "cached")
        return found

    return frames


# ---------------------------------------------------------------------- what a batch holds


def test_every_frame_equals_lerobots(parts, frames_of):
    """Every frame of the data set, in batches of 16, with ACT's action chunks (padding at episode ends)."""
    dataset = opened(parts, "act")
    reader = FrameReader(dataset, threads=2, frames=frames_of(dataset))
    for indices in itertools.batched(range(len(dataset)), 16):
        assert_same(reader(list(indices)), default_collate([dataset[i] for i in indices]))
    reader.close()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("episodes", [None, [1, 3], [3, 1, 4]], ids=str)
def test_two_cameras_in_several_files(many_files, policy, episodes, frames_of):
    """No deltas, action chunks, observation history; all episodes and selections in any order."""
    dataset = opened(many_files, policy, episodes)
    indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    ours = FrameReader(dataset, 0, frames_of(dataset))(indices)
    assert_same(ours, default_collate([dataset[i] for i in indices]))
    images = (2, 3, 32, 32) if policy == "diffusion" else (3, 32, 32)
    assert ours["observation.images.side"].shape == (len(dataset), *images)
    assert set(ours["task"]) == ({"push", "pull"} if episodes != [1, 3] else {"pull"})


@pytest.mark.parametrize("policy", ["act", "diffusion"])
@pytest.mark.parametrize("episodes", [None, [17, 2, 9]], ids=str)
def test_real_recording(real, policy, episodes):
    """Random frames of a recording from a robot: other codec, other frame rate, jitter."""
    dataset = opened(real, policy, episodes)
    indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1))[:6].tolist()
    assert_same(FrameReader(dataset, threads=2)(indices), default_collate([dataset[i] for i in indices]))


@pytest.mark.slow  # of data that is made here: `test_every_frame_equals_lerobots`, `test_two_cameras_in_several_files`
@pytest.mark.parametrize("policy", ["act", "diffusion"])
def test_real_recording_from_the_cache(real, policy, tmp_path):
    """A thousand random frames."""
    dataset = opened(real, policy)
    frames = open_frames(dataset, DataOptions(cache=str(tmp_path)), reads=0)
    reader = FrameReader(dataset, 0, frames)
    indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(2))[:1000].tolist()
    for some in itertools.batched(indices, 50):
        assert_same(reader(list(some)), default_collate([dataset[i] for i in some]))


def test_opened_once_for_each_policy_in_turn(tmp_path):
    """A process that opens a data set for a second policy gives that one's time steps; a changed set is opened anew."""
    root = make(tmp_path / "numbers", [9, 5], seed=1)
    sizes = [[f"--policy.chunk_size={n}", f"--policy.n_action_steps={n}"] for n in (4, 6, 4)]
    opened = [make_datasets(config(root, *flags), [1])[0] for flags in sizes]
    assert [len(dataset[0]["action"]) for dataset in opened] == [4, 6, 4]
    assert opened[0].hf_dataset is opened[1].hf_dataset
    opened[0].meta.stats["action"]["mean"][:] = 7.0
    assert not np.array_equal(opened[1].meta.stats["action"]["mean"], opened[0].meta.stats["action"]["mean"])
    before = opened[0][0]["action"]
    shutil.rmtree(root)
    make(root, [9, 5], seed=2)
    (again, _) = make_datasets(config(root, *sizes[0]), [1])
    assert not torch.equal(again[0]["action"], before)


def test_unreadable_video_is_named(many_files, tmp_path):
    """A damaged file stops the run with its name, its camera and the episode."""
    root = Path(shutil.copytree(many_files, tmp_path / "damaged"))
    dataset = opened(root, "act")
    broken = root / dataset.meta.get_video_file_path(2, "observation.images.side")
    broken.write_bytes(broken.read_bytes()[:100])
    row = dataset.meta.episodes["dataset_from_index"][2]
    with pytest.raises(RunError, match=rf"observation.images.side of episode 2 from .*{broken.name}"):
        FrameReader(dataset, threads=1)([row])


# ---------------------------------------------------------------------- which frames come when


def config(root: Path, *flags: str) -> TrainPipelineConfig:
    return copy.deepcopy(_config(root, *flags))


@functools.cache  # parsing 655 flags takes a second
def _config(root: Path, *flags: str) -> TrainPipelineConfig:
    return resolve(tiny_act(root, root.parent / "unused", *flags)).lerobot


def rank_of(process_index: int, num_processes: int) -> SimpleNamespace:
    """What `training_batches` asks an Accelerator: who am I, of how many, on what."""
    return SimpleNamespace(
        num_processes=num_processes, process_index=process_index, device=torch.device("cpu")
    )


def lerobots_batches(cfg, dataset: LeRobotDataset, rank: int, ranks: int):
    """`lerobot-train`'s sampler and loader, sharded by accelerate, epoch after epoch."""
    sampler = EpisodeAwareSampler(
        dataset.meta.episodes["dataset_from_index"],
        dataset.meta.episodes["dataset_to_index"],
        episode_indices_to_use=dataset.episodes,
        drop_n_last_frames=getattr(cfg.policy, "drop_n_last_frames", 0),
        shuffle=True,
        seed=cfg.seed,
        absolute_to_relative_idx=dataset.absolute_to_relative_idx,
    )
    loader = DataLoader(dataset, batch_size=cfg.batch_size, sampler=sampler, num_workers=0)
    loader = prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)
    while True:
        yield from loader


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "flags",
    [
        ("--dataset.episodes=[0]", "--batch_size=2"),  # 9 frames: the last batch is smaller
        ("--dataset.episodes=[4,2]", "--batch_size=4"),
        ("--dataset.episodes=[1]", "--batch_size=4", "--seed=3"),  # 5 frames: fewer than 2 ranks need
        ("--batch_size=5", "--num_workers=2"),
    ],
    ids=" ".join,
)
def test_order_equals_lerobots_and_survives_a_resume(numbers, flags, ranks):
    """Over three epochs each rank gets `lerobot-train`'s batches; a run that goes on from any step gets
    what it would have got: in the middle of an epoch, at its uneven end, at the boundary."""
    cfg = config(numbers, *flags)
    dataset = make_dataset(cfg)
    per_epoch = math.ceil(math.ceil(len(dataset) / cfg.batch_size) / ranks)
    steps = 3 * per_epoch
    for rank in range(ranks):
        accelerator = rank_of(rank, ranks)
        ours = list(itertools.islice(training_batches(cfg, dataset, accelerator), steps))
        theirs = itertools.islice(lerobots_batches(cfg, dataset, rank, ranks), steps)
        for mine, stock in zip(ours, theirs, strict=True):
            assert_same(mine, stock)
        for step in {1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch} - {0}:
            begin = position(dataset, step=step, batch_size=cfg.batch_size, num_processes=ranks)
            assert begin == START.after(step, len(dataset), cfg.batch_size, ranks)
            tail = training_batches(cfg, dataset, accelerator, begin=begin)
            for mine, undisturbed in zip(tail, ours[step : step + 3], strict=False):
                assert mine["index"].tolist() == undisturbed["index"].tolist(), f"after step {step}"
            tail.close()


def test_resume_counts_in_the_batches_of_the_checkpoint(numbers):
    """With other workers or another batch size a run goes on at the epoch and frame the checkpoint reached."""
    cfg = config(numbers, "--batch_size=2")
    dataset = make_dataset(cfg)  # 39 frames
    whole = itertools.islice(training_batches(cfg, dataset, rank_of(0, 1)), 20)
    order = [i for batch in whole for i in batch["index"].tolist()]
    begin = position(dataset, step=3, batch_size=4, num_processes=2)  # 24 frames seen
    tail = next(training_batches(cfg, dataset, rank_of(0, 1), begin=begin))
    assert tail["index"].tolist() == order[24:26]


def test_accumulated_batches_count_as_one_step(numbers):
    """With two batches per optimizer step, five steps mean ten batches."""
    cfg = config(numbers, "--batch_size=2")
    dataset = make_dataset(cfg)
    accelerator = rank_of(0, 1)
    whole = [b["index"].tolist() for b in itertools.islice(training_batches(cfg, dataset, accelerator), 12)]
    begin = START.after(5 * 2, len(dataset), batch_size=2, shards=1)
    tail = training_batches(cfg, dataset, accelerator, batches_per_step=2, begin=begin)
    assert [next(tail)["index"].tolist() for _ in range(2)] == whole[10:]


CHANGES = {  # batch size, workers, accumulated batches, steps
    "batch size, twice": ((4, 1, 1, 3), (2, 1, 1, 3), (2, 1, 1, 4), (3, 1, 1, 9)),
    "workers": ((2, 3, 1, 2), (2, 1, 1, 5), (2, 2, 1, 4), (2, 2, 1, 3)),
    "accumulation": ((2, 1, 3, 2), (2, 1, 1, 4), (2, 1, 2, 3), (2, 1, 2, 2)),
    "all of them": ((4, 2, 1, 2), (3, 1, 2, 2), (1, 4, 1, 1), (5, 1, 1, 6), (2, 2, 2, 2)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_no_sample_is_read_twice_when_a_resume_changes_the_batches(numbers, case):
    """A run that goes on with another batch size, another number of workers or other accumulation reads every sample of an
    epoch before it reads one again (but for those that fill up the last batches of several workers). What is kept of
    it is what a checkpoint keeps."""
    cfg = config(numbers)
    dataset = make_dataset(cfg)
    read, begin = [], START
    for batch_size, ranks, accumulated, steps in CHANGES[case]:
        cfg = config(numbers, f"--batch_size={batch_size}")
        each = [
            training_batches(cfg, dataset, rank_of(rank, ranks), batches_per_step=accumulated, begin=begin)
            for rank in range(ranks)
        ]
        for _ in range(steps * accumulated):
            read += [i for batches in each for i in next(batches)["index"].tolist()]
        for batches in each:
            batches.close()
        begin = begin.after(steps * accumulated, len(dataset), batch_size, ranks)
    whole = lerobots_batches(config(numbers, "--batch_size=1"), dataset, 0, 1)
    order = [next(whole)["index"].item() for _ in range(2 * len(dataset))]
    of_the_first = len(dataset) if begin.epoch else begin.start_index
    assert read[:of_the_first] == order[:of_the_first]
    if begin.epoch:
        filled = len(read) - len(dataset) - begin.start_index
        assert read[of_the_first + filled :] == order[of_the_first : len(dataset) + begin.start_index]
        assert filled < batch_size * ranks


# ---------------------------------------------------------------------- images in parquet, image transforms


@pytest.mark.parametrize("workers", [0, 1])
def test_images_in_parquet(images_in_parquet, workers, frames_of):
    """A data set without videos gives LeRobot's batches, too."""
    flags = (f"--num_workers={workers}", "--dataloader_multiprocessing_context=fork", "--batch_size=4")
    cfg = config(images_in_parquet, *flags)
    dataset = make_dataset(cfg)
    ours = training_batches(cfg, dataset, rank_of(0, 1), frames=frames_of(dataset))
    cameras = dataset.meta.camera_keys
    for mine, stock in zip(ours, itertools.islice(lerobots_batches(cfg, dataset, 0, 1), 6), strict=False):
        assert mine[cameras[0]].dtype == torch.uint8
        assert_same(to_device(mine, cameras, torch.device("cpu")), stock)
    ours.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_random_image_transforms_follow_the_seed(many_files, workers):
    """The same seed gives the same augmented images; another seed, and another epoch, give others."""

    def images(seed: int, enable: bool = True) -> list[torch.Tensor]:
        flags = (f"--num_workers={workers}", "--dataloader_multiprocessing_context=fork", "--batch_size=2")
        more = (f"--dataset.image_transforms.enable={enable}", "--dataset.episodes=[1]")
        cfg = config(many_files, *flags, *more)
        dataset = make_dataset(cfg)
        torch.manual_seed(seed)
        cfg.seed = seed
        batches = training_batches(cfg, dataset, rank_of(0, 1))
        found = {}  # (frame, epoch) -> image
        for epoch in range(2):
            for batch in itertools.islice(batches, 3):
                for frame, image in zip(
                    batch["index"].tolist(), batch["observation.images.top"], strict=True
                ):
                    found[frame, epoch] = image
        batches.close()
        return [found[key] for key in sorted(found)]

    def same(a: list, b: list) -> bool:
        return all(map(torch.equal, a, b))

    first = images(1)
    assert len(first) == 10 and same(first, images(1))
    assert not same(first, images(2)) and not same(first, images(1, enable=False))
    assert not same(first[0::2], first[1::2]), "both epochs saw the same"


def test_image_transforms_draw_lerobots_random_numbers(many_files, frames_of):
    cfg = config(many_files, "--dataset.image_transforms.enable=true")
    dataset = make_dataset(cfg)
    torch.manual_seed(5)
    ours = FrameReader(dataset, 0, frames_of(dataset)).__getitems__([3, 20, 38])
    torch.manual_seed(5)
    assert_same(ours, default_collate([dataset[i] for i in (3, 20, 38)]))


# ---------------------------------------------------------------------- resized


@pytest.mark.parametrize("policy", ["act", "diffusion"])
@pytest.mark.parametrize("kind", ["many_files", "images_in_parquet"])
def test_resized_frames_are_those_of_lerobots_resize_step(request, kind, policy, tmp_path):
    """Rounded to uint8, from the cache as without it; nothing else of a batch changes."""
    dataset = opened(request.getfixturevalue(kind), policy)
    cameras, indices, size = dataset.meta.camera_keys, [0, 5, 13, 8], [12, 20]
    theirs = default_collate([dataset[i] for i in indices])
    off, kept = (DataOptions(cache=where, resize=size) for where in ("off", str(tmp_path)))
    ours = FrameReader(dataset, 0, open_frames(dataset, off, reads=0))(indices)
    assert_same(FrameReader(dataset, 0, open_frames(dataset, kept, reads=0))(indices), ours)

    step = ImageCropResizeProcessorStep(resize_size=tuple(size))
    for key in cameras:
        full = theirs[key] / 255 if theirs[key].dtype == torch.uint8 else theirs[key]
        wanted = step.observation({key: full.flatten(0, -4)})[key].view(*full.shape[:-2], *size)
        assert ours[key].dtype == torch.uint8 and ours[key].shape == wanted.shape
        assert (ours[key] / 255 - wanted).abs().max() <= 0.5001 / 255
        assert ours[key].float().std() > 1, "an empty image"
    gone = {f"{key}_is_pad" for key in cameras}
    assert set(theirs) - set(ours) == (gone if policy == "diffusion" else set())
    rest = set(ours) - set(cameras)
    assert_same({key: ours[key] for key in rest}, {key: theirs[key] for key in rest})
