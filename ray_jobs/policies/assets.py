"""Models and tokenizers that lie in a folder of the user's instead of on the Hugging Face Hub.

`hf download lerobot/pi0_base --local-dir pretrained/pi0_base` leaves files without the Hub's name on them. While a
policy and its processors are built, such folders are laid out as a Hub cache, by links, and the Hub is not asked. Then
all that asks for `lerobot/pi0_base` or `google/paligemma-3b-pt-224` finds it without a network, LeRobot's processors
included. Before and after, the Hub is what it is without us: for data sets, for the upload of the trained policy.
"""

import contextlib
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from huggingface_hub import constants, snapshot_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME

from ray_jobs.config.errors import InputError
from ray_jobs.policies.facts import FACTS, facts_of
from ray_jobs.storage import git_lfs
from ray_jobs.storage.hub import hub_answer, hub_or_cache, offline
from ray_jobs.storage.records import parse_json

GATED = {repo for facts in FACTS.values() for repo in facts.gated}
NUMBERS, WORDS = ["*.safetensors"], ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
ADAPTER_CONFIG = "adapter_config.json"

USERS_CACHE = Path(constants.HF_HUB_CACHE)


def find(folder: Path, repo_id: str) -> Path | None:
    """Where a Hub repo lies in the assets folder: as `<folder>/org/name` or `<folder>/name`; None if nowhere."""
    places = (folder / repo_id, folder / repo_id.rpartition("/")[2])
    return next((place.absolute() for place in places if place.is_dir()), None)


@contextlib.contextmanager
def mounted(folder: Path, policy: PreTrainedConfig, *, weights: bool) -> Iterator[None]:
    """Within, this process finds what a policy is built from under its Hub name: in `folder`, else in the Hub's
    cache, else on the Hub, from where it is fetched first. If any of it lies in `folder`, the Hub is asked for
    nothing within.

    Args:
        weights: False on a driver: it checks, but leaves weights of billions of parameters to its workers.

    Raises:
        InputError: Something is nowhere to be had, or what lies in `folder` is no model or tokenizer.
    """
    start = str(policy.pretrained_path or "")
    places = _fetch(folder, _hub_names({start: WORDS + NUMBERS}), weights=weights)
    places |= _fetch(folder, _named(policy, places.get(start, Path(start))), weights=weights)
    url = backbone_url(policy)
    backbone = folder / Path(url).name if url and not start else None
    with _laid_out(folder, places), tempfile.TemporaryDirectory(prefix="ray_jobs_torch_") as scratch:
        before = torch.hub.get_dir()
        if backbone and backbone.is_file():
            checkpoints = Path(scratch) / "checkpoints"
            checkpoints.mkdir()
            (checkpoints / backbone.name).symlink_to(backbone.absolute())
            torch.hub.set_dir(scratch)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


@contextlib.contextmanager
def configs_mounted(folder: Path, names: dict[str, str]) -> Iterator[None]:
    """`mounted` for policies whose configs are yet to be read: `names` are the values of `--policy.path` and its
    like, by flag."""
    places: dict[str, Path] = {}
    for flag, name in names.items():
        places |= _fetch(folder, _hub_names({name: WORDS}), weights=False, flag=f"--{flag}=")
    with _laid_out(folder, places):
        yield


def read_at_once(flags: dict[str, str]) -> dict[str, str]:
    """By flag, the Hub repos that a policy's config reads while it is parsed."""
    kind = flags.get("policy.type", "")
    field = facts_of(kind).parsed_field
    if field is None:
        return {}
    usual = PreTrainedConfig.get_choice_class(kind).__dataclass_fields__[field].default
    return {f"policy.{field}": flags.get(f"policy.{field}", usual)}


