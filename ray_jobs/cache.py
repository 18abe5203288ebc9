"""The frame cache of this node, or of every node of a cluster: decode ahead, look, check, remove.

    python -m ray_jobs.cache build --dataset.repo_id=me/set --dataset.root=datasets/set [--data.resize='[120,160]']
    python -m ray_jobs.cache list
    python -m ray_jobs.cache verify [NAME ...]
    python -m ray_jobs.cache remove NAME ... | --stale | --all

`build` is for one node, or for every node of the cluster that `--ray.address` (or `ray job submit`) names, at the same
time. `list` names the entries; part of a name stands for all that contain it. `verify` reads all frames again: those
that are damaged are decoded anew when they are next needed. `--data.cache=FOLDER` looks elsewhere than `auto` does.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ray_jobs.cli.command_line import build, read_flags
from ray_jobs.cli.early_checks import check_data
from ray_jobs.cli.flags import NO_DATA_SET, check_flags
from ray_jobs.cli.terminal import doing, quiet
from ray_jobs.cluster import connect
from ray_jobs.cluster.job import run_job
from ray_jobs.config.errors import InputError, RunError, all_mistakes
from ray_jobs.config.flag_table import flags_of
from ray_jobs.config.options import DataOptions
from ray_jobs.config.units import duration


def main(argv: list[str]) -> int:
    quiet()
    if not argv or {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    actions = {"build": _build, "list": _list, "verify": _verify, "remove": _remove}
    if argv[0] not in actions:
        raise InputError(f"'{argv[0]}': must be one of {', '.join(actions)}.")
    return actions[argv[0]](argv[1:])


# ---------------------------------------------------------------------- build


def _build(words: list[str]) -> int:
    flags, _ = read_flags(words)
    with all_mistakes() as mistakes:
        readable = mistakes.of(lambda: check_flags(flags))
        if "dataset.repo_id" not in flags:
            mistakes.append(NO_DATA_SET)
        mistakes.of(lambda: check_data(flags, episodes=readable))
    address = flags.get("ray.address") or os.environ.get("RAY_ADDRESS")
    doing("importing LeRobot")
    if not address:
        _build_here(words, _tell)
        return 0
    import ray

    from ray_jobs.cli import dataset_options

    dataset_options.read(words)  # a mistake is told of once, and here
    connect.start(flags.get("ray.address")).result()
    from ray.exceptions import RayError

    from ray_jobs.cluster.channel import open_line
    from ray_jobs.cluster.faults import if_helper_dies, why

    line = open_line()
    names = {}
    for node in ray.nodes():
        if node["Alive"]:
            name, here = node["NodeManagerAddress"], {"ray.io/node-id": node["NodeID"]}
            task = ray.remote(num_cpus=0, label_selector=here)(_build_on_node)
            names[task.remote(words, name, line)] = name
    doing("the nodes import LeRobot")
    waiting = list(names)
    with if_helper_dies("this command's helper process", "What is decoded stays; the same command goes on."):
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5)
            for event in ray.get(line.hear.remote(0)):
                doing("")
                print(event["text"], flush=True)
    failed = []
    for task, name in names.items():
        try:
            failed.append(ray.get(task))
        except RayError as error:
            failed.append(f"{name}: {why(error)}")
    if failed := [text for text in failed if text]:
        raise RunError("\n".join(failed))
    return 0


def _tell(text: str) -> None:
    doing("")
    print(text, flush=True)


def _build_on_node(words: list[str], name: str, line) -> str | None:
    """Returns what went wrong."""
    quiet()
    try:
        _build_here(words, lambda text: line.tell.remote({"kind": "notice", "text": f"{name}: {text}"}))
    except (InputError, RunError) as error:
        return f"{name}: {error}"
    return None


def _build_here(words: list[str], say: Callable[[str], None]) -> None:
    from ray_jobs.cli import dataset_options
    from ray_jobs.config.units import gigabytes
    from ray_jobs.data.frame_cache import FrameCache
    from ray_jobs.data.frames import FrameSource
    from ray_jobs.data.reader import FrameReader

    begin = time.monotonic()
    asked = dataset_options.read(words)
    dataset = asked.open()
    if not dataset.meta.camera_keys or not FrameReader.can_read(dataset):
        raise InputError(
            f"{asked.name}: nothing to cache, it has no cameras, or depth or language, which LeRobot reads."
        )
    folder = _folder(asked.data)
    try:
        cache = FrameCache(FrameSource(dataset, asked.data.resize), folder)
        doing("")
        say(f"decoding {gigabytes(cache.missing_bytes())} of {gigabytes(cache.bytes())} into {folder}")
        cache.fill(say)
    except OSError as error:
        raise RunError(f"{folder} cannot be used: {error.strerror or error}") from error
    say(f"all frames are there ({duration(time.monotonic() - begin)})")


def _folder(data: DataOptions) -> Path:
    from ray_jobs.storage.cache_folder import default_folder

    if data.cache == "off":
        raise InputError("--data.cache=off: no frames are kept there; name a folder, or leave it out.")
    return default_folder() if data.cache == "auto" else Path(data.cache)


# ---------------------------------------------------------------------- list, verify, remove


@dataclass
class ListOptions:
    """Which entries."""

    data: DataOptions = field(default_factory=DataOptions)
    stale: bool = False
    all: bool = False


def _entries(words: list[str]) -> tuple[ListOptions, dict]:
    """The options, and the entries that the names among the words stand for, by name."""
    from ray_jobs.data.frame_store import entries

    names = [word for word in words if not word.startswith("--")]
    flags, _ = read_flags([word for word in words if word not in names])
    flags = {name: value or "true" for name, value in flags.items()}
    check_flags(flags, flags_of(ListOptions, ""), alone=True)
    options = build(ListOptions, flags)
    folder = _folder(options.data)
    if "data.cache" in flags and not folder.is_dir():
        raise InputError(f"--data.cache={flags['data.cache']}: there is no such folder.")
    found = entries(folder)
    for name in names:
        if not any(name in other for other in found):
            raise InputError(
                f"'{name}': there is no such entry in {folder}; it has {', '.join(found) or 'none'}."
            )
    if not found:
        print(f"no frames in {folder}")
    return options, {k: v for k, v in found.items() if not names or any(name in k for name in names)}


def _list(words: list[str]) -> int:
    from ray_jobs.config.units import gigabytes
    from ray_jobs.data.frame_store import is_stale

    _, found = _entries(words)
    for name, entry in found.items():
        there = int((entry.checksums != 0).sum())
        state = f"{there}/{entry.total} frames" if there < entry.total else f"{entry.total} frames"
        stale = ", stale: the data set has changed or is gone" if is_stale(entry) else ""
        print(
            f"{name}\n    {state}, {gigabytes(entry.disk_bytes())} on disk, from {entry.about['root']}{stale}"
        )
    return 0


def _verify(words: list[str]) -> int:
    _, found = _entries(words)
    damaged = 0
    for name, entry in found.items():
        if entry.file is None:
            bad, state = entry.total, "its files are cut short, all frames are to be decoded again"
        elif bad := len(entry.verify()):
            state = f"{bad} damaged frames, to be decoded again"
        else:
            state = "good"
        damaged += bad
        print(f"{name}: {state}", flush=True)
    return 1 if damaged else 0


def _remove(words: list[str]) -> int:
    from ray_jobs.data.frame_store import is_stale, remove_unused_columns

    options, found = _entries(words)
    if not options.all and not options.stale and not [word for word in words if not word.startswith("--")]:
        raise InputError("name what to remove (`python -m ray_jobs.cache list`), or give --stale or --all.")
    for name, entry in found.items():
        if not options.stale or is_stale(entry):
            entry.remove()
            print(f"removed {name}")
    for folder in {entry.folder.parent for entry in found.values()}:
        remove_unused_columns(folder)
    return 0


if __name__ == "__main__":
    run_job(main, at_end=connect.leave)
