"""What a checkpoint, a run or a data set made by somebody else may not do: run code, be unpickled, lead out of its folder.

LeRobot reads safetensors, JSON and parquet, none of which runs anything. What remains is checked here: names of
classes to be imported, paths, links, and JSON that is not what its reader takes it for.
"""

import importlib
import os
import string
from pathlib import Path, PurePosixPath
from typing import Any

from ray_jobs.config.errors import InputError
from ray_jobs.storage.records import parse_json

PLACES = {"chunk_index", "file_index", "video_key"}  # what LeRobot fills into a data set's paths
MOST_PIXELS = 10**9  # of a camera's image
OURS = ("checkpoints",)  # may be a link: to a larger disk, say


def read_json(file: Path, kind: type = dict) -> Any:
    """A JSON file's content.

    Raises:
        ValueError: It is not JSON, or not of that kind.
    """
    return parse_json(file.read_bytes(), kind)


def check_processor(file: Path) -> None:
    """See that a processor pipeline has LeRobot's own steps only: it imports and calls whatever it names.

    Raises:
        ValueError: It names something else, or files outside its folder.
    """
    steps = read_json(file).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError("has no list of steps")
    for step in steps:
        name, state = str(step.get("class")), step.get("state_file")
        if "registry_name" not in step and not _is_a_step(name):
            raise ValueError(f"would run {name}, which is no processor step of LeRobot's")
        if state is not None and PurePosixPath(str(state)).name != state:
            raise ValueError(f"leads out to {state}")


def _is_a_step(name: str) -> bool:
    """Whether it is the name of a class of LeRobot's that its pipelines may call; its modules hold other things, too."""
    from lerobot.processor import ProcessorStep

    module, _, last = name.rpartition(".")
    if not module.startswith("lerobot."):
        return False
    try:
        found = getattr(importlib.import_module(module), last, None)
    except ImportError:
        return False
    return isinstance(found, type) and issubclass(found, ProcessorStep)


def check_links(run: Path) -> None:
    """See that nothing in the folder of a run or a search is a link that leads out of it: what is written there would land
    elsewhere.

    Raises:
        InputError: Something is.
    """
    run, checkpoints = run.resolve(), (run / "checkpoints").resolve()
    elsewhere = not checkpoints.is_relative_to(run)
    for folder in (run, checkpoints) if elsewhere else (run,):
        for parent, folders, files in os.walk(folder):
            for path in (Path(parent, name) for name in (*folders, *files)):
                if not path.is_symlink() or (path.name in OURS and path.parent == run):
                    continue
                target = path.resolve()
                if not any(target.is_relative_to(place) for place in (run, checkpoints)):
                    raise InputError(
                        f"{path} is a link that leads out of its run or search, to {target}. Remove it."
                    )
            # W&B's runs have links to their logs in the user's own folder.
            folders[:] = [name for name in folders if name != "wandb"]


def check_name(name: str) -> str:
    """A file's name relative to a root.

    Raises:
        ValueError: It leads out of there.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name:
        raise ValueError(f"the name {name!r} leads out of the data set")
    return name


def check_info(info: dict) -> None:
    """Look over a data set's info.json: its paths and its shapes.

    Raises:
        ValueError: A path leads out of the data set, or a number cannot be meant.
    """
    for field in ("data_path", "video_path"):
        pattern = info.get(field, "")
        if pattern is None and field == "video_path":
            continue
        if not isinstance(pattern, str):
            raise ValueError(f"{field} is {pattern!r}")
        for _, place, width, _ in string.Formatter().parse(pattern):
            if place is not None and (place not in PLACES or len(width or "") > 3):
                raise ValueError(f"{field} has {{{place}:{width}}} in it")
        check_name(pattern) if pattern else None
    for name, feature in info["features"].items():
        shape = feature["shape"]
        if not isinstance(shape, list | tuple):
            raise ValueError(f"{name} has the shape {shape!r}")
        if feature["dtype"] in ("object", "O") or not isinstance(feature["dtype"], str):
            raise ValueError(f"{name} has the type {feature['dtype']!r}")
        check_name(name)
        size = 1
        for length in shape:
            if not isinstance(length, int) or length < 1 or (size := size * length) > MOST_PIXELS:
                raise ValueError(f"{name} has the shape {shape}")
