"""Which worker a run waits for, as its beats tell, and that who validates, saves or waits for storage is none."""

import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import ray
import torch
import torch.utils.checkpoint
from lerobot.policies.act.modeling_act import ACTPolicy

from ray_jobs.cluster import watchdog
from ray_jobs.config.busy import busy_with
from ray_jobs.config.events import Notice, Step
from ray_jobs.storage.retry import patiently
from ray_jobs.training import checkpoint
from ray_jobs.training import step as step_module
from support.commands import tiny_act, train_in_process


def heartbeat(rank: int, step: int | None = 7, **more) -> watchdog.Heartbeat:
    facts = {"node_id": "n", "address": "10.0.0.3", "pid": 1, "where": "read (data.py:9)", "slow": False}
    return watchdog.Heartbeat(rank=rank, step=step, waits=False, **facts | more)


@pytest.mark.parametrize(
    ("beats", "found"),
    [
        ({0: (heartbeat(0), 1, 1), 1: (heartbeat(1), 1, 1)}, None),
        ({0: (heartbeat(0), 1, 700), 1: (heartbeat(1), 650, 700)}, "1 has stopped answering after step 7"),
        ({0: (heartbeat(0, None), 1, 700), 1: (heartbeat(1, None), 1, 700)}, None),  # still being built
        ({0: (heartbeat(0, None), 700, 700)}, "0 has stopped answering before the first step"),
        ({0: (heartbeat(0, slow=True), 1, 700), 1: (heartbeat(1), 1, 700)}, None),  # one validates or saves
        (
            {0: (heartbeat(0), 1, 700), 1: (heartbeat(1, 6), 1, 700)},
            "1 has not come further than step 6 for 600 s",
        ),
    ],
)
def test_who_is_waited_for(beats, found):
    culprit = watchdog.culprit(beats, 600)
    assert (culprit and f"{culprit[0].rank} {culprit[1]}"[: len(found or "")]) == found


def test_who_waits_is_not_who_is_waited_for():
    waiting = watchdog.Heartbeat(0, "n", "a", 1, 7, "wait (distributed.py:1)", slow=False, waits=True)
    culprit, why = watchdog.culprit({0: (waiting, 1, 700), 1: (heartbeat(1), 1, 700)}, 600)
    assert culprit.rank == 1 and "data.py:9" in why


class Channel:
    """Keeps the beats that a worker's thread tells it of, without a Ray."""

    def __init__(self, monkeypatch):
        self.heartbeats: list[watchdog.Heartbeat] = []
        self.heartbeat = SimpleNamespace(remote=self.heartbeats.append)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
        monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))


def test_a_worker_tells_where_it_is(monkeypatch):
    """The thread that tells sees this one: its step, and the function it is in."""
    channel = Channel(monkeypatch)
    monkeypatch.setattr(watchdog, "HEARTBEAT_S", 0.05)

    def training() -> None:
        hear = watchdog.heartbeat(channel, rank=3)
        hear(Step(5))
        waits_here()

    def waits_here() -> None:
        time.sleep(0.5)

    thread = threading.Thread(target=training)
    thread.start()
    thread.join()
    told = channel.heartbeats[-1]
    assert (told.rank, told.step, told.slow) == (3, 5, False) and "waits_here" in told.where
    time.sleep(0.2)
    count = len(channel.heartbeats)
    time.sleep(0.2)
    assert len(channel.heartbeats) == count, "it must end with the training"


def beats_within(monkeypatch, doing) -> list[bool]:
    """What a worker tells of `slow` while its training does something that lasts."""
    channel = Channel(monkeypatch)
    monkeypatch.setattr(watchdog, "HEARTBEAT_S", 0.02)

    def training() -> None:
        hear = watchdog.heartbeat(channel, rank=0)
        hear(Step(1))
        doing()

    thread = threading.Thread(target=training)
    thread.start()
    thread.join()
    return [told.slow for told in channel.heartbeats if told.step == 1]


def test_a_hang_within_a_checkpointed_forward_pass_is_no_saving(monkeypatch):
    """torch's gradient checkpointing lies in a file of the same name as ours."""
    module = torch.nn.Linear(2, 2)

    def hangs(x):
        time.sleep(0.3)
        return module(x)

    forward = partial(torch.utils.checkpoint.checkpoint, hangs, torch.ones(2), use_reentrant=False)
    told = beats_within(monkeypatch, forward)
    assert told and not any(told)


def test_who_saves_or_waits_for_storage_does_not_hang(monkeypatch):
    told = beats_within(monkeypatch, lambda: patiently(partial(time.sleep, 0.3), "it", print))
    assert sum(told) >= 3, "while it waits"
    other = threading.Thread(target=patiently, args=(partial(time.sleep, 0.6), "it", print))
    other.start()  # the copy to a bucket, say, goes on beside the training
    told = beats_within(monkeypatch, lambda: time.sleep(0.3))
    other.join()
    assert told and not any(told)


def test_who_saves_or_validates_says_so(parts, tmp_path, monkeypatch):
    """In a real run: what is called within the two is called by somebody who has said so, and nothing else is."""
    seen = {}

    def watch(owner, name: str) -> None:
        inner = getattr(owner, name)

        def watched(*args, **kwargs):
            seen.setdefault(name, set()).add(busy_with(threading.current_thread()))
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(checkpoint, "save")
    watch(ACTPolicy, "predict_action_chunk")
    watch(step_module, "clip_gradients")
    more = ("--steps=1", "--data.eval_episodes=[11]", "--max_eval_samples=2")
    train_in_process(tiny_act(parts, tmp_path / "run", *more))
    assert seen == {
        "clip_gradients": {""},
        "predict_action_chunk": {"validating"},
        "save": {"waiting for storage"},
    }
    assert busy_with(threading.current_thread()) == ""


def test_the_first_step_is_told_at_once(monkeypatch):
    channel = Channel(monkeypatch)
    monkeypatch.setattr(watchdog, "HEARTBEAT_S", 60)

    def training() -> None:
        hear = watchdog.heartbeat(channel, rank=3)
        time.sleep(0.2)
        for event in (Notice(""), Step(1), Notice("")):
            hear(event)
        time.sleep(0.5)

    thread = threading.Thread(target=training)
    thread.start()
    thread.join()
    assert [told.step for told in channel.heartbeats] == [None, 1]
