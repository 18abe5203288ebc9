"""report.html of a search, from what lies in its folder: trials.csv, summary.json, the trials' metrics, the best
checkpoint. Every number in it stands in one of these, so it can be written again at any time."""

import csv
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path

from ray_jobs.config.units import duration
from ray_jobs.reports.charts import Chart, bars, parallel, short
from ray_jobs.reports.page import Section, actions, in_simulator, reproduce, write
from ray_jobs.search.files import (
    BEST_DIR,
    COMMAND_FILE,
    GOING_ON,
    SEARCH_FILE,
    TRIALS_FILE,
    read_search,
    trial_dir,
    trial_name,
)
from ray_jobs.search.options import MORE_IS_BETTER
from ray_jobs.storage.records import SUCCESS, SUMMARY_FILE, Damaged, parse_json, read_metrics, read_summary

FIXED_COLUMNS = ("trial", "state", "best_step", "steps", "wall_s", "baseline", "other_seeds", "reason")
SLICES = 6  # parameters that are shown one by one
NARROW = 400  # pixels, of what a telephone shows
KINDS = {  # of trials, in the order in which they are drawn: those that matter come last
    "pruned": "pruned",
    "fail": "failed",
    "running": "running",
    "other": "trained in full",
    "baseline": "baseline",
    "best": "best",
}


class Found:
    """What a search's folder tells.

    `rows` are those of trials.csv; `best` and `baseline` are rows, or None; `searched` are the parameters that differ
    between trials, the most important first; `higher` is whether more of the metric is better.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        asked = read_search(folder)
        self.flags = asked.flags
        self.summary = _summary(folder)
        if self.summary.get("status") == GOING_ON:  # it was resumed: what it had found is not the last word
            self.summary = {}
        self.metrics = self.summary["metric"].split(",") if self.summary else asked.metrics
        self.metric = self.metrics[0]
        self.higher = self.metric in MORE_IS_BETTER
        self.rows = _table_of(folder, self.metrics)
        if not self.flags.get("steps", "").isdigit():
            raise Damaged(folder / SEARCH_FILE, f"its steps are {self.flags.get('steps')!r}")
        self.steps = int(self.flags["steps"])
        finished = sorted(
            (r for r in self.rows if r["state"] == "COMPLETE" and r[self.metric]),
            key=lambda r: float(r[self.metric]),
            reverse=self.higher,
        )
        chosen = (self.summary.get("best") or {}).get("trial")
        self.best = next(
            (r for r in finished if r["trial"] == str(chosen)), finished[0] if finished else None
        )
        bases = [r for r in finished if r["baseline"] == "True"]
        self.baseline = next(
            (r for r in bases if self.best and r.get("policy.type") == self.best.get("policy.type")), None
        )
        self.baseline = self.baseline or (bases[0] if bases else None)
        parameters = [
            c for c in (self.rows[0] if self.rows else {}) if c not in (*FIXED_COLUMNS, *self.metrics)
        ]
        differing = [c for c in parameters if len({r[c] for r in self.rows}) > 1]
        shares = self.summary.get("importances") or {}
        tied = {c for c in differing if c not in shares and any(
            all(r[c] == r[other] for r in self.rows) for other in shares)}  # fmt: skip
        self.searched = sorted((c for c in differing if c not in tied), key=lambda c: -shares.get(c, 0))

    def value(self, row: dict) -> float | None:
        """A trial's value; of one with several seeds, that of the first."""
        return float(row[self.metric]) if row[self.metric] else None

    def seeds(self, row: dict) -> list[float]:
        return [self.value(row), *json.loads(row["other_seeds"] or "{}").values()]

    def kind(self, row: dict) -> str:
        """The CSS class of a trial."""
        if row is self.best:
            return "best"
        if row is self.baseline:
            return "baseline"
        return {"COMPLETE": "other", "PRUNED": "pruned", "FAIL": "fail"}.get(row["state"], "running")

    def tip(self, row: dict) -> str:
        return f"trial {row['trial']}, {row['state'].lower()}: {self.metric} {short(self.value(row))}"

    def back_to_front(self) -> list[dict]:
        """Trials in the order in which they are drawn."""
        order = list(KINDS)
        return sorted((r for r in self.rows if r[self.metric]), key=lambda r: order.index(self.kind(r)))

    def keys(self) -> list[tuple[str, str]]:
        """The kinds of trials that are drawn, and what they are called."""
        there = {self.kind(row) for row in self.back_to_front()}
        return [(kind, KINDS[kind]) for kind in reversed(KINDS) if kind in there]


