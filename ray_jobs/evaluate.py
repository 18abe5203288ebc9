"""Score trained policies: on held-out episodes, and in a simulator.

    python -m ray_jobs.evaluate --checkpoint=outputs/act
    python -m ray_jobs.evaluate --checkpoint=outputs/act --env.type=part_sorting --eval.n_episodes=50

`--checkpoint` is a run's folder (its best checkpoint, else its last), a checkpoint, a `pretrained_model` folder, a
search (all trials that keep checkpoints), a run's or a search's address in a bucket, or several of these with commas. What
was held out, and how it is compared, is what the training said: the value is the one that it reported, to the last digit.

    --output_dir=FOLDER            for results and pictures; a new one under outputs/ if left out
    --dataset.* --data.*           other data, or other episodes: --data.eval_episodes='[18,19]'
    --max_eval_samples=N           score N frames, spread over the episodes; 0 scores all
    --env.* --eval.* --seed=1000   as in lerobot-eval, with --eval.n_episodes spread over Ray's workers
    --rename_map, --policy.device, --assets.dir, --tolerance_s, --num_workers as in ray_jobs.train
    --ray.num_workers=N            workers for the simulator; 0 runs it in this process; by default what the cluster holds
"""

import contextlib
import csv
import itertools
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.checks.output_dir import check_output_dir
from ray_jobs.cli.command_line import listed, parse_options, read_flags
from ray_jobs.cli.flags import as_arguments, check_flags
from ray_jobs.cli.terminal import OUTPUT_EVERY_S, doing, no_garbage_collection, quiet
from ray_jobs.cluster import connect
from ray_jobs.cluster.job import run_job
from ray_jobs.config.errors import InputError, all_mistakes
from ray_jobs.config.units import duration
from ray_jobs.search.files import SEARCH_FILE, TRIALS_DIR, read_search

if TYPE_CHECKING:
    from ray_jobs.evaluation.trained import Trained
    from ray_jobs.training.simulator import SimulatorOptions

GROUPS = ("dataset.", "data.", "env.", "eval.", "ray.", "assets.")
FLAGS = ("rename_map", "max_eval_samples", "seed", "policy.device", "tolerance_s", "num_workers")
MADE_OF = (
    "config.json",
    "pretrained_model",
    "checkpoints",
    "best",
)  # what is in a folder that means a checkpoint
VIDEOS = 4  # of the first episodes in a simulator
RESULTS = "evaluation.json"
OTHERWISE_SCORED = ("data.eval_episodes", "data.eval_horizon", "dataset.eval_split", "max_eval_samples")


def main(argv: list[str]) -> int:
    """Score each checkpoint, write the results, and say them. Returns the exit status."""
    quiet()
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    flags, notices = read_flags(argv)
    checkpoint, output_dir = flags.pop("checkpoint", None), flags.pop("output_dir", None)
    in_simulator = any(name.startswith("env.") for name in flags)
    _check(checkpoint, output_dir, flags, in_simulator)
    if (
        in_simulator
        and parse_options({k: v for k, v in flags.items() if k.startswith("ray.")}).ray.num_workers
    ):
        connect.start(flags.get("ray.address"))
    doing("importing LeRobot")
    with no_garbage_collection():
        from ray_jobs.evaluation import trained as trained_module
        from ray_jobs.storage.bucket import local_folder
    doing("reading the checkpoint")
    simulator = _simulator(flags) if in_simulator else None
    target = local_folder(output_dir, "output_dir") if output_dir else None
    if target:
        check_output_dir(target)
    found = _find(checkpoint)
    policies = []
    for name, (folder, fetch) in found.items():
        policies.append(trained_module.open_trained(name, folder, flags))
        policies[-1].fetch = fetch
    if simulator:
        from ray_jobs.training.simulator import SimulatorOptions, check

        for one in policies:
            cfg = one.recipe.lerobot
            notices += [f"{one.name}: {text}" for text in check(simulator, cfg.policy, cfg.rename_map)]
            seen = SimulatorOptions(simulator.env, cfg.eval) if cfg.env and cfg.env_eval_freq > 0 else None
            if seen and abs(simulator.seed - seen.seed) < cfg.eval.n_episodes:
                notices.append(
                    f"{one.name}: its training has looked at the first {cfg.eval.n_episodes} of these episodes; "
                    f"--seed={seen.seed + cfg.eval.n_episodes} takes others."
                )
    for notice in notices:
        print(notice)
    results = {}
    target = target or _new_folder(Path("outputs"))
    try:
        for one in policies:
            _evaluate(one, flags, simulator, target, results)
    finally:
        doing("")
        if results:  # what is done stays, whatever became of the next
            _write(target, results, argv)
        elif output_dir is None:
            with contextlib.suppress(OSError):  # something is in it
                target.rmdir()
    _last_screen(target, results)
    return 0


