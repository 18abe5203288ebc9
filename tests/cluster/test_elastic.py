"""`--ray.num_workers=2:8`: whatever workers there are, a step is made of the samples that the full group would take."""

import itertools
import json

import pytest
from lerobot.datasets.factory import make_dataset

from ray_jobs.cli.command_line import parse_options, read_flags
from ray_jobs.cli.resolve import resolve
from ray_jobs.cluster import resources
from ray_jobs.config.events import Log, Start
from ray_jobs.data.dataset import training_batches
from ray_jobs.data.position import START, Shards
from support.commands import job, tiny_act, train_in_process

# What draws random numbers on each worker, and so depends on who computes a batch.
CALM = ("--policy.use_vae=false", "--policy.dropout=0", "--dataset.episodes=[0,1,2]")


def shards_of(rank: int, workers: int, full: int) -> Shards:
    mine = range(rank, full, workers)
    return Shards(full, mine, workers * len(mine) / full)


class Rank:
    """What `training_batches` asks an Accelerator."""

    def __init__(self, process_index: int, num_processes: int):
        import torch

        self.process_index, self.num_processes, self.device = (
            process_index,
            num_processes,
            torch.device("cpu"),
        )


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_samples_of_a_step_are_those_of_the_full_group(parts, tmp_path, accumulated):
    """Four workers become three, two, one and four again, within an epoch and across its end."""
    flags = tiny_act(parts, tmp_path / "run", "--batch_size=3", "--dataset.episodes=[0,1]")
    cfg = resolve([flag for flag in flags if "num_workers" not in flag] + ["--num_workers=0"]).lerobot
    dataset = make_dataset(cfg)

    def steps(workers: int, count: int, begin: int) -> list[list[int]]:
        """Sorted frame numbers of each step."""
        position = START.after(begin * accumulated, len(dataset), 3, 4)
        ranks = []
        for rank in range(workers):
            mine = shards_of(rank, workers, 4)
            batches = training_batches(
                cfg,
                dataset,
                Rank(rank, workers),
                shards=mine,
                batches_per_step=accumulated,
                begin=position,
            )
            ranks.append((len(mine.mine) * accumulated, batches))
        found = []
        for _ in range(count):
            step = [b["index"].tolist() for n, batches in ranks for b in itertools.islice(batches, n)]
            found.append(sorted(itertools.chain(*step)))
        for _, batches in ranks:
            batches.close()
        return found

    per_epoch = -(-len(dataset) // (3 * 4 * accumulated))
    undisturbed = steps(4, per_epoch + 4, 0)
    at, seen = 0, []
    for workers, count in ((4, 2), (3, 1), (1, 2), (2, per_epoch - 4), (3, 1), (4, 2)):
        seen += steps(workers, count, at)
        at += count
    assert seen == undisturbed[: len(seen)]


def test_one_worker_of_two_is_one_that_accumulates(parts, tmp_path):
    """The same weights, bit for bit, as one worker with `--ray.grad_accumulation=2`; a resume by the other goes on."""
    losses, weights = {}, {}
    for name, flags in (
        ("elastic", ["--ray.num_workers=1:2"]),
        ("accumulated", ["--ray.grad_accumulation=2"]),
    ):
        run = tmp_path / name
        more = (*CALM, "--batch_size=2", *flags)
        _, events = train_in_process(tiny_act(parts, run, "--steps=4", "--save_freq=2", *more))
        assert next(event for event in events if isinstance(event, Start)).facts["global_batch_size"] == 4
        losses[name] = [event.values["train/loss"] for event in events if isinstance(event, Log)]
        weights[name] = (run / "checkpoints/last/pretrained_model/model.safetensors").read_bytes()
    assert losses["elastic"] == losses["accumulated"] and len(losses["elastic"]) == 4
    assert weights["elastic"] == weights["accumulated"]
    counter = tmp_path / "elastic/checkpoints/000002/training_state/training_step.json"
    assert json.loads(counter.read_text())["num_processes"] == 2


def test_flags(parts, tmp_path):
    assert read_flags(["--ray.num_workers=2:8"])[0] == {"ray.min_workers": "2", "ray.num_workers": "8"}
    for wrong, right in (
        ("--ray.num_workers=8:2", "--ray.num_workers=8:2: the fewest workers first"),
        ("--ray.num_workers=0:2", "at least 1"),
        ("--ray.num_workers=a:2", "must be a whole number"),
        ("--ray.num_workers=1:2 --ray.parallelism=fsdp", "not with --ray.parallelism=fsdp"),
        ("--ray.num_workers=1:2 --data.source=stream", "must be one number"),
    ):
        with pytest.raises(Exception, match=right):
            train_in_process(tiny_act(parts, tmp_path / "run", *wrong.split()))


def test_a_typed_number_takes_the_place_of_a_saved_range():
    saved = {"ray": {"num_workers": 8, "min_workers": 2, "placement": "spread"}}
    ray = parse_options({"ray.num_workers": "1"}, saved).ray
    assert (ray.num_workers, ray.min_workers, ray.placement) == (1, None, "spread")
    ray = parse_options({}, saved).ray
    assert (ray.num_workers, ray.min_workers) == (8, 2)


def test_a_head_without_cpus_is_no_host(monkeypatch):
    """Ray's usual head: workers get their share of the others."""
    have = [{"node:head": 1.0}, {"CPU": 8.0}, {"CPU": 8.0}]
    monkeypatch.setattr(resources, "nodes", lambda: have)
    monkeypatch.setattr(resources, "may_grow", lambda: False)
    assert str(resources.per_worker(2, None, None, "cpu")) == "8 CPUs, 0 GPUs"
    assert str(resources.per_worker(4, None, None, "cpu")) == "4 CPUs, 0 GPUs"


@pytest.mark.slow
def test_uneven_shares_are_averaged_as_even_ones(parts, tmp_path):
    """Two workers that do the share of three, one of them twice as much: the losses of one worker that does all."""
    losses = {}
    for name, flags in (
        ("two of three", ["--ray.num_workers=2:3", "--ray.cpus_per_worker=1"]),
        ("one", ["--ray.num_workers=1", "--ray.grad_accumulation=3"]),
    ):
        run = tmp_path / name
        result = job(
            "ray_jobs.train",
            *tiny_act(parts, run, "--steps=8", "--batch_size=2", "--ray.address=local", *CALM, *flags),
        )
        assert result.returncode == 0, result.stderr
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [record["train/loss"] for record in records]
    assert losses["two of three"] == pytest.approx(losses["one"], rel=1e-4)