def _summary(folder: Path) -> dict:
    """Raises Damaged if it is no search's."""
    what = {"metric": str, "wall_s": int | float, "importances": dict | None, "each_trial": dict | None}
    summary = read_summary(folder, **what, repeats=dict | None, front=list | None)
    for row in [summary.get("best") or {}, *(summary.get("front") or [])]:
        if not isinstance(row, dict):
            raise Damaged(folder / SUMMARY_FILE, f"its front has {row!r} in it")
    return summary


def _table_of(folder: Path, metrics: list[str]) -> list[dict[str, str]]:
    """The rows of trials.csv.

    Raises:
        Damaged: It is not as we have written it.
    """
    file = folder / TRIALS_FILE
    if not file.is_file():
        return []
    try:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        for row in rows:
            int(row["trial"])
            for name in ("best_step", "steps", "wall_s", *metrics):
                if not math.isfinite(float(row[name] or 0)):  # of an older version
                    row[name] = ""
            parse_json(row["other_seeds"] or "{}")
            if None in row or None in row.values():
                raise ValueError(f"trial {row['trial']} has not as many values as there are columns")
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise Damaged(file, error) from None
    return rows


def write_search(folder: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Write a search's report; returns the file.

    Args:
        say: Is told what takes long.

    Raises:
        Damaged: A file of the search is.
    """
    found = Found(folder)
    warnings = []
    if not found.best:
        reasons = sorted({r["reason"] for r in found.rows if r["reason"]})
        warnings.append("No trial was trained to its end, so there is no best one yet.")
        warnings += [f"Failed: {reason}" for reason in reasons[:5]]
    sections: list[Section | None] = [_against_baseline(found, found.best)] if found.best else []
    sections += in_simulator(folder)
    sections += [_curves(found), _importances(found), _slices(found), _parallel(found), _front(found)]
    if found.best:
        sections += _actions(found, say)
    sections += [_cost(found), _table(found), _reproduce(found)]
    policy = ", ".join(sorted({r["policy.type"] for r in found.rows if r.get("policy.type")}))
    status = found.summary.get("status", GOING_ON)
    subtitle = f"{policy or 'a policy'} on {found.flags.get('dataset.repo_id', '')}, {status}"
    return write(
        folder,
        f"Search {found.summary.get('study', folder.name)}",
        subtitle,
        warnings,
        _tiles(found),
        [s for s in sections if s],
    )


def _tiles(found: Found) -> list[tuple[str, str, str]]:
    states = [r["state"] for r in found.rows]
    counts = (
        (n, states.count(s))
        for n, s in (
            ("in full", "COMPLETE"),
            ("pruned", "PRUNED"),
            ("failed", "FAIL"),
            ("running", "RUNNING"),
        )
    )
    tiles = [
        ("trials", str(len(found.rows)), ", ".join(f"{count} {name}" for name, count in counts if count))
    ]
    if found.best:
        mean = _mean(found.seeds(found.best))
        tiles.insert(0, (found.metric, short(mean), f"trial {found.best['trial']}, the best"))
        if found.baseline:
            theirs = _mean(found.seeds(found.baseline))
            change = f"{mean / theirs - 1 if theirs else 0.0:+.1%}"
            if found.higher:
                change = f"{100 * (mean - theirs):+.1f} points"
            tiles.insert(1, ("against the baseline", change, f"it has {short(theirs)}"))
    if "wall_s" in found.summary:
        tiles.append(("time", duration(found.summary["wall_s"]), f"{found.steps} steps in full"))
    if saved := _saved_steps(found):
        share = saved / (found.steps * len(found.rows))
        tiles.append(
            ("saved by pruning", f"{share:.0%}", f"{saved} of {found.steps * len(found.rows)} steps")
        )
    return tiles


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _saved_steps(found: Found) -> int:
    return sum(found.steps - int(r["steps"] or 0) for r in found.rows if r["state"] == "PRUNED")


# ---------------------------------------------------------------------- sections


def _against_baseline(found: Found, best: dict[str, str]) -> Section:
    baseline = found.baseline
    both = [("best", best)] + ([("baseline", baseline)] if baseline and baseline is not best else [])
    values = [v for _, row in both for v in found.seeds(row)]
    names = [name for name, _ in both]
    chart = Chart(
        values, names, title=found.metric, x_label=found.metric, width=480, height=70 + 44 * len(both)
    )
    for name, row in both:
        for value in found.seeds(row):
            chart.dot(value, name, found.kind(row), f"trial {row['trial']}: {short(value)}", 5)
    seeds = max(len(found.seeds(row)) for _, row in both)
    on = (
        "in the same episodes of the simulator"
        if found.metric == SUCCESS
        else "on the same held-out episodes"
    )
    texts = [f"Both were trained for the same number of steps and scored {on}."]
    if not baseline:
        texts = ["The baseline (trial 0) was not trained to its end."]
    texts.append(
        f"Each dot is one of {seeds} seeds." if seeds > 1
        else "One seed each, so this says nothing about chance: --tune.seeds=3 does."
    )  # fmt: skip
    if baseline is best:
        texts = ["The baseline is the best that was found."]
    rows = [
        [c, short(_number(best[c])), *([short(_number(baseline[c]))] if baseline else [])]
        for c in found.searched
        if not baseline or best[c] != baseline[c]
    ]
    head = ["parameter", "best", *(["baseline"] if baseline else [])]
    return Section("Best against the baseline", texts, figures=[chart.svg()], head=head, rows=rows)


def _curves(found: Found) -> Section | None:
    curves = {}
    for row in found.back_to_front():
        records = read_metrics(trial_dir(found.folder, trial_name(int(row["trial"]))))
        known = (r for r in records if isinstance(r.get(found.metric), int | float))
        curves[row["trial"]] = [(r["step"], r[found.metric]) for r in known]
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return None

    def draw(width: int) -> str:
        steps, values = zip(*points, strict=True)
        chart = Chart(steps, values, title=f"{found.metric} of all trials",
                      x_label="step", y_label=found.metric, width=width, height=400)  # fmt: skip
        for row in found.back_to_front():
            if curve := curves[row["trial"]]:
                steps, values = zip(*curve, strict=True)
                chart.line(steps, values, found.kind(row), found.tip(row))
        for row in found.back_to_front():  # on top of all lines
            if curve := curves[row["trial"]]:
                mark = chart.cross if row["state"] == "PRUNED" else chart.dot
                mark(*curve[-1], found.kind(row), found.tip(row))
        return chart.svg()

    texts = [
        "A cross marks where a trial was given up. A finger or the mouse on a line tells which trial it is."
    ]
    return Section("Learning curves", texts, found.keys(), wide=draw(960), narrow=draw(NARROW))


def _importances(found: Found) -> Section | None:
    shares = found.summary.get("importances")
    if not shares:
        return None
    text = (
        "Optuna's PED-ANOVA: how the best fifth of the trials differ from all within these ranges. Of pruned trials the one "
        "that got further counts as better. With few trials it is a rough guess."
    )
    return Section("What mattered", [text], figures=[bars(shares, "share of the importance")])


def _slices(found: Found) -> Section | None:
    figures = []
    for column in found.searched[:SLICES]:
        rows = [r for r in found.back_to_front() if r[column]]
        if len(rows) < 2:
            continue
        xs, ys = [_number(r[column]) for r in rows], [found.value(r) for r in rows]
        chart = Chart(xs, ys, title=column, y_label=found.metric, width=320, height=220, log_x=None)
        for row, x, y in zip(rows, xs, ys, strict=True):
            chart.dot(x, y, found.kind(row), f"{column}={short(x)}, {found.tip(row)}")
        figures.append(chart.svg())
    text = "Pruned trials (hollow) stand at the value they were stopped with."
    return Section("Parameter by parameter", [text], found.keys(), figures, "small") if figures else None


def _parallel(found: Found) -> Section | None:
    rows, chosen = found.back_to_front(), found.searched[:SLICES]
    if len(rows) < 2 or not chosen:
        return None
    columns = {c: [_number(r[c]) if r[c] else None for r in rows] for c in chosen}
    columns[found.metric] = [found.value(r) for r in rows]
    lines = [(n, found.kind(r), found.tip(r)) for n, r in enumerate(rows)]
    title, few = "Parallel coordinates", {c: columns[c] for c in (*chosen[:2], found.metric)}
    wide, narrow = parallel(columns, lines, title), parallel(few, lines, title, NARROW)
    return Section("All at once", keys=found.keys(), wide=wide, narrow=narrow)


def _front(found: Found) -> Section | None:
    if len(found.metrics) < 2:
        return None
    x, y = found.metrics[:2]
    rows = [r for r in found.rows if r["state"] == "COMPLETE" and r[x] and r[y]]
    if not rows:
        return None
    front = {row["trial"] for row in found.summary.get("front", ())}
    chart = Chart(
        [float(r[x]) for r in rows], [float(r[y]) for r in rows], title="Pareto front", x_label=x, y_label=y
    )
    on_it = sorted((float(r[x]), float(r[y])) for r in rows if int(r["trial"]) in front)
    if on_it:
        xs, ys = zip(*on_it, strict=True)
        chart.line(xs, ys, "best")
    for row in rows:
        kind = "best" if int(row["trial"]) in front else found.kind(row)
        chart.dot(
            float(row[x]),
            float(row[y]),
            kind,
            f"trial {row['trial']}: {short(float(row[x]))}, {short(float(row[y]))}",
        )
    text = "No trial is better than one of these in one metric without being worse in another."
    return Section("Trade-off", [text], [("best", "on the front")], [chart.svg()])


def _actions(found: Found, say: Callable[[str], None]) -> list[Section]:
    checkpoint = found.folder / BEST_DIR / "checkpoint" / "pretrained_model"
    if not checkpoint.is_dir():
        return [
            Section("Predicted against recorded actions", ["Not shown: the best trial left no checkpoint."])
        ]
    return actions(found.folder, checkpoint, say)


def _cost(found: Found) -> Section:
    trained = sum(int(r["steps"] or 0) for r in found.rows)
    busy = sum(float(r["wall_s"] or 0) for r in found.rows)
    each, repeats = found.summary.get("each_trial", {}), found.summary.get("repeats")
    rows = [
        ["steps trained", str(trained)],
        ["steps of all trials in full", str(found.steps * len(found.rows))],
        ["steps saved by pruning", str(_saved_steps(found))],
        ["hours of trials, added up", f"{busy / 3600:.2f}"],
    ]
    if repeats:
        busy += repeats["wall_s"]
        rows.append(["steps of finalists under other seeds", str(repeats["steps"])])
        rows.append(["hours, these included", f"{busy / 3600:.2f}"])
    if each.get("gpus"):
        rows.append(["GPU hours", f"{busy * each['gpus'] / 3600:.2f}"])
    if each:
        rows.append(["CPU hours", f"{busy * each['cpus'] / 3600:.2f}"])
    if "wall_s" in found.summary:
        rows.append(["from begin to end", duration(found.summary["wall_s"])])
    return Section("Time and cost", head=["", ""], rows=rows)


def _table(found: Found) -> Section:
    head = ["trial", "state", *found.metrics, "best_step", "steps", "wall_s", *found.searched, "reason"]
    trials = [
        (
            found.kind(row),
            [(short(_number(row[c])), row[c], isinstance(_number(row[c]), int | float)) for c in head],
        )
        for row in found.rows
    ]
    text = f"As in {TRIALS_FILE}, which has all digits and all parameters. A click on a heading sorts."
    return Section("Trials", [text], head=head, trials=trials)


def _reproduce(found: Found) -> Section:
    names = ("output_dir", "tune.study_name")  # of another search
    flags = found.flags | {n: f"{found.flags[n]}-again" for n in names if n in found.flags}
    words = [f"--{name}={shlex.quote(value)}" for name, value in flags.items()]
    commands = ["# the search\npython -m ray_jobs.tune \\\n    " + " \\\n    ".join(words)]
    script = found.folder / BEST_DIR / COMMAND_FILE
    if script.is_file():
        commands.append("# the best configuration, trained in full (best/command.sh)\n" + script.read_text())
    return reproduce(commands)


def _number(text: str) -> int | float | str:
    """A cell of trials.csv: a number if it is one."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text
