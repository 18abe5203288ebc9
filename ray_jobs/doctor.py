"""Look a data set over before training on it: what it holds, what is wrong with it, what it will cost, what to change.

    python -m ray_jobs.doctor --dataset.repo_id=me/set --dataset.root=datasets/set [--policy.type=act ...] [--json]

All flags of `ray_jobs.train` may be given; by default an ACT with LeRobot's settings and untrained weights is measured
for a few seconds. `--steps=20000` tells the hours of a training that long, `--cost_per_hour=2.5` the money; `--measure=false`
reads only. Exit status 1 if something would stop or spoil a training.
"""

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ray_jobs.checks.dataset_files import metadata_faults, missing_files
from ray_jobs.cli.command_line import is_on, read_flags
from ray_jobs.cli.early_checks import LOOKED_INTO, check_command, check_episodes_of, folder_of_data
from ray_jobs.cli.terminal import doing, no_garbage_collection, quiet
from ray_jobs.cluster.job import run_job
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.config.units import duration
from ray_jobs.policies.facts import facts_of
from ray_jobs.policies.lean_imports import unneeded, without
from ray_jobs.storage.records import json_text

if TYPE_CHECKING:
    from lerobot.configs.policies import PreTrainedConfig

    from ray_jobs.checks.diagnosis import Diagnosis

DEFAULT_POLICY = "act"  # that is measured if none is named
OF_THE_DATA = ("dataset.", "data.", "tolerance_s")
# Nothing is validated: the one episode that is measured cannot be parted.
NOT_MEASURED = {"dataset.eval_split", "data.eval_episodes", "eval_steps", "max_eval_samples"}


def main(argv: list[str]) -> int:
    quiet()
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    flags, _ = read_flags(["--json=true" if word == "--json" else word for word in argv])
    measuring, as_json = is_on(flags, "measure", "true"), is_on(flags, "json")
    flags = {name: value for name, value in flags.items() if name not in ("measure", "json")}
    cost_per_hour = _price(flags.pop("cost_per_hour", None))
    check_command({"policy.type": DEFAULT_POLICY, **flags}, looks_into_data=False)

    def say(*lines: str) -> None:
        if lines and not as_json:
            doing("")
            print("\n".join(lines), flush=True)  # at once, into a file as well

    def now(what: str) -> None:
        if not as_json:
            doing(what)

    told: list[str] = []
    if root := folder_of_data(flags):  # before LeRobot is imported
        if not root.is_dir():
            raise InputError(f"--dataset.root={root}: there is no such folder.")
        if faults := [f"--dataset.root={root}: {f}" for f in metadata_faults(root, flags["dataset.repo_id"])]:
            say(*_faults(faults))
            if as_json:
                print(json_text({"facts": {}, "faults": faults, "warnings": [], "advice": []}, indent=2))
            return 1
        told = missing_files(root, check_episodes_of(root, flags), LOOKED_INTO)
        say(*_faults(told))
    now("importing LeRobot")
    not_needed = unneeded([flags.get("policy.type", DEFAULT_POLICY)], flags)
    with no_garbage_collection(), without(not_needed):
        from ray_jobs.checks import costs, preflight
        from ray_jobs.checks.diagnosis import diagnose
        from ray_jobs.cli import dataset_options
        from ray_jobs.cli.resolve import resolve

    named = {"policy.type", "policy.path", "config_path"} & set(flags)
    asked = dataset_options.read(
        [f"--{k}={v}" for k, v in flags.items() if k.startswith(OF_THE_DATA) and "eval" not in k]
    )
    now("looking over the data set")
    recipe = resolve(_recipe(flags))
    steps = recipe.lerobot.steps
    found = diagnose(asked, recipe, named=bool(named))
    say(*_diagnosis(found, told))
    if measuring and not found.faults:
        try:
            now("measuring")
            recipe = preflight.check(recipe)
            found.facts["costs"] = costs.measure(asked, recipe, steps, cost_per_hour, now)
            say(*_costs(found.facts["costs"]))
        except (InputError, RunError) as error:
            if named or isinstance(error, RunError):  # a damage may show only when frames are decoded
                found.faults.append(str(error))
                say(f"FAULT       {error}")
            else:
                say(f"not measured: {error}\n--policy.type names another policy than {DEFAULT_POLICY}.")
    found.advice += _advice(found.facts, asked.data.resize, recipe.lerobot.policy)
    if as_json:
        print(json_text(vars(found), indent=2))
    else:
        say(*_verdict(found))
    return 1 if found.faults else 0


def _price(text: str | None) -> float | None:
    try:
        price = None if text is None else float(text)
    except ValueError:
        price = math.nan
    if price is not None and not 0 <= price < math.inf:
        raise InputError(f"--cost_per_hour={text}: must be a number, what an hour of this machine costs.")
    return price


def _recipe(flags: dict[str, str]) -> list[str]:
    """Flags of a training of a few steps, of which nothing stays."""
    defaults = {"policy.type": DEFAULT_POLICY, "num_workers": "1"}
    if flags.get("policy.type", DEFAULT_POLICY) == DEFAULT_POLICY:
        defaults["policy.pretrained_backbone_weights"] = "null"
    given = defaults | {name: value for name, value in flags.items() if name not in NOT_MEASURED}
    given |= {
        "policy.push_to_hub": "false",
        "output_dir": str(Path(tempfile.gettempdir()) / "ray_jobs_doctor_nothing"),
        "log_freq": "1",
        "save_checkpoint": "false",
        "env_eval_freq": "0",
        "wandb.enable": "false",
    }
    if "policy.path" in given:
        del given["policy.type"]
    return [f"--{name}={value}" for name, value in given.items()]


