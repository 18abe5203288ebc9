"""A report: one HTML file that needs nothing else, for a search (`search.report`) or for a single training."""

import base64
import contextlib
import io
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from ray_jobs.config.errors import InputError
from ray_jobs.config.options import ASKED, OPTIONS_FILE
from ray_jobs.config.units import duration
from ray_jobs.reports.charts import Chart, short
from ray_jobs.storage.records import (
    METRIC,
    SUMMARY_FILE,
    Damaged,
    read_json,
    read_metrics,
    read_summary,
    write_json,
)

REPORT_FILE = "report.html"
DRAWN_FILE = ".predictions.json"  # what a policy predicts, as it was drawn: to open one takes half a minute
FRAME_WIDTH = 220  # pixels of a camera frame in a strip
PANELS = 32  # joints that are drawn
PREDICTIONS = 20  # that are timed
LARGEST_GB = 2  # policies that are opened to show what they predict


@dataclass
class Section:
    """Part of a page; what is empty is left out. `keys` explain colours: (CSS class, text)."""

    title: str
    texts: list[str] = field(default_factory=list)
    keys: list[tuple[str, str]] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    kind: str = ""
    wide: str = ""
    narrow: str = ""
    """The same, for a telephone's screen."""
    strips: list[tuple[str, list[str]]] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    trials: list[tuple[str, list[tuple[str, str, bool]]]] = field(default_factory=list)


