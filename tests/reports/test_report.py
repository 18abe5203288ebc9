"""report.html: one file that needs nothing else, whose every number stands in trials.csv."""

import csv
import json
import re
import shlex
import shutil
import struct
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from tensorboardX.proto.event_pb2 import Event

from ray_jobs import report
from ray_jobs.cli.command_line import read_flags
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.evaluation import run as evaluation_run
from ray_jobs.search.early_checks import check_search
from ray_jobs.storage.records import read_json, read_metrics
from support.commands import tiny_act
from support.evaluations import evaluated, trained
from support.searches import ACT, search, study_of

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """The tags of a page, its table of trials, and whatever it would fetch."""

    def __init__(self, file: Path):
        super().__init__()
        self.text, self.open, self.wanted, self.trials, self.images = file.read_text(), [], [], [], 0
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.wanted += [found[name] for name in ("src", "href") if name in found]
        self.images += tag == "img"
        if tag == "tr" and "class" in found:
            self.trials.append([])
        if "data-v" in found:
            self.trials[-1].append(found["data-v"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def check(self) -> "Page":
        assert not self.open, "tags that are not closed"
        assert all(url.startswith("data:") for url in self.wanted), "fetched from elsewhere"
        assert not re.search(r"https?://|@import|url\(", self.text)
        assert len(self.text) < 5e6
        return self


@pytest.fixture(scope="module")
def searched(parts, tmp_path_factory) -> Path:
    """A search of six short trials with a camera, one after the other. All begin with the same weights, and the seed
    draws small learning rates for the last two: they are worse than the median of the first four, and pruned."""
    folder = tmp_path_factory.mktemp("report")
    space = folder / "space.yaml"
    varied = {
        "policy.optimizer_lr": {"low": 1e-6, "high": 1e-3, "log": True},
        "policy.dropout": {"low": 0.0, "high": 0.3},
        "policy.kl_weight": {"low": 1.0, "high": 100.0, "log": True},
    }
    content = {**ACT, "baseline": {**ACT["baseline"], "policy.dropout": 0.1}, "search": varied}
    space.write_text(yaml.safe_dump(content, sort_keys=False))
    common = [
        w
        for w in tiny_act(parts, folder / "run")
        if not w.startswith("--policy.") or "backbone" in w or "device" in w
    ]
    flags = (
        f"--space={space}",
        "--data.eval_episodes=[10,11]",
        "--max_eval_samples=8",
        "--steps=3",
        "--seed=10",
        "--tune.sampler=random",
        "--tune.scheduler=median",
        "--tune.max_concurrent=1",
    )
    assert search(*common, *flags, "--tune.num_samples=6", "--policy.optimizer_lr_backbone=1e-5") == 0
    return folder / "run"


def test_every_number_is_that_of_the_table(searched):
    page = Page(searched / "report.html").check()
    with (searched / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    head = re.findall(r"<th>(.*?)</th>", re.search("<thead>(.*?)</thead>", page.text)[1])
    assert [[row[name] for name in head] for row in rows] == page.trials
    assert {"trial", "state", "val/action_error", "policy.optimizer_lr"} <= set(head) and len(rows) == 6
    best = min((r for r in rows if r["state"] == "COMPLETE"), key=lambda r: float(r["val/action_error"]))
    assert f"<b>{float(best['val/action_error']):.4g}</b>" in page.text
    pruned = [r for r in rows if r["state"] == "PRUNED"]
    saved = sum(3 - int(r["steps"]) for r in pruned)
    assert pruned and f"{saved} of 18 steps" in page.text
    assert all(float(r["wall_s"]) > 0 for r in rows), "pruned ones took time as well"
    assert all(int(r["steps"]) == 3 for r in rows if r["state"] == "COMPLETE")


def test_sections(searched):
    """What a search, its best policy and its evaluation have to show."""
    (searched / "evaluation").mkdir()
    rollouts = {"env": "part_sorting", "episodes": 50, "success_rate": 0.5, "low": 0.366, "high": 0.634}
    content = {"results": {f"{searched}/best/checkpoint": {"simulator": rollouts}}}
    (searched / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    assert report.main([f"--output_dir={searched}"]) == 0
    page = Page(searched / "report.html").check()
    titles = re.findall(r"<h2>([^<]*)</h2>", page.text)
    for title in ("Best against the baseline", "In the simulator", "Learning curves", "What mattered", "Parameter by parameter",
                  "All at once", "Predicted against recorded actions", "Time and cost", "Trials", "How to reproduce"):  # fmt: skip
        assert title in titles
    assert "36.6% to 63.4%" in page.text and ">best/checkpoint<" in page.text and page.images == 6
    assert (
        page.text.count('class="line baseline"') == 4
    )  # of the curves and of the coordinates, wide and narrow
    assert "best/command.sh" in page.text
    assert "published" not in page.text, "the baseline is the user's own"
    again = unescape(re.search("python -m ray_jobs.tune .*?(?=</)", page.text, re.DOTALL)[0])
    flags, _ = read_flags(shlex.split(again.replace("\\\n", ""))[3:])
    check_search(flags)
    assert flags["output_dir"].endswith("-again") and flags["steps"] == "3"


def test_the_best_policy(searched, tmp_path):
    """Scored again it has the value that the search ranked it by, to the last digit; its card says what it is."""
    with (searched / "trials.csv").open(newline="") as file:
        values = {row["trial"]: float(row["val/action_error"]) for row in csv.DictReader(file)}
    best = read_json(searched / "summary.json")["best"]
    (ours,) = evaluated(tmp_path / "best", f"--checkpoint={searched / 'best' / 'checkpoint'}").values()
    assert ours["val/action_error"] == ours["reported"] == values[str(best["trial"])]
    kept = evaluated(tmp_path / "all", f"--checkpoint={searched}")
    assert {
        str(int(name.removeprefix("trial "))): r["val/action_error"] for name, r in kept.items()
    }.items() <= values.items()
    assert len(kept) == 3

    card = ModelCard.load(searched / "best" / "checkpoint" / "pretrained_model" / "README.md")
    assert card.data.library_name == "lerobot" and card.data.datasets == ["local/parts"]
    assert f"| val/action_error | {ours['val/action_error']:.4g} |" in card.text
    assert (
        "12 episodes" in card.text and "episodes [10, 11]" in card.text and "policy.optimizer_lr" in card.text
    )
    assert "baseline" in card.text and "published" not in card.text
    assert not list((searched / "trials").rglob("README.md")), "the trial's own checkpoint is left as it was"


def test_a_search_that_was_resumed_and_goes_on(searched, tmp_path):
    """What its summary says is of an earlier session: the page tells what the table does."""
    copy = shutil.copytree(searched, tmp_path / "run", symlinks=True)
    summary = read_json(copy / "summary.json")
    worst = max(
        (t for t in study_of(searched).trials if t.state.name == "COMPLETE"), key=lambda t: t.value
    ).number
    summary["best"]["trial"], summary["status"] = worst, "still going on"
    (copy / "summary.json").write_text(json.dumps(summary))
    text = (copy / "trials.csv").read_text()
    (copy / "trials.csv").write_text(text.replace("PRUNED", "RUNNING", 1))
    report.main([f"--output_dir={copy}"])
    page = Page(copy / "report.html").check()
    assert "still going on" in page.text and 'class="line running"' in page.text
    best = read_json(searched / "summary.json")["best"]
    assert f"trial {best['trial']}, the best" in page.text and best["trial"] != worst


def test_trials_of_two_searches(searched, tmp_path):
    """Each has its name, and of each trial the checkpoint that the search ranked it by."""
    other = shutil.copytree(searched, tmp_path / "other", symlinks=True)
    search = read_json(other / "search.json")
    search["flags"]["tune.metric"] = "val/loss"
    (other / "search.json").write_text(json.dumps(search))
    found = evaluation_run._find(f"{searched},{other}")
    assert len(found) == 6 and len({name.rpartition(" ")[2] for name in found}) == 3
    for name, (place, _) in found.items():
        wanted = "best" if name.startswith(f"{searched} ") else "last"
        run = (searched if wanted == "best" else other) / "trials" / name.rpartition(" ")[2]
        assert place == (run / "checkpoints" / wanted / "pretrained_model").resolve()


def test_a_search_without_a_finished_trial(searched, parts, tmp_path):
    space = searched / "search_spaces" / "act.yaml"
    flags = [w for w in tiny_act(parts, tmp_path / "run") if not w.startswith("--policy.") or "backbone" in w]
    more = ("--policy.device=cpu", "--steps=500", "--data.eval_episodes=[10]", "--max_eval_samples=4")
    with pytest.raises(RunError, match="the time was up before any trial was trained to its end"):
        search(*flags, *more, f"--space={space}", "--tune.num_samples=2", "--tune.time_budget_s=0.1")
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "time is up"
    assert report.main([f"--output_dir={tmp_path / 'run'}"]) == 0
    page = Page(tmp_path / "run" / "report.html").check()
    assert "No trial was trained to its end" in page.text


def test_a_single_training(parts, tmp_path):
    flags = tiny_act(parts, tmp_path / "run", "--steps=4", "--eval_steps=2", "--data.eval_episodes=[10]")
    trained([*flags, "--max_eval_samples=4"])
    assert report.main([f"--output_dir={tmp_path / 'run'}"]) == 0
    page = Page(tmp_path / "run" / "report.html").check()
    of_the_board = {}
    for event in events(next((tmp_path / "run").glob("events.out.tfevents.*"))):
        of_the_board |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    for record in read_metrics(tmp_path / "run"):
        for name, value in record.items():
            if name != "step" and not isinstance(value, list):
                assert of_the_board.pop((record["step"], name)) == pytest.approx(value, rel=1e-6)
    assert not of_the_board
    assert "training loss" in page.text and "target_closed" in page.text and page.images == 6
    assert "finished" in page.text and "4 of 4" in page.text
    again = unescape(re.search("python -m ray_jobs.train .*?(?=</)", page.text, re.DOTALL)[0])
    recipe = resolve(shlex.split(again.replace("\\\n", ""))[3:])
    assert recipe.output_dir == tmp_path / "run-again" and recipe.lerobot.steps == 4
    assert recipe.options.data.eval_episodes == [10] and recipe.lerobot.max_eval_samples == 4
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # it is resumed, and has not ended
        file.write(json.dumps({"step": 5, "train/loss": 1.0}) + "\n")
    (tmp_path / "run" / "evaluation-1").mkdir()
    (tmp_path / "run" / "evaluation-1" / "evaluation.json").write_text('{"results": {')
    assert report.main([f"--output_dir={tmp_path / 'run'}"]) == 0
    page = Page(tmp_path / "run" / "report.html").check()
    assert "not finished" in page.text and "5 of 4" not in page.text


def events(file: Path) -> list[Event]:
    """What TensorBoard reads: records of length (8 bytes), its checksum (4), an event, its checksum (4)."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_mistakes(tmp_path):
    for flags, message in (
        ([], "--output_dir: the folder of a search or of a training"),
        ([f"--output_dir={tmp_path / 'none'}"], "there is no such folder"),
        ([f"--output_dir={tmp_path}"], "no training has logged anything there"),
    ):
        with pytest.raises(InputError, match=message):
            report.main(flags)


def test_crosses_can_be_seen(searched):
    """Where trials were given up: by day and by night they are in a colour that is told from the paper (WCAG: 3 to 1)."""
    text = (searched / "report.html").read_text()
    (rule,) = re.findall(r"\.cross \{(.*?)\}", text)
    name, width = re.search(r"stroke: var\((.+?)\)", rule)[1], re.search(r"stroke-width: ([\d.]+)", rule)[1]
    assert 'class="cross' in text and float(width) >= 2
    colours = re.findall(rf"--paper: #(\w+);.*?{name}: #(\w+);", text, re.DOTALL)
    assert len(colours) == 2 and all(contrast(*pair) >= 3 for pair in colours), colours


def contrast(*colours: str) -> float:
    """Of two colours, as WCAG 2 has it."""

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser(searched, tmp_path, width):
    """No error on the console, nothing wider than the screen, and a click on a heading sorts; a screenshot is left."""
    page = (searched / "report.html").read_text()
    probe = """<script>
        const head = Array.from(document.querySelectorAll(".sortable th")).find(h => h.textContent === "val/action_error");
        head.click();
        const column = head.cellIndex, rows = Array.from(document.querySelector(".sortable tbody").rows);
        const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
        const charts = Array.from(document.querySelectorAll(".wide, .narrow")).filter(c => c.offsetHeight);
        const cut = charts.filter(c => c.scrollWidth > c.clientWidth || c.querySelector("svg").clientWidth < 300).length;
        document.title = JSON.stringify([wide, charts.length, cut, rows.map(row => row.cells[column].dataset.v)]);
        </script></body>"""
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe))
    common = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    how = [*common, f"--window-size={width},3000", f"--user-data-dir={tmp_path / 'profile'}"]
    asked = [*how, "--dump-dom", f"file://{tmp_path / 'probe.html'}"]
    result = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in result.stderr, result.stderr
    wide, charts, cut, values = json.loads(re.search("<title>(.*?)</title>", result.stdout)[1])
    assert wide == 0
    assert (charts, cut) == (2, 0), "learning curves and coordinates, each once, and whole"
    assert len(values) == 6 and values == sorted(values, key=float)
    shot = searched / f"report_{width}.png"
    subprocess.run(
        [*how, f"--screenshot={shot}", f"file://{searched / 'report.html'}"], capture_output=True, timeout=60
    )
    assert shot.stat().st_size > 50_000