def _advice(facts: dict, size: list[int] | None, policy: "PreTrainedConfig") -> list[str]:
    """What to change, as far as the figures tell."""
    advice, costs = [], facts.get("costs", {})
    need, free = costs.get("to_decode_bytes", 0), costs.get("free_disk_bytes", 0)
    sizes = {key: camera["shape"][:2] for key, camera in facts.get("cameras", {}).items()}
    large = [key for key, shape in sizes.items() if min(shape) > 256]
    # What `check_resize` asks of the cameras.
    resizable = size is None and all(
        "image" in key and not camera.get("depth") for key, camera in facts.get("cameras", {}).items()
    )
    if need > 0.9 * free:
        advice.append(
            "The cache does not fit on the disk: --data.resize, --data.cache=FOLDER on a larger one."
        )
    shrunk = {key: _own_size(policy, *shape) for key, shape in sizes.items()}
    smaller = {
        tuple(own)
        for key, own in shrunk.items()
        if own and list(own) != list(sizes[key]) and all(map(int.__le__, own, sizes[key]))
    }
    if len(smaller) == 1 and resizable:
        height, width = smaller.pop()
        advice.append(
            f"{policy.type} shrinks images to {height}x{width} itself: --data.resize='[{height},{width}]' stores them "
            "like that, which makes cache and loader cheaper. It changes the pixels a little (anti-aliased, 8 bit), here "
            "and at run time."
        )
    elif large and resizable:
        height, width = (round(pixels * 240 / min(sizes[large[0]])) for pixels in sizes[large[0]])
        advice.append(
            f"{', '.join(large)}: more pixels than most policies use; --data.resize='[{height},{width}]' makes cache, "
            "loader and step cheaper."
        )
    distances = [camera.get("key_frame_distance", 0) for camera in facts.get("cameras", {}).values()]
    if max(distances, default=0) > 30:
        advice.append(
            f"Key frames are up to {max(distances)} frames apart: single frames are slow to decode, which "
            "--data.cache=off does again for every sample."
        )
    return advice


def _own_size(policy: "PreTrainedConfig", height: int, width: int) -> list[int] | None:
    """Height and width that a policy's own code resizes an image to, without the border it adds; None if it leaves
    images as they are."""
    facts = facts_of(policy.type)
    box = getattr(policy, facts.size_field, None)
    if not box:
        return None
    if facts.width_first:
        box = box[::-1]
    if not facts.keeps_aspect:
        return list(box)
    scale = min(box[0] / height, box[1] / width)
    return [int(height * scale), int(width * scale)]


def _faults(faults: list[str]) -> list[str]:
    return [f"FAULT       {text}" for text in faults]


def _diagnosis(found: "Diagnosis", told: list[str]) -> list[str]:
    """What the data set is, and what is wrong with it beside what has been told."""
    facts = found.facts
    lines = []
    if "episodes" in facts:
        shortest, middle, longest = facts["episode_lengths"]
        tasks = facts["tasks"]
        more = f" and {len(tasks) - 3} more" if len(tasks) > 3 else ""
        lines += [
            f"{facts['dataset']}: {facts['episodes']} episodes, {facts['frames']} frames, {facts['fps']} fps, "
            f"{duration(facts['seconds'])}",
            f"episodes    {shortest} to {longest} frames, half of them below {middle}",
            f"tasks       {'; '.join(tasks[:3])}{more}",
        ]
        for key, camera in facts["cameras"].items():
            shape = "x".join(map(str, camera["shape"]))
            how = "images in the tables" if camera["stored_as"] == "image" else "no video can be read"
            if "codecs" in camera:
                how = f"{', '.join(camera['codecs'])}, {camera['files']} file(s), key frames {camera['key_frame_distance']} apart"
            lines.append(f"camera      {key}: {shape}, {how}")
        for key, number in facts["numbers"].items():
            lines.append(
                f"numbers     {key}: {number['dimensions']} dimensions, {min(number['min']):.3g} to {max(number['max']):.3g}"
            )
    lines += _faults([text for text in found.faults if text not in told])
    return lines + [f"warning     {text}" for text in found.warnings]


def _verdict(found: "Diagnosis") -> list[str]:
    lines = [f"change      {text}" for text in found.advice]
    if not found.faults:
        lines.append("nothing would stop a training." if found.warnings else "healthy.")
    return lines


def _costs(costs: dict) -> list[str]:
    lines, step = [], costs["step_samples_per_s"]
    if "cache_bytes" in costs:
        left = (
            f", {duration(costs['decode_s'])} to decode" if costs["to_decode_bytes"] else ", decoded already"
        )
        lines.append(f"cache       {costs['cache_bytes'] / 1e9:.3g} GB{left}")
        stock, ours = costs["lerobot_samples_per_s"], costs["cache_samples_per_s"]
        lines.append(
            f"loader      {ours:.3g} samples/s from the cache, LeRobot's decoding {stock:.3g} (one process)"
        )
        limit = "loader" if ours < step else "step"
    else:
        limit = "step"
    name = f"{costs['policy']}, batch {costs['batch_size']}"
    lines.append(f"step        {step:.3g} samples/s ({name}); the {limit} is the limit")
    money = f", which costs {costs['cost']:.3g}" if "cost" in costs else ""
    lines.append(
        f"training    {costs['steps']} steps of {costs['step_s']:.3g} s: {duration(costs['train_s'])} with one worker{money}"
    )
    return lines


if __name__ == "__main__":
    run_job(main, at_end=lambda: None)
