"""Flags looked over before LeRobot, torch or Ray are imported: names, choices, types, files. All mistakes at once, mistyped
names with the nearest right one.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from draccus.cfgparsing import parse_string

from ray_jobs.config import flag_table
from ray_jobs.config.errors import InputError, all_mistakes
from ray_jobs.config.flag_table import Flag, FlagTable, flags_of
from ray_jobs.config.options import Options, at_least

PLUGINS = "discover_packages_path"  # how LeRobot's flags end that name a package to import
# LeRobot's names in a run's folder, which its own constants would cost 2 s of imports; a test compares them.
TRAIN_CONFIG_NAME = "train_config.json"
INSIDE = ("pretrained_model", "checkpoints/last/pretrained_model")  # of a checkpoint, of a run
# Flags that name a file or a folder here, or else one on the Hub, and the file looked for in the folder.
SOURCES = {
    "config_path": TRAIN_CONFIG_NAME,
    "policy.path": "config.json",
    "policy.pretrained_path": "config.json",
}
# LeRobot's numbers that it takes without a word when they are too small.
LEAST = dict.fromkeys(("steps", "batch_size", "prefetch_factor"), 1) | dict.fromkeys(
    ("num_workers", "log_freq", "eval_steps", "max_eval_samples", "tolerance_s", "seed"), 0
)

# Groups of LeRobot's flags, of which a file may tell all, and the flag of each that is meant as a rule.
GROUPS = dict.fromkeys(("policy", "env", "optimizer", "scheduler"), "type") | {
    "dataset": "repo_id",
    "wandb": "enable",
}
NO_DATA_SET = (
    "--dataset.repo_id is missing: the data set's name, as in --dataset.repo_id=user/name "
    "(with --dataset.root=FOLDER any name will do)."
)
MOST = {"seed": 2**32 - 1}  # NumPy's


def check_flags(
    flags: Mapping[str, str], more: Mapping[str, Flag] | None = None, *, alone: bool = False
) -> None:
    """Refuse flags, choices and values that there are not: argparse would print 655 flags.

    Args:
        more: Flags of a job beside those of a training.
        alone: The job takes no others.

    Raises:
        InputError: All mistakes, a line or two each.
    """
    known, theirs, plugins, policy = dict(more or {}), {}, {}, None
    if not alone:
        plugins = plugins_of(flags)
        table = (None if plugins else flag_table.load()) or _with_plugins(plugins)
        policy = flags.get("policy.type")
        theirs = table.flags(policy)
        known |= flags_of(Options, "") | theirs
        policy = policy if policy in table.policies else None
    with all_mistakes() as mistakes:
        for name, value in flags.items():
            if name not in plugins:
                mistakes += _mistake(name, value, known, policy)
            if name in theirs and theirs[name].is_text and not _is_raw(name) and value.startswith("include"):
                mistakes.append(
                    f"--{name}={value}: LeRobot's parser would open a file for a text that begins with 'include'; "
                    "give another name."
                )


def plugins_of(flags: Mapping[str, str]) -> dict[str, str]:
    """The flags that name packages with policies or environments of their own."""
    return {name: value for name, value in flags.items() if PLUGINS in name}


def _with_plugins(plugins: dict[str, str]) -> FlagTable:
    """The flags that there are once the packages are imported."""
    from lerobot.configs.parser import PluginLoadError, load_plugin

    from ray_jobs.config.errors import first_line

    for name, package in plugins.items():
        try:
            load_plugin(package)
        except PluginLoadError as error:
            raise InputError(f"--{name}={package}: {first_line(error)}") from None
    return flag_table.of_lerobot()


def _mistake(name: str, value: str, known: Mapping[str, Flag], policy: str | None) -> list[str]:
    """What is wrong with a flag: one mistake, or none."""
    flag = known.get(name)
    if flag is None:
        whose = f" for {policy}" if policy and name.startswith("policy.") else ""
        guess = nearest(name, [*known, "help"])
        see = (
            f"python -m ray_jobs.train --policy.type={policy or 'act'} --help lists them."
            if "steps" in known
            else "--help lists them."
        )
        see = f"did you mean --{guess}?" if guess else see
        return [f"unknown flag --{name}{whose}; {see}"]
    if not value:
        return [f"--{name}: its value is missing, as in --{name}=VALUE; a switch takes true or false."]
    if name == "policy.device" and not re.fullmatch(r"cpu|cuda(:\d+)?|mps|xpu|null", value):
        return [f"--{name}={value}: must be cpu, cuda, mps or xpu (or cuda:1 and so on)."]
    if flag.choices and value not in (*flag.choices, *(["null"] if flag.optional else [])):
        guess = closest(value, flag.choices)
        meant = f"; did you mean {guess}?" if guess else "."
        return [
            f"--{name}={value}: there is none of that name{meant}\nIt can be {', '.join(sorted(flag.choices))}."
        ]
    if name in GROUPS and value != "null" and not Path(value).is_file():
        return [
            f"--{name}={value}: would be a file with all of --{name}.*, and there is none; "
            f"did you mean --{name}.{GROUPS[name]}={value}?"
        ]
    try:
        read = flag.read(value)
    except (TypeError, ValueError):
        try:
            parse_string(value)
        except Exception:  # of the YAML library's own kinds
            return [
                f"--{name}={value}: cannot be read. Every bracket and quote must be closed, as in '[1,2]'."
            ]
        return [f"--{name}={value}: must be {flag.expected}."]
    if name in MOST and read is not None and read > MOST[name]:
        return [f"--{name}={value}: must be at most {MOST[name]}."]
    return at_least(name, read, LEAST[name]) if name in LEAST else []


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known flag that an unknown one was probably meant to be, if there is one."""
    group, _, leaf = name.rpartition(".")
    # What the optimizer groups say is overruled by the policy's preset: never the flag to recommend.
    known = [k for k in known if not k.startswith(("optimizer.", "scheduler."))]
    # Nor is the name of a group, which wants a config file.
    groups = {k.rpartition(".")[0] for k in known}
    known = [k for k in known if k not in groups]
    alike = sorted(
        (k for k in known if _plain(k) == _plain(name) or not group and k.endswith(f".{name}")), key=_rank
    )
    if alike:
        return alike[0]
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group}
    for close in difflib.get_close_matches(leaf, siblings, n=1):
        return siblings[close]
    # The right name in the wrong group; without a group also its last part.
    before = r"(^|\.)" if group else r"(^|[._])"
    elsewhere = [k for k in known if re.search(f"{before}{re.escape(leaf)}$", k)]
    longer = [k for k in siblings.values() if group and k.endswith(f"_{leaf}")]
    typo, near = (closest(name, known, cutoff) for cutoff in (0.9, 0.8))
    return typo or next(iter(sorted(longer or elsewhere, key=len)), None) or near