def _check(checkpoint: str | None, output_dir: str | None, flags: dict[str, str], in_simulator: bool) -> None:
    """Find the command line's mistakes before anything is imported."""
    with all_mistakes() as mistakes:
        if not listed(checkpoint or ""):
            mistakes.append("--checkpoint is missing: what to evaluate, as in --checkpoint=outputs/act.")
        for word in listed(checkpoint or ""):
            if "://" in word:
                continue
            if not Path(word).exists():
                mistakes.append(f"--checkpoint={word}: there is no checkpoint, nor such a folder.")
            elif (Path(word) / SEARCH_FILE).is_file():
                mistakes.of(partial(read_search, word))
            elif not any((Path(word) / name).exists() for name in MADE_OF):
                mistakes.append(f"--checkpoint={word}: there is no checkpoint in it.")
        if not in_simulator and (idle := [n for n in flags if n == "seed" or n.startswith("eval.")]):
            mistakes.append(f"--{idle[0]} is of a simulator, which --env.type names.")
        if mistakes.of(lambda: check_flags(flags)):
            for name in flags:
                if not name.startswith(GROUPS) and name not in FLAGS and "discover_packages_path" not in name:
                    mistakes.append(f"--{name} has no effect on a trained policy; --help lists what has.")
        if output_dir and "://" not in output_dir:
            mistakes.of(lambda: check_output_dir(Path(output_dir)))


def _simulator(flags: dict[str, str]) -> "SimulatorOptions":
    import draccus

    import ray_jobs.part_sorting  # noqa: F401  (registers --env.type=part_sorting)
    from ray_jobs.cli.parse_errors import parse
    from ray_jobs.training.simulator import SimulatorOptions, check_eval

    if "env.type" not in flags:
        name = next(name for name in flags if name.startswith("env."))
        raise InputError(f"--env.type is missing: --{name} alone does not say of which env.")
    ours = {k: v for k, v in flags.items() if k.startswith(("env.", "eval.")) or k == "seed"}
    words = as_arguments({k: v for k, v in ours.items() if "discover_packages_path" not in k})
    options = parse(lambda: draccus.parse(SimulatorOptions, args=words), flags)
    check_eval(options.eval)
    return options


