"""Flags looked over before LeRobot parses them: mistyped ones get the nearest right one."""

import dataclasses
import difflib
import functools
import json
import re
from argparse import Action
from collections.abc import Iterable
from pathlib import Path

import lerobot.policies  # noqa: F401  (registers every --policy.type)
from draccus.argparsing import ArgumentParser
from lerobot.configs import parser as lerobot_parser
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TRAIN_CONFIG_NAME, TrainPipelineConfig
from lerobot.utils.constants import CHECKPOINTS_DIR, LAST_CHECKPOINT_LINK, PRETRAINED_MODEL_DIR

import ray_jobs.part_sorting  # noqa: F401  (registers --env.type=part_sorting)
from ray_jobs.engine.errors import InputError
from ray_jobs.engine.explain import first_line
from ray_jobs.engine.options import Options


def check_flags(flags: dict[str, str]) -> None:
    """Refuse unknown flags and choices, naming the nearest right one: argparse would print 655 flags."""
    plugins = lerobot_parser.parse_plugin_args(
        lerobot_parser.PLUGIN_DISCOVERY_SUFFIX, [f"--{name}={value}" for name, value in flags.items()]
    )
    known = _known_flags(tuple(plugins.items()))
    for name, value in flags.items():
        choices = name in known and known[name].choices
        if choices and value not in choices:
            guess = _nearest(value, choices)
            meant = f"; did you mean {guess}?" if guess else "."
            raise InputError(
                f"--{name}={value}: there is none of that name{meant}\nIt can be {', '.join(sorted(choices))}."
            )
    policy_type = flags.get("policy.type")
    if policy_type:
        of_type = dataclasses.fields(PreTrainedConfig.get_choice_class(policy_type))
        known = [name for name in known if not name.startswith("policy.")]
        known += ["policy.type", "policy.path", *(f"policy.{f.name}" for f in of_type if f.init)]
    for name in flags:
        if name not in known and name not in plugins:
            whose = f" for {policy_type}" if policy_type and name.startswith("policy.") else ""
            guess = _nearest(name, known)
            see = (
                f"did you mean --{guess}?"
                if guess
                else f"--policy.type={policy_type or 'act'} --help lists them."
            )
            raise InputError(f"unknown flag --{name}{whose}; {see}")
        if not flags[name]:
            raise InputError(
                f"--{name}: its value is missing, as in --{name}=VALUE; a switch takes true or false."
            )
    device = flags.get("policy.device", "null")
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps|xpu|null", device):
        raise InputError(f"--policy.device={device}: must be cpu, cuda, mps or xpu (or cuda:1 and so on).")


@functools.cache
def _known_flags(plugins: tuple[tuple[str, str], ...]) -> dict[str, Action]:
    """Every flag by name, of all policies, and of the packages that `--*.discover_packages_path` names."""
    for name, package in plugins:
        try:
            lerobot_parser.load_plugin(package)
        except lerobot_parser.PluginLoadError as error:
            raise InputError(f"--{name}={package}: {first_line(error)}") from None
    actions = {}
    for config in (Options, TrainPipelineConfig):
        actions |= ArgumentParser(config).parser._option_string_actions
    known = {option[2:]: action for option, action in actions.items() if option.startswith("--")}
    return known | {name: Action([], name) for name in ("policy.path", "reward_model.path")}


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one was probably meant to be, if there is one."""
    group, _, leaf = name.rpartition(".")
    # What the optimizer groups say is overruled by the policy's preset: never the flag to recommend.
    known = [k for k in known if not k.startswith(("optimizer.", "scheduler."))]
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group}
    for close in difflib.get_close_matches(leaf, siblings, n=1):
        return siblings[close]
    # The right name in the wrong group; without a group also its last part.
    before = r"(^|\.)" if group else r"(^|[._])"
    elsewhere = [k for k in known if re.search(f"{before}{re.escape(leaf)}$", k)]
    typo, close = (difflib.get_close_matches(name, known, n=1, cutoff=cutoff) for cutoff in (0.9, 0.8))
    return next(iter([*typo, *sorted(elsewhere, key=len), *close]), None)


# Flags that name a file or a folder here, or else one on the Hub, and the file looked for in the folder.
SOURCES = {
    "config_path": TRAIN_CONFIG_NAME,
    "policy.path": "config.json",
    "policy.pretrained_path": "config.json",
}


def check_sources(args: list[str]) -> None:
    """Refuse config files and checkpoints that are not there, and a command without data or policy."""
    for flag, file_name in SOURCES.items():
        value = lerobot_parser.parse_arg(flag, args)
        if value is not None:
            _check_source(flag, value, file_name)
    names = {arg[2:].partition("=")[0] for arg in args}
    if "config_path" in names:
        return  # the file may hold what follows
    if "dataset.repo_id" not in names:
        raise InputError(
            "--dataset.repo_id is missing: the data set's name, as in --dataset.repo_id=user/name "
            "(with --dataset.root=FOLDER any name will do)."
        )
    if not names & {"policy.type", "policy.path", "reward_model.type", "reward_model.path"}:
        raise InputError(
            "--policy.type is missing: --policy.type=act (or diffusion, smolvla, pi05 ...) trains a new policy, "
            "--policy.path=FOLDER goes on from a trained one."
        )
    for group in ("env", "optimizer", "scheduler"):
        flag = next((name for name in names if name.startswith(f"{group}.")), None)
        if flag and f"{group}.type" not in names:
            raise InputError(f"--{group}.type is missing: --{flag} alone does not say of which {group}.")


def _check_source(flag: str, value: str, file_name: str) -> None:
    path = Path(value)
    if not path.exists():
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", value) and not value.endswith((".json", ".yaml", ".yml")):
            return  # may be a name on the Hub
        raise InputError(f"--{flag}={value}: there is no such file or folder.")
    file = path if flag == "config_path" and path.is_file() else path / file_name
    if not file.is_file():
        places = [
            Path(PRETRAINED_MODEL_DIR),
            Path(CHECKPOINTS_DIR, LAST_CHECKPOINT_LINK, PRETRAINED_MODEL_DIR),
        ]
        inside = [path / place for place in places if (path / place / file_name).is_file()]
        hint = f" Did you mean {inside[0]}?" if inside else ""
        raise InputError(f"--{flag}={value}: there is no {file_name} in it.{hint}")
    if file.suffix == ".json":
        try:
            json.loads(file.read_text())
        except ValueError as error:
            raise InputError(f"--{flag}={value}: {file.name} is damaged ({error}).") from None
