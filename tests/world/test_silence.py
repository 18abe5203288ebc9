"""A job says what goes on: its first line soon, and another at least every five seconds until the first step, into a file or a
pipe as on a terminal."""

import io
import itertools
import os
import subprocess
import sys
import time

import pytest
from make import made
from properties import TABLE
from stock import flags_for

from ray_jobs.cli import terminal
from support.commands import ROOT

ALLOWED_S = 5.5  # on a machine that has nothing else to do

JOBS = {
    "train": ("ray_jobs.train", "plain", ("--ray.num_workers=1",)),
    "train here": ("ray_jobs.train", "h264", ("--ray.num_workers=0",)),
    "train, refused at once": ("ray_jobs.train", "gone: a video", ("--ray.num_workers=1",)),
    "train, refused by a worker": ("ray_jobs.train", "rows in another order", ("--ray.num_workers=1",)),
    "train, a recording": ("ray_jobs.train", "G1", ("--ray.num_workers=1",)),
    "doctor": ("ray_jobs.doctor", "h264", ()),
    "doctor, refused": ("ray_jobs.doctor", "rows in another order", ()),
    "doctor, a recording": ("ray_jobs.doctor", "G1", ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_longest_silence(tmp_path, name):
    module, of_set, more = JOBS[name]
    flags = [*flags_for(TABLE[of_set], made(TABLE[of_set], tmp_path), tmp_path / "run"), *more]
    begin = last = time.monotonic()
    longest, before, between = 0.0, "the start", ""
    with subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    ) as process:
        lines = list[str]()
        for line in itertools.chain(iter(process.stdout.readline, ""), [""]):
            now = time.monotonic()
            if now - last > longest:
                longest, between = now - last, f"between {before!r} and {line.strip()!r}"
            last, before = now, line.strip()
            lines.append(line)
            if line.startswith("step 1/"):
                break
        process.stdout.read()
    print(f"{name}: {longest:.1f} s of silence {between}, {last - begin:.1f} s in all")
    busy = max(1, os.getloadavg()[0] / os.cpu_count())
    assert "Traceback" not in "".join(lines)
    assert longest < ALLOWED_S * busy, f"{longest:.1f} s {between}"


@pytest.mark.slow
def test_the_clock_begins_with_what_goes_on(monkeypatch):
    """What began a moment after another line is told of again as soon as anything."""
    heard = []

    class Ear(io.StringIO):
        def write(self, text: str) -> int:
            heard.append((time.monotonic(), text))
            return len(text)

    monkeypatch.setattr(terminal, "STILL_EVERY_S", 2)
    monkeypatch.setattr(sys, "stdout", Ear())
    terminal.doing("one thing")
    time.sleep(0.3)
    terminal.doing("another")
    time.sleep(3)
    terminal.doing("")
    begun, again = [when for when, text in heard if "another" in text][:2]
    assert 2 <= again - begun < 3