def _new_folder(parent: Path) -> Path:
    """The next folder that is not there. It is made at once: another evaluation may look for one at the same time."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (parent / f"evaluation-{number}").mkdir()
            return parent / f"evaluation-{number}"


def _find(checkpoint: str) -> dict[str, tuple[Path, Callable[[], Path] | None]]:
    """`pretrained_model` folders by a short name, each with what has brought it here, if it lies in a bucket."""
    from ray_jobs.search.bucket_copy import bring
    from ray_jobs.search.trial import ranked_checkpoint
    from ray_jobs.storage.bucket import is_uri
    from ray_jobs.training.checkpoint import pretrained_dir

    found = {}
    words = listed(checkpoint)
    for word in words:
        fetch = partial(bring, word) if is_uri(word) else None
        path = fetch() if fetch else Path(word)
        if (path / SEARCH_FILE).is_file():
            metrics = read_search(path).metrics
            ranked = {t: ranked_checkpoint(t, metrics) for t in sorted((path / TRIALS_DIR).glob("*"))}
            kept = {trial.name: place for trial, place in ranked.items() if place}
            if not kept:
                raise InputError(f"--checkpoint={word}: no trial of this search has a checkpoint (yet).")
            of_which = f"{word} " if len(words) > 1 else ""
            for name, place in kept.items():
                found[f"{of_which}trial {name}"] = pretrained_dir(place), fetch
        else:
            found[word] = pretrained_dir(path, word), fetch
    return found


def _evaluate(
    one: "Trained", flags: dict, simulator: "SimulatorOptions | None", target: Path, results: dict[str, dict]
) -> None:
    """Put all about one checkpoint into `results`, as soon as it is known; writes its pictures and videos."""
    from ray_jobs.evaluation.pictures import predicted_against_recorded
    from ray_jobs.evaluation.trained import score

    print(f"{one.name}: {one.recipe.lerobot.policy.type}" + (f", step {one.step}" if one.step else ""))
    name = one.name if ".." not in Path(one.name).parts else str(Path(one.name).resolve())
    folder = target / name.replace("://", "_").replace(" ", "-").strip("/").replace("/", "_")
    result: dict = {"checkpoint": str(one.folder), "policy": one.recipe.lerobot.policy.type, "step": one.step}
    if one.recipe.lerobot.dataset.repo_id:
        doing("scoring it on recorded episodes")
        try:
            result, drawn = score(one, say=print)
        except InputError as error:
            # Only the simulator may have been asked for: nothing was held out, or the data is elsewhere.
            if simulator is None or any(name.startswith(("dataset.", "data.")) for name in flags):
                raise
            print(f"not scored on recorded episodes: {error}")
        else:
            results[one.name] = result
            folder.mkdir(parents=True, exist_ok=True)
            predicted_against_recorded(drawn, folder / "predicted_against_recorded.png")
            if any(name in flags for name in OTHERWISE_SCORED):
                result["reported"] = None
    elif simulator is None:
        raise InputError(
            f"--checkpoint={one.name}: it does not say what it was trained on. --dataset.repo_id (and --dataset.root) name "
            "the data to score it on, --env.type a simulator."
        )
    if simulator:
        results[one.name] = {**result, "simulator": _run_simulator(one, flags, simulator, folder)}


def _run_simulator(one: "Trained", flags: dict, options: "SimulatorOptions", folder: Path) -> dict:
    from ray_jobs.cluster import rollouts
    from ray_jobs.training.simulator import success

    workers = int(flags["ray.num_workers"]) if "ray.num_workers" in flags else None
    if workers != 0:
        connect.start(flags.get("ray.address")).result()
    started = told = time.monotonic()

    def show(done: list[dict]) -> None:
        nonlocal told
        doing("")
        if time.monotonic() - told > OUTPUT_EVERY_S:
            told = time.monotonic()
            print(
                f"  {len(done)}/{options.eval.n_episodes} episodes, {success(done)['success_rate']:.0%} so far"
            )

    doing("acting in the simulator")
    plugins = [value for name, value in flags.items() if "discover_packages_path" in name]
    episodes = rollouts.run(one, options, num_workers=workers, plugins=plugins, videos=VIDEOS, show=show)
    for episode in episodes:
        film = episode.pop("video")
        if film:
            (folder / "videos").mkdir(parents=True, exist_ok=True)
            file = folder / "videos" / f"{episode['task']}_seed_{episode['seed']}.mp4"
            file.write_bytes(film)
            episode["video"] = str(file.relative_to(folder.parent))
    tasks = {episode["task"] for episode in episodes}
    return {
        "env": options.env.type,
        **success(episodes),
        "tasks": {t: success([e for e in episodes if e["task"] == t]) for t in sorted(tasks)},
        "wall_s": round(time.monotonic() - started, 1),
        "per_episode": episodes,
    }


# ---------------------------------------------------------------------- what is left behind, and said


def _write(target: Path, results: dict[str, dict], argv: list[str]) -> None:
    from ray_jobs.evaluation.pictures import errors
    from ray_jobs.storage.records import write_json

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


def _last_screen(target: Path, results: dict[str, dict]) -> None:
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


if __name__ == "__main__":
    run_job(main, at_end=connect.leave)
