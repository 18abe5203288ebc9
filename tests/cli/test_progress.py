"""What a search says while it runs, in a log file: something, and nothing twice."""

import re

from ray_jobs.cli import progress
from ray_jobs.cli.progress import Progress
from ray_jobs.config.events import Begun, Ended, Start, Step


def lines_of(monkeypatch, capsys, events: dict[int, list[dict]], seconds: int) -> list[str]:
    """What is printed while a search runs for so long, with events by the second in which they come."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    shown = Progress(
        num_samples=6, steps=100, metric="val/action_error", higher=False, done=0, best=None, slots=2
    )
    for _ in range(10 * seconds):
        for event in events.pop(int(clock.now), []):
            shown.show(event)
        shown.refresh()
        clock.now += 0.1
    shown.close()
    return capsys.readouterr().out.splitlines()


def begun(trial: str) -> Begun:
    return Begun(trial=trial)


def test_until_the_first_step(monkeypatch, capsys):
    """Every five seconds what is waited for, and for how long already."""
    events = {
        21: [begun("0000")],
        33: [Start(0, {}, trial="0000")],
        45: [Step(1, trial="0000")],
    }
    lines = lines_of(monkeypatch, capsys, events, 45)
    assert lines[0] == "0/6 trials: starting 2 slot(s) for trials, 5 s so far"
    assert sum("starting 2 slot(s)" in line for line in lines) == 4
    assert (
        "0/6 trials, 1 running: opening the data and building the policy of trial 0000, 9 s so far" in lines
    )
    assert "taking the first step of trial 0000" in lines[-1] and len(lines) == 8


def test_nothing_is_said_twice(monkeypatch, capsys):
    """Between two steps that take minutes, nothing; between two trials, what is waited for."""
    step = [Step(1, trial="0000")]
    ended = Ended("pruned", None, 0.5, 2, None, trial="0000")
    events = {
        1: [begun("0000"), Start(0, {}, trial="0000"), *step],
        400: [Step(2, trial="0000")],
        500: [ended],
    }
    lines = lines_of(monkeypatch, capsys, events, 561)
    assert lines[:2] == ["0/6 trials, 1 running; steps 1 of 100", "0/6 trials, 1 running; steps 2 of 100"]
    assert lines[2].startswith("trial 0000 pruned: val/action_error 0.5 at step 2")
    assert all("waiting for a slot, " in line for line in lines[3:]) and len(lines) == 5


def test_the_time_that_is_left_goes_down(monkeypatch, capsys):
    """Five trials were given up after 8 steps; the last one takes a step every two seconds, to its end."""
    events = {0: [begun("0000"), Start(0, {}, trial="0000")]}
    events |= {second: [Step(second // 2, trial="0000")] for second in range(2, 200, 2)}
    for name in map(str, range(5)):
        events[40] += [begun(name), Ended("pruned", None, 0.5, 8, None, trial=name)]
    lines = [line for line in lines_of(monkeypatch, capsys, events, 195) if "left" in line]
    left = [duration_of(line) for line in lines]
    assert len(left) >= 4 and left == sorted(set(left), reverse=True), lines
    assert left[-1] < 15  # of 30 steps and more that are left when it is first told


def duration_of(line: str) -> int:
    """Seconds."""
    minutes, seconds = re.search(r"left (?:(\d+) min )?(\d+) s", line).groups()
    return 60 * int(minutes or 0) + int(seconds)
