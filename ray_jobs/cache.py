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
from dataclasses import dataclass, field

from ray_jobs.cli.command_line import build, read_flags
from ray_jobs.cli.early_checks import check_data
from ray_jobs.cli.flags import NO_DATA_SET, check_flags
from ray_jobs.cli.terminal import doing, quiet
from ray_jobs.cluster import connect
from ray_jobs.cluster.job import run_job
from ray_jobs.config.errors import InputError, all_mistakes
from ray_jobs.config.flag_table import flags_of
from ray_jobs.config.options import DataOptions
from ray_jobs.config.units import gigabytes
from ray_jobs.data.frame_store import entries, is_stale, remove_unused_columns
from ray_jobs.storage.cache_folder import folder_of


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
        from ray_jobs.cluster.cache_build import build_here

        build_here(words, _tell)
        return 0
    from ray_jobs.cli import dataset_options

    dataset_options.read(words)  # a mistake is told of once, and here
    connect.start(flags.get("ray.address")).result()
    from ray_jobs.cluster.cache_nodes import build_on_nodes

    build_on_nodes(words)
    return 0


def _tell(text: str) -> None:
    doing("")
    print(text, flush=True)


# ---------------------------------------------------------------------- list, verify, remove


@dataclass
class ListOptions:
    """Which entries."""

    data: DataOptions = field(default_factory=DataOptions)
    stale: bool = False
    all: bool = False


def _entries(words: list[str]) -> tuple[ListOptions, dict]:
    """The options, and the entries that the names among the words stand for, by name."""
    names = [word for word in words if not word.startswith("--")]
    flags, _ = read_flags([word for word in words if word not in names])
    flags = {name: value or "true" for name, value in flags.items()}
    check_flags(flags, flags_of(ListOptions, ""), alone=True)
    options = build(ListOptions, flags)
    folder = folder_of(options.data)
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