def write(
    folder: Path, title: str, subtitle: str, warnings: list, tiles: list, sections: Sequence[Section | None]
) -> Path:
    """Write a folder's report in one step; returns the file."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        Path(__file__).with_name("page.html").read_text()
    )
    page = template.render(title=title, subtitle=subtitle, warnings=warnings, tiles=tiles, sections=sections)
    scratch = folder / f".{REPORT_FILE}.tmp"
    scratch.write_text(page)
    scratch.replace(folder / REPORT_FILE)
    return folder / REPORT_FILE


# ---------------------------------------------------------------------- sections of both kinds of page


def actions(folder: Path, checkpoint: Path, say: Callable[[str], None]) -> list[Section]:
    """What a checkpoint predicts for its first held-out episode, and what its cameras saw; as it was drawn before, if it is
    the same checkpoint."""
    files = {path.name: path.stat() for path in sorted(checkpoint.glob("*.safetensors"))}
    drawn_of = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}
    with contextlib.suppress(OSError, ValueError, TypeError):
        kept = read_json(folder / DRAWN_FILE, of=dict, sections=list)
        if kept["of"] == drawn_of:
            return [Section(**section) for section in kept["sections"]]
    sections = _draw_actions(checkpoint, sum(stat.st_size for stat in files.values()), say)
    if len(sections) > 1:  # else it could not be had
        with contextlib.suppress(OSError):
            write_json(folder / DRAWN_FILE, {"of": drawn_of, "sections": [asdict(s) for s in sections]})
    return sections


def _draw_actions(checkpoint: Path, size: int, say: Callable[[str], None]) -> list[Section]:
    """One section that says why, if it cannot be had: no held-out episodes, or the data has moved."""
    adapters = (checkpoint / "adapter_config.json").is_file()
    if adapters or size > LARGEST_GB * 1e9:
        why = "the policy is adapters on a large one" if adapters else f"the policy has {size / 1e9:.1f} GB"
        text = f"Not shown: {why}. `python -m ray_jobs.evaluate --checkpoint={shlex.quote(str(checkpoint))}` on a machine with a GPU draws it."
        return [Section("Predicted against recorded actions", [text])]
    say("drawing    what the best policy predicts: to open it takes half a minute, once")
    try:
        from ray_jobs.evaluation.trained import open_trained, score

        with contextlib.redirect_stdout(io.StringIO()):
            result, drawn = score(
                open_trained(str(checkpoint), checkpoint, {}), predictions=PREDICTIONS, say=lambda text: None
            )
    except Exception as error:  # whatever it is, the rest of the page is worth having
        return [Section("Predicted against recorded actions", [f"Not shown: {error}"])]
    seconds = (np.arange(len(drawn.recorded)) / drawn.fps).tolist()
    panels = []
    for dim, name in enumerate(drawn.names[:PANELS]):
        recorded = drawn.recorded[:, dim].tolist()
        shown = recorded + [v for _, chunk in drawn.chunks for v in chunk[:, dim].tolist()]
        chart = Chart(seconds, shown, title=name, x_label="seconds", width=320, height=190)
        chart.line(seconds, recorded, "recorded")
        for start, chunk in drawn.chunks:
            chart.line(seconds[start : start + len(chunk)], chunk[:, dim].tolist(), "predicted")
        panels.append(chart.svg())
    steps = list(range(1, len(result["over_horizon"]) + 1))
    grown = Chart(steps, [0.0, *result["over_horizon"]], title="Error over the prediction",
                  x_label="action of the prediction", y_label="error (std)")  # fmt: skip
    grown.line(steps, result["over_horizon"], "best")
    timing = result["inference_ms"]
    return [
        Section(
            "Predicted against recorded actions",
            [
                f"Held-out episode {drawn.episode}: each prediction starts from a recorded observation. It is prediction, "
                "not closed-loop control."
            ],
            keys=[("recorded", "recorded"), ("predicted", "predicted")],
            figures=panels,
            kind="small",
            strips=[(camera, [_image(frame) for frame in frames]) for camera, frames in drawn.strips.items()],
        ),
        Section(
            "Errors and speed of this policy",
            [
                f"Mean absolute error over {result['horizon']} actions, {len(result['episodes'])} held-out episodes, "
                f"{result['frames']} frames. A prediction takes {timing['p50']:.3g} ms (95 % within {timing['p95']:.3g} ms) "
                f"at batch size 1 on the machine that wrote this, {result['real_time_factor']:.3g} times real time."
            ],
            figures=[grown.svg()],
            head=["joint", "error (data's unit)", "standard deviation", "error in std"],
            rows=[
                [j["joint"], *(short(j[key]) for key in ("error", "std", "error_in_std"))]
                for j in result["joints"]
            ],
        ),
    ]


def in_simulator(folder: Path) -> list[Section]:
    """Success rates that `ray_jobs.evaluate` has left in the folder."""
    rows = []
    for file in sorted(folder.glob("evaluation*/evaluation.json")):
        with contextlib.suppress(
            ValueError, LookupError, AttributeError, TypeError
        ):  # not one of ours, or half written
            for name, result in read_json(file)["results"].items():
                if found := result.get("simulator"):
                    rows.append([_within(folder, name), found["env"], str(found["episodes"]),
                                 f"{found['success_rate']:.1%}", f"{found['low']:.1%} to {found['high']:.1%}"])  # fmt: skip
    head = ["policy", "environment", "episodes", "success", "95 % interval (Wilson)"]
    return [Section("In the simulator", head=head, rows=rows)] if rows else []


def _within(folder: Path, name: str) -> str:
    """A path that lies in the folder, as seen from there."""
    path = Path(name).absolute()
    if path == folder.absolute():
        return folder.name
    return str(path.relative_to(folder.absolute())) if path.is_relative_to(folder.absolute()) else name


def reproduce(commands: list[str], more: Sequence[list[str]] = ()) -> Section:
    """The commands, and the versions that they ran under."""
    rows = [["Python", platform.python_version()]]
    for name in ("ray-jobs", "lerobot", "torch", "ray", "optuna"):
        with contextlib.suppress(PackageNotFoundError):
            rows.append([name, version(name)])
    return Section("How to reproduce", commands=commands, head=["", ""], rows=[*more, *rows])


def _image(frame: np.ndarray) -> str:
    image = Image.fromarray(frame)
    image.thumbnail((FRAME_WIDTH, FRAME_WIDTH))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


# ---------------------------------------------------------------------- a single training


def _typed(folder: Path) -> dict[str, str]:
    """The flags that a run was begun with."""
    if not (folder / OPTIONS_FILE).is_file():
        return {}
    members: dict[str, Any] = {ASKED: dict | None}
    asked = read_json(folder / OPTIONS_FILE, **members).get(ASKED) or {}
    typed = asked.get("typed") or {}
    if not isinstance(typed, dict):
        raise Damaged(folder / OPTIONS_FILE, "it does not say what was typed")
    return typed


def write_run(folder: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """The report of a single training, finished or not.

    Args:
        say: Is told what takes long.

    Raises:
        InputError: There is no training in the folder, or a file of it is damaged.
    """
    records = read_metrics(folder)
    if not records:
        raise InputError(f"--output_dir={folder}: no training has logged anything there (metrics.jsonl).")
    numbers = {"step": int, "steps": int, "num_workers": int, "global_batch_size": int, "wall_s": int | float}
    summary = read_summary(folder, last=dict, **numbers)
    if summary and summary["best"] and not {METRIC, "step"} <= summary["best"].keys():
        raise Damaged(folder / SUMMARY_FILE, f"its best is {summary['best']}")
    if records[-1]["step"] > summary.get("step", 0):
        summary = {}  # of an earlier session: the run has gone on since
    charts = []
    for key, label in (
        ("train/loss", "training loss"),
        ("val/loss", "validation loss"),
        ("val/action_error", "action error (std), held out"),
        ("env/success_rate", "success rate in the simulator"),
        ("train/lr", "learning rate"),
        ("train/samples_per_s", "samples per second"),
    ):
        points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
        if points:
            steps, values = map(list, zip(*points, strict=True))
            chart = Chart(steps, values, title=label, x_label="step")
            chart.line(steps, values, "best")
            for step, value in points if len(points) < 60 else ():
                chart.dot(step, value, "best", f"step {step}: {short(value)}", 2.5)
            charts.append(chart.svg())
    best, last = summary.get("best") or {}, summary.get("last", {})
    tiles = [("steps", f"{records[-1]['step']}" + (f" of {summary['steps']}" if summary else ""), "")]
    if best:
        tiles.append(("best action error", short(best[METRIC]), f"std, at step {best['step']}"))
    if "train/loss" in last:
        tiles.append(("training loss", short(last["train/loss"]), "at the end"))
    if summary:
        batch = f"{summary['num_workers']} worker(s), batch {summary['global_batch_size']}"
        tiles.append(("time", duration(summary["wall_s"]), batch))
    sections = [Section("Curves", figures=charts)]
    places = (folder / "checkpoints" / name / "pretrained_model" for name in ("best", "last"))
    checkpoint = next((place for place in places if place.is_dir()), None)
    sections += in_simulator(folder)
    if checkpoint:
        sections += actions(folder, checkpoint, say)
    facts = [
        [key.replace("_", " "), short(value)]
        for key, value in summary.items()
        if isinstance(value, int | float | str) and key not in ("output_dir", "checkpoint", "status")
    ]
    commands = []
    if typed := _typed(folder):
        again = [f"--{name}={value}" for name, value in (typed | {"output_dir": f"{folder}-again"}).items()]
        commands.append("python -m ray_jobs.train \\\n    " + " \\\n    ".join(map(shlex.quote, again)))
    if checkpoint is not None:
        commands.append(f"python -m ray_jobs.evaluate --checkpoint={shlex.quote(str(folder))}")
    sections.append(reproduce(commands, facts))
    subtitle = f"{summary.get('policy', '')} on {summary.get('dataset', '')}, {summary.get('status', 'not finished')}"
    return write(folder, f"Training {folder.name}", subtitle, [], tiles, sections)