def _named(policy: PreTrainedConfig, start: Path) -> dict[str, list[str]]:
    """Hub repos without which a policy cannot be built, and the files that are read of each.

    Args:
        start: Where the files of the checkpoint it starts from lie, if it starts from one.
    """
    repos = {facts_of(policy.type).tokenizer: WORDS}
    for facts in FACTS.values():
        repos |= {getattr(policy, field, None): WORDS for field in facts.tokenizer_fields}
        for field, asked in facts.model_fields.items():
            if asked is None or getattr(policy, asked, True):
                repos[getattr(policy, field, None)] = WORDS + NUMBERS
    if policy.pretrained_path:
        steps = _read(start / f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json").get("steps", [])
        for step in steps:
            repos.setdefault(step.get("config", {}).get("tokenizer_name"), WORDS)
        base = _read(start / ADAPTER_CONFIG).get("base_model_name_or_path")
        if base and Path(base).is_absolute() and not Path(base).is_dir():
            raise InputError(f"{start} holds adapters of {base}, which is not there.")
        repos[base] = WORDS + NUMBERS
    return _hub_names(repos)


def _read(file: Path) -> dict:
    """A JSON file's content; nothing if there is none. A damaged one is told of where the weights are looked over."""
    with contextlib.suppress(ValueError, OSError):
        return parse_json(file.read_bytes())
    return {}


def _hub_names(repos: dict[str | None, list[str]]) -> dict[str, list[str]]:
    return {name: files for name, files in repos.items() if name and not Path(name).is_dir()}


def _fetch(folder: Path, repos: dict[str, list[str]], *, weights: bool, flag: str = "") -> dict[str, Path]:
    """Where Hub repos lie on this machine: in `folder`, or in the Hub's cache, into which they are downloaded.

    Args:
        repos: By name, the files that are read of each.
        flag: The flag that names them, for messages, as `--policy.path=`.
    """
    places = {name: place for name in repos if (place := find(folder, name)) is not None}
    for name, place in places.items():
        # Some hold several models, each in a folder.
        if not any(place.rglob("config.json")) and not (place / ADAPTER_CONFIG).is_file():
            raise InputError(
                f"{place} has no config.json, so it cannot be told what it holds. Fetch all of it:\n"
                f"{_command(folder, name)}"
            )
        if notes := git_lfs.pointers(sorted(place.iterdir())):
            raise InputError(f"{flag}{name}: {git_lfs.fault(notes)}")
    for name in [name for name in repos if name not in places]:
        files = repos[name] if weights else [file for file in repos[name] if file not in NUMBERS]
        try:
            with hub_or_cache():
                places[name] = Path(snapshot_download(name, allow_patterns=files, cache_dir=USERS_CACHE))
        except Exception as error:
            raise InputError(
                f"{flag}{name}: not here, not in --assets.dir={folder}, and {hub_answer(error)}\n"
                f"Where there is a network:{_licence(name)} {_command(folder, name)}"
            ) from None
    return places


@contextlib.contextmanager
def _laid_out(folder: Path, places: dict[str, Path]) -> Iterator[None]:
    """Within, what lies in `folder` is in the Hub's cache, beside what the user has in there, and the Hub is not
    asked; if none of `places` is in `folder`, all is as LeRobot has it."""
    ours = {name: place for name, place in places.items() if place == find(folder, name)}
    if not ours:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ray_jobs_hub_") as scratch:
        cache = Path(scratch)
        for name, place in ours.items():
            repo = cache / f"models--{name.replace('/', '--')}"
            (repo / "refs").mkdir(parents=True)
            (repo / "refs" / "main").write_text("local")
            (repo / "snapshots").mkdir()
            (repo / "snapshots" / "local").symlink_to(place)
        for repo in USERS_CACHE.glob("*--*"):
            if not (cache / repo.name).exists():  # the user's folder goes before the Hub's cache
                (cache / repo.name).symlink_to(repo)
        before, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, scratch  # read at every call
        try:
            with offline():
                yield
        finally:
            constants.HF_HUB_CACHE = before


def backbone_url(policy: PreTrainedConfig) -> str | None:
    """Where torchvision has the weights that a new policy's cameras start from, if they do.

    Raises:
        InputError: torchvision knows no weights of that name.
    """
    name = getattr(policy, "pretrained_backbone_weights", None)
    try:
        return name and torchvision.models.get_weight(name).url
    except (ValueError, KeyError, AttributeError):
        raise InputError(
            f"--policy.pretrained_backbone_weights={name}: torchvision has no such weights."
        ) from None


def _command(folder: Path, name: str) -> str:
    return f"hf download {shlex.quote(name)} --local-dir {shlex.quote(str(folder / name.rpartition('/')[2]))}"


def _licence(name: str) -> str:
    return (
        f" accept the licence at {constants.ENDPOINT}/{name}, `hf auth login`, then" if name in GATED else ""
    )
