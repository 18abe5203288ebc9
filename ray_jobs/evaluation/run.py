"""An evaluation: policies found and opened, scored on recorded episodes and in a simulator, one after the other."""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import draccus

import ray_jobs.part_sorting  # noqa: F401  (registers --env.type=part_sorting)
from ray_jobs.checks.output_dir import check_output_dir
from ray_jobs.cli.command_line import listed
from ray_jobs.cli.flags import as_arguments
from ray_jobs.cli.parse_errors import parse
from ray_jobs.cli.terminal import OUTPUT_EVERY_S, doing
from ray_jobs.cluster import connect
from ray_jobs.config.errors import InputError
from ray_jobs.evaluation import results, rollouts
from ray_jobs.evaluation.pictures import predicted_against_recorded
from ray_jobs.evaluation.trained import Trained, open_trained, score
from ray_jobs.search.bucket_copy import bring
from ray_jobs.search.files import SEARCH_FILE, TRIALS_DIR, ranked_checkpoint, read_search
from ray_jobs.storage.bucket import is_uri, local_folder
from ray_jobs.training.checkpoint import pretrained_dir
from ray_jobs.training.simulator import SimulatorOptions, check, check_eval, success

VIDEOS = 4  # of the first episodes in a simulator
OTHERWISE_SCORED = ("data.eval_episodes", "data.eval_horizon", "dataset.eval_split", "max_eval_samples")


def evaluate(
    checkpoint: str, output_dir: str | None, flags: dict[str, str], notices: list[str], argv: list[str]
) -> int:
    """Score each checkpoint, write the results, and say them. Returns the exit status.

    Args:
        flags: The command's, without those that are named here.
        argv: The command, for the record.
    """
    doing("reading the checkpoint")
    in_simulator = any(name.startswith("env.") for name in flags)
    simulator = _simulator(flags) if in_simulator else None
    target = local_folder(output_dir, "output_dir") if output_dir else None
    if target:
        check_output_dir(target)
    found = _find(checkpoint)
    policies = []
    for name, (folder, fetch) in found.items():
        policies.append(open_trained(name, folder, flags))
        policies[-1].fetch = fetch
    if simulator:
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
    scored: dict[str, dict] = {}
    target = target or _new_folder(Path("outputs"))
    try:
        for one in policies:
            _evaluate(one, flags, simulator, target, scored)
    finally:
        doing("")
        if scored:  # what is done stays, whatever became of the next
            results.write(target, scored, argv)
        elif output_dir is None:
            with contextlib.suppress(OSError):  # something is in it
                target.rmdir()
    results.last_screen(target, scored)
    return 0


def _simulator(flags: dict[str, str]) -> SimulatorOptions:
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
    number = 1
    while True:
        with contextlib.suppress(FileExistsError):
            (parent / f"evaluation-{number}").mkdir()
            return parent / f"evaluation-{number}"
        number += 1


def _find(checkpoint: str) -> dict[str, tuple[Path, Callable[[], Path] | None]]:
    """`pretrained_model` folders by a short name, each with what has brought it here, if it lies in a bucket."""
    found: dict[str, tuple[Path, Callable[[], Path] | None]] = {}
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
    one: Trained, flags: dict, simulator: SimulatorOptions | None, target: Path, scored: dict[str, dict]
) -> None:
    """Put all about one checkpoint into `scored`, as soon as it is known; writes its pictures and videos."""
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
            scored[one.name] = result
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
        scored[one.name] = {**result, "simulator": _run_simulator(one, flags, simulator, folder)}


def _run_simulator(one: Trained, flags: dict, options: SimulatorOptions, folder: Path) -> dict:
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