def _plain(name: str) -> str:
    """A flag's name without what people spell differently: `--policy-type`, `--dataset_root`, `--STEPS`."""
    return re.sub(r"[-_.]", "", name).lower()


def _rank(name: str) -> tuple[int, int]:
    """The data set's and the policy's flags are meant more often than an environment's of the same name."""
    groups = ("dataset", "policy")
    group = name.partition(".")[0]
    return groups.index(group) if group in groups else len(groups), len(name)


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that a typed one was probably meant to be, whatever its case, if there is one."""
    by_lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def check_sources(flags: Mapping[str, str], *, needs_policy: bool = True) -> None:
    """Refuse config files and checkpoints that are not there, and a command without data or policy."""
    with all_mistakes() as mistakes:
        for flag, file_name in SOURCES.items():
            if flag in flags and flags[flag] != "null":
                mistakes += _source(flag, flags[flag], file_name)
        if "config_path" in flags:
            return  # the file may hold what follows
        if "://" in (data_set := flags.get("dataset.repo_id", "")):
            page = re.fullmatch(r"https?://huggingface\.co/datasets/([^/]+/[^/?#]+).*", data_set)
            meant = f"; did you mean {page[1]}?" if page else ": as in user/name."
            mistakes.append(f"--dataset.repo_id={data_set}: must be the data set's name{meant}")
        if "dataset.repo_id" not in flags:
            mistakes.append(NO_DATA_SET)
        if needs_policy and not flags.keys() & {
            "policy.type",
            "policy.path",
            "reward_model.type",
            "reward_model.path",
        }:
            mistakes.append(
                "--policy.type is missing: --policy.type=act (or diffusion, smolvla, pi05 ...) trains a new policy, "
                "--policy.path=FOLDER goes on from a trained one."
            )
        for group in ("env", "optimizer", "scheduler"):
            other = next((name for name in flags if name.startswith(f"{group}.")), None)
            if other and f"{group}.type" not in flags:
                mistakes.append(f"--{group}.type is missing: --{other} alone does not say of which {group}.")


def _source(flag: str, value: str, file_name: str) -> list[str]:
    path = Path(value)
    if not path.exists():
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", value) and not value.endswith((".json", ".yaml", ".yml")):
            return []  # may be a name on the Hub
        return [f"--{flag}={value}: there is no such file or folder."]
    file = path if flag == "config_path" and path.is_file() else path / file_name
    if not file.is_file():
        inside = [path / place for place in INSIDE if (path / place / file_name).is_file()]
        hint = f" Did you mean {inside[0]}?" if inside else ""
        return [f"--{flag}={value}: there is no {file_name} in it.{hint}"]
    if file.suffix == ".json" or flag == "config_path":  # which LeRobot reads as JSON, whatever it is called
        try:
            json.loads(file.read_text())
        except ValueError as error:
            return [f"--{flag}={value}: {file.name} is not JSON, or damaged ({error})."]
    return []


# ---------------------------------------------------------------------- for LeRobot's own parser


def as_arguments(flags: Mapping[str, str]) -> list[str]:
    """Flags as arguments for LeRobot's parser (draccus), which reads every value as YAML or, under `--config_path`, as JSON.
    Texts are quoted for both: ` #` begins no comment in them, `2026_11_30` is no number, and `include` opens no file.

    Not what LeRobot takes out of the command line before that parser sees it, as it is typed.
    """
    table = flag_table.load() or flag_table.of_lerobot()
    known = table.flags(flags.get("policy.type"))
    return [f"--{name}={_quoted(name, value, known)}" for name, value in flags.items()]


def _is_raw(name: str) -> bool:
    """Whether LeRobot takes a flag out of the command line by itself."""
    return name == "config_path" or name.endswith((".path", ".type")) or PLUGINS in name


def _quoted(name: str, value: str, known: Mapping[str, Flag]) -> str:
    flag = known.get(name)
    if flag is None or _is_raw(name) or not flag.is_text or (value == "null" and flag.optional):
        return value
    text = json.dumps(flag.read(value), ensure_ascii=False)
    # YAML takes these only escaped; JSON, either way.
    return re.sub(
        r"[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]", lambda c: f"\\u{ord(c[0]):04x}", text
    )
