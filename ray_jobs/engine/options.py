"""The command line as typed, and our own groups of options in it: `--ray.*`, `--data.*`,
`--checkpoint.*`, `--assets.*`.

Imports neither torch nor LeRobot: a job knows what it asks of Ray while those are still being imported.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from draccus.wrappers.docstring import get_attribute_docstring

from ray_jobs.engine.errors import InputError
from ray_jobs.engine.flag_table import PATHS, Flag, flags_of
from ray_jobs.engine.translations import translate

OPTIONS_FILE = "options.json"  # a run's options, beside LeRobot's checkpoints in the output folder
NO_CACHE, SOME_CACHE = ("off", "false", "no", "none", "null"), ("auto", "on", "true", "yes")  # no folders
ASKED = "asked"  # part of that file: what was asked for in LeRobot's flags and train_config.json cannot tell
# Flags that name files or folders here, some of them several with commas.
OUR_PATHS = ("output_dir", "data.cache", "assets.dir", "checkpoint", "space")
FOLDERS = ("data.cache", "assets.dir")  # of them those that are in no bucket
LONGEST_NAME = 255  # bytes, of a file or a folder on Linux


class Mistakes(list[str]):
    """What is wrong with a command, a line or two each."""

    def of(self, check: Callable[[], object]) -> bool:
        """Collect what a check refuses, unless it has been told; whether it refused nothing."""
        try:
            check()
        except InputError as error:
            told = {line for mistake in self for line in mistake.splitlines()}
            self.extend(line for line in str(error).splitlines() if line not in told)
            return False
        return True


@contextlib.contextmanager
def all_mistakes() -> Iterator[Mistakes]:
    """Within, mistakes are collected in the list; at its end they are raised together."""
    mistakes = Mistakes()
    yield mistakes
    if mistakes:
        raise InputError("\n".join(mistakes))


def at_least(name: str, value: float | None, least: int) -> list[str]:
    """What is wrong with a number that is too small: one mistake, or none."""
    return [f"--{name}={value}: must be at least {least}."] if value is not None and value < least else []


def not_an_address(name: str, value: str) -> list[str]:
    """What is wrong with an address where only a folder will do: one mistake, or none. As a path it would be a folder
    called `s3:` here."""
    return [f"--{name}={_shown(value)}: must be a folder, no address."] if "://" in value else []


def _shown(address: str) -> str:
    """An address without the keys that may be in it."""
    return re.sub(r"(:/+).*@", r"\1...@", address)


@dataclass
class RayOptions:
    """How the run is spread over workers."""

    num_workers: int = 1
    """Training workers. 0 runs everything in this process, without a cluster (for a debugger). `2:8`: elastic."""
    min_workers: int | None = None
    """Elastic: go on with as few while there is no room for all; each step still takes the batches of all."""
    cpus_per_worker: int | None = None
    """CPUs each worker reserves. Default: its share of the machine, at most 8 beside a GPU."""
    gpus_per_worker: float | None = None
    """GPUs each worker reserves. Default: 1 where the cluster has GPUs and the recipe allows them."""
    placement: str = "pack"
    """`pack`: workers on as few nodes as hold them. `spread`: on as many as there are."""
    address: str | None = None
    """`local` starts a cluster, `auto` or an address joins one. Default: join if there is one."""
    max_failures: int = 3
    """How often workers are lost between two checkpoints before the run is given up; -1: it never is."""
    hang_timeout: int = 600
    """Seconds without a step after which the worker that the others wait for is replaced; 0 never."""
    parallelism: str = "ddp"
    """`ddp`: every worker holds the whole policy. `fsdp`: its share of weights, gradients and optimizer."""
    grad_accumulation: int = 1
    """Batches whose gradients are added up for one optimizer step."""
    ema: bool = False
    """Keep an exponential moving average of the weights, validate with it and save it as the policy."""
    early_stopping: int = 0
    """Stop after so many validations without a better val/action_error; 0 never."""

    def __post_init__(self) -> None:
        with all_mistakes() as mistakes:
            mistakes += at_least("ray.num_workers", self.num_workers, 0)
            if self.min_workers is not None:
                range_ = f"--ray.num_workers={self.min_workers}:{self.num_workers}"
                if not 1 <= self.min_workers <= self.num_workers:
                    mistakes.append(
                        f"{range_}: the fewest workers first, at least 1, then the most, as in 2:8."
                    )
                if self.parallelism == "fsdp":
                    mistakes.append(
                        f"{range_}: not with --ray.parallelism=fsdp, whose shares fit one number only."
                    )
            mistakes += at_least("ray.cpus_per_worker", self.cpus_per_worker, 1)
            mistakes += at_least("ray.gpus_per_worker", self.gpus_per_worker, 0)
            mistakes += at_least("ray.max_failures", self.max_failures, -1)
            mistakes += at_least("ray.hang_timeout", self.hang_timeout, 0)
            mistakes += at_least("ray.grad_accumulation", self.grad_accumulation, 1)
            mistakes += at_least("ray.early_stopping", self.early_stopping, 0)
            if self.parallelism not in ("ddp", "fsdp"):
                mistakes.append(f"--ray.parallelism={self.parallelism}: must be ddp or fsdp.")
            if self.placement not in ("pack", "spread"):
                mistakes.append(f"--ray.placement={self.placement}: must be pack or spread.")
            if self.parallelism == "fsdp" and self.ema:
                mistakes.append(
                    "--ray.parallelism=fsdp: --ray.ema needs the whole policy on every worker (ddp)."
                )


@dataclass
class DataOptions:
    """How frames are read, which episodes are held out, and how they are scored."""

    cache: str = "auto"
    """Decode frames once per node: `auto` where it is worth it and there is room, `off`, or a folder to keep them in."""
    resize: list[int] | None = None
    """Height and width that camera images are resized to, here and by the trained policy at run time: '[H,W]'."""
    source: str = "local"
    """`local`: files on the node. `stream`: Ray decodes them elsewhere in the cluster, also out of `s3://`."""
    shuffle_buffer: int | None = None
    """Samples that each worker of a stream shuffles among. Default: what fits into a GiB, at most 10000."""
    eval_episodes: list[int] | None = None
    """Episodes held out for validation; takes the place of --dataset.eval_split."""
    eval_horizon: int | None = None
    """Steps of the predicted chunk that val/action_error compares. Default: the whole chunk."""
    eval_timing: bool = False
    """Measure val/inference_ms with every validation: one prediction at batch size 1, in milliseconds."""

    def __post_init__(self) -> None:
        with all_mistakes() as mistakes:
            mistakes += at_least("data.eval_horizon", self.eval_horizon, 1)
            mistakes += at_least("data.shuffle_buffer", self.shuffle_buffer, 1)
            if self.source not in ("local", "stream"):
                mistakes.append(f"--data.source={self.source}: must be local or stream.")
            if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < 1):
                mistakes.append(
                    f"--data.resize={self.resize}: must be height and width in pixels, as in '[120,160]'."
                )
        if self.cache.lower() in NO_CACHE:
            self.cache = "off"
        elif self.cache.lower() in SOME_CACHE:
            self.cache = "auto"
        else:
            self.cache = str(Path(self.cache).absolute())  # workers run in folders of their own


@dataclass
class CheckpointOptions:
    """Which checkpoints stay on disk. The last and the best one always do."""

    keep_last: int | None = None
    """Newest checkpoints to keep. Default: all, as LeRobot does."""
    keep_best: int = 1
    """Checkpoints with the lowest val/action_error to keep, when there are held-out episodes."""

    def __post_init__(self) -> None:
        with all_mistakes() as mistakes:
            mistakes += at_least("checkpoint.keep_last", self.keep_last, 1)
            mistakes += at_least("checkpoint.keep_best", self.keep_best, 1)


@dataclass
class AssetsOptions:
    """Where pretrained models and tokenizers lie that were fetched ahead."""

    dir: Path = Path("pretrained")
    """Folder of `hf download org/name --local-dir DIR/name`: found there under their Hub names, offline."""


@dataclass
class Options:
    """Everything on the command line that is not LeRobot's."""

    ray: RayOptions = field(default_factory=RayOptions)
    data: DataOptions = field(default_factory=DataOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    assets: AssetsOptions = field(default_factory=AssetsOptions)


def read_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Flags by name, as typed, those of older recipes translated, and notices. The last of a repeated flag counts, as
    it does for argparse (LeRobot's own look-ups would take the first).

    Raises:
        InputError: A word is no flag, or a flag's old name takes no such value.
    """
    flags: dict[str, str] = {}
    words = list(argv)
    with all_mistakes() as mistakes:
        while words:
            word = words.pop(0)
            if not word.startswith("--"):
                mistakes.append(_no_flag(word))
                continue
            name, equals, value = word[2:].partition("=")
            followed = bool(words) and not words[0].startswith("--")
            if equals and not value and followed or not equals and followed and words[0][:1] == "=":
                first = words.pop(0)
                if first == "=" and words and not words[0].startswith("--"):
                    first = words.pop(0)
                mistakes.append(f"--{name}: no spaces around the =, as in --{name}={first.lstrip('=')}")
                continue
            if not equals and followed:
                value = words.pop(0)
            flags.pop(name, None)
            if name == "ray.num_workers" and ":" in value:
                if not re.fullmatch(r"-?\d+:-?\d+", value):
                    mistakes.append(
                        f"--{name}={value}: must be a whole number, or the fewest and the most, as in 2:8."
                    )
                    continue
                flags["ray.min_workers"], _, value = value.partition(":")
            if name in (*PATHS, *OUR_PATHS):  # no shell does it behind a `=`
                value = ",".join(str(Path(p).expanduser()) if p[:1] == "~" else p for p in value.split(","))
                mistakes += _no_path(name, value)
            flags[name] = value
    return translate(flags)


def listed(text: str) -> list[str]:
    """Files and folders, with commas in between; a comma may also be part of the name of one that is there."""
    found, parts = [], text.split(",")
    while parts:
        names = {n: ",".join(parts[:n]).strip() for n in range(len(parts), 0, -1)}
        first = next((n for n, name in names.items() if name and os.path.exists(name)), 1)
        found.append(names[first])
        parts = parts[first:]
    return [name for name in found if name]


def _no_flag(word: str) -> str:
    """What to say of a word that does not begin with two hyphens."""
    bare = word.strip().lstrip("-\u2010\u2011\u2012\u2013\u2014\u2015\u2212")  # what editors make of them
    if re.match(r"[A-Za-z_.]+=", bare) or bare and bare != word and not bare[0].isdigit():
        return (
            f"'{word}' is not a flag, which begins with two hyphens like --steps=1000; did you mean --{bare}?"
        )
    if Path(word).is_dir():
        flag = "dataset.root" if (Path(word) / "meta").is_dir() else "output_dir"
        return f"'{word}' is not a flag, but a folder; did you mean --{flag}={shlex.quote(word)}?"
    return f"'{word}' is not a flag. They look like --steps=1000; a value with spaces needs quotes."


def _no_path(name: str, value: str) -> list[str]:
    """What is wrong with a path before it is looked for: one mistake, or none."""
    if (slip := re.match(r"(?i)(s3|gs|gcs|az|abfss?):/+", value)) and not re.match(r"[a-z0-9]+://", value):
        kind = slip[1].lower()
        meant = f"{kind}://{value[slip.end() :]}"
        return [f"--{name}={_shown(value)}: did you mean {_shown(meant)}?"]
    if name in FOLDERS and (mistakes := not_an_address(name, value)):
        return mistakes
    for part in value.replace(",", "/").split("/"):
        if len(os.fsencode(part)) > LONGEST_NAME:
            return [
                f"--{name}={value[:40]}...: a name of {len(os.fsencode(part))} bytes; {LONGEST_NAME} is the most."
            ]
    return []


def split_flags(flags: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Our flags and LeRobot's."""
    prefixes = tuple(f"{group.name}." for group in dataclasses.fields(Options))
    ours = {name: value for name, value in flags.items() if name.startswith(prefixes)}
    return ours, {name: value for name, value in flags.items() if name not in ours}


def parse_options(flags: dict[str, str], saved: dict | None = None) -> Options:
    """Our options among `flags`, on top of those `saved` by the run that is resumed (see `Recipe.save_options`)."""
    ours, _ = split_flags(flags)
    before = {
        f"{group}.{name}": value
        for group, options in (saved or {}).items()
        for name, value in options.items()
        if not (name == "min_workers" and "ray.num_workers" in flags)  # a saved 2:8 is no part of a typed 4
    }
    return build(Options, ours, before)


def build[T](config: type[T], typed: dict[str, str], saved: dict | None = None, prefix: str = "") -> T:
    """One of our dataclasses, of values as they were typed.

    Args:
        saved: Values, by flag as well, for what was not typed.

    Raises:
        InputError: A flag is unknown, or its value is none: all mistakes, a line each.
    """
    known = flags_of(config, prefix)
    values = {}
    with all_mistakes() as mistakes:
        for name, value in (saved or {}).items():
            if name in known and name not in typed:
                try:
                    values[name] = known[name].convert(value)
                except (TypeError, ValueError):
                    mistakes.append(f"--{name}={value}: must be {known[name].expected}.")
        for name, value in typed.items():
            if name not in known:
                mistakes.append(f"unknown flag --{name}.")
                continue
            try:
                values[name] = known[name].read(value)
            except (TypeError, ValueError):
                mistakes.append(f"--{name}={value}: must be {known[name].expected}.")
    return _made(config, values, prefix)


def _made[T](config: type[T], values: dict, prefix: str) -> T:
    given = {}
    with all_mistakes() as mistakes:
        for part in dataclasses.fields(config):
            name = f"{prefix}{part.name}"
            if dataclasses.is_dataclass(part.type):
                mistakes.of(lambda: given.update({part.name: _made(part.type, values, f"{name}.")}))  # noqa: B023
            elif name in values:
                given[part.name] = Path(values[name]) if part.type is Path else values[name]
    return config(**given)


def asked_device(flags: dict[str, str]) -> str | None:
    """`--policy.device` as typed. The parsed one cannot tell: LeRobot rewrites it on a driver without a GPU."""
    return None if flags.get("policy.device") == "null" else flags.get("policy.device")


def is_on(flags: Mapping[str, str], name: str, default: str = "false") -> bool:
    """Whether a switch is on, for all that YAML, and so LeRobot, takes for true or false.

    Raises:
        InputError: It is neither.
    """
    value = flags.get(name, default)
    try:
        return Flag(name, "bool").read(value)
    except ValueError:
        raise InputError(f"--{name}={value}: must be true or false.") from None


def asks_to_resume(flags: Mapping[str, str]) -> bool:
    with contextlib.suppress(InputError):  # which the look over all flags tells
        return is_on(flags, "resume")
    return False


def help_text() -> str:
    """Our options with their defaults, and where LeRobot's are shown."""
    lines = ["Every flag of lerobot-train, and:", ""]
    for group in dataclasses.fields(Options):
        lines += [*help_for(group.name, group.default_factory), ""]
    lines.append("LeRobot's flags for one policy:  python -m ray_jobs.train --policy.type=act --help")
    return "\n".join(lines)


def help_for(group: str, options: type) -> list[str]:
    """The lines of help about one group of options: a dataclass with a text below each field."""
    lines = [f"  {options.__doc__}"]
    for option in dataclasses.fields(options):
        default = "" if option.default is None else f" [{json.dumps(option.default, default=str)}]"
        text = get_attribute_docstring(options, option.name).docstring_below
        lines.append(f"    --{group}.{option.name}{default}\n        {text}")
    return lines
