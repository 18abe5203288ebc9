"""What an evaluation leaves behind, and its last screen."""

import csv
import shlex
from pathlib import Path

from ray_jobs.config.units import duration
from ray_jobs.evaluation.pictures import errors
from ray_jobs.storage.records import write_json

RESULTS = "evaluation.json"


def write(target: Path, results: dict[str, dict], argv: list[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "ray_jobs.evaluate", *argv])
    content = {"command": command, "results": results}
    write_json(target / RESULTS, content)
    scored = {name: result for name, result in results.items() if "joints" in result}
    tables = {
        "checkpoints.csv": [_row(name, result) for name, result in results.items()],
        "joints.csv": [{"name": name, **joint} for name, r in scored.items() for joint in r["joints"]],
        "horizon.csv": [
            {"name": name, "action": number, "error_in_std": error}
            for name, r in scored.items()
            for number, error in enumerate(r["over_horizon"], 1)
        ],
        "episodes.csv": [
            {"name": name, **episode}
            for name, r in results.items()
            if "simulator" in r
            for episode in r["simulator"]["per_episode"]
        ],
    }
    for name, rows in tables.items():
        if rows:
            with (target / name).open("w", newline="") as file:
                table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
                table.writeheader()
                table.writerows(rows)
    if scored:
        errors(scored, target / "errors.png")


def _row(name: str, result: dict) -> dict:
    """One line about a checkpoint."""
    keys = (
        "checkpoint",
        "policy",
        "step",
        "horizon",
        "frames",
        "val/action_error",
        "val/loss",
        "real_time_factor",
    )
    row = {"name": name, **{key: result.get(key) for key in keys}}
    row |= {f"inference_{key}_ms": result.get("inference_ms", {}).get(key) for key in ("p50", "p95")}
    return row | {
        key: result.get("simulator", {}).get(key) for key in ("success_rate", "low", "high", "episodes")
    }


def last_screen(target: Path, results: dict[str, dict]) -> None:
    for name, result in results.items():
        print(f"\n{name}")
        if "joints" in result:
            reported = result["reported"]
            same = "" if reported is None else (
                ", as the training reported" if reported == result["val/action_error"]
                else f"; the training reported {reported:.6g}"
            )  # fmt: skip
            print(
                f"  error     val/action_error {result['val/action_error']:.6g} std over {result['horizon']} actions, "
                f"{len(result['episodes'])} episodes, {result['frames']} frames{same}"
            )
            worst = sorted(result["joints"], key=lambda joint: -(joint["error_in_std"] or 0))[:3]
            print(
                "  largest   "
                + ", ".join(f"{j['joint']} {j['error']:.3g}" for j in worst)
                + " (data's units)"
            )
            times = result["inference_ms"]
            print(
                f"  inference {times['p50']:.3g} ms, 95 % within {times['p95']:.3g} ms; "
                f"{result['actions_per_prediction']} actions at {result['fps']} fps: "
                f"{result['real_time_factor']:.3g} times real time"
            )
        if "simulator" in result:
            in_it = result["simulator"]
            print(
                f"  {in_it['env']}: success {in_it['success_rate']:.1%} of {in_it['episodes']} episodes "
                f"(95 %: {in_it['low']:.1%} to {in_it['high']:.1%}) in {duration(in_it['wall_s'])}"
            )
    horizons = {result["horizon"] for result in results.values() if "horizon" in result}
    if len(horizons) > 1:
        print(
            f"\nmind        the errors are over {sorted(horizons)} actions, which is not the same; "
            f"--data.eval_horizon={min(horizons)} compares them"
        )
    print(f"\nleft        {target}")
