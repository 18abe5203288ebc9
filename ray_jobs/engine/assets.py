"""Models and tokenizers that lie in a folder of the user's instead of on the Hugging Face Hub.

`hf download lerobot/pi0_base --local-dir pretrained/pi0_base` leaves files without the Hub's name on them. Such
folders are laid out here as a Hub cache, by links, in a folder that belongs to this process. Then all that asks for
`lerobot/pi0_base` or `google/paligemma-3b-pt-224` finds it without a network, LeRobot's processors included.
"""

import atexit
import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
import torchvision
from huggingface_hub import constants, snapshot_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME

from ray_jobs.engine.errors import InputError
from ray_jobs.engine.explain import hub_answer, hub_or_cache

GATED = ("google/paligemma-3b-pt-224",)  # repos whose licence must be accepted first
TOKENIZERS = dict.fromkeys(("pi0", "pi05", "pi0_fast"), "google/paligemma-3b-pt-224")  # LeRobot's, hard-coded
NUMBERS, WORDS = ["*.safetensors"], ["*.json", "*.model", "*.txt", "*.jinja"]

USERS_CACHE = Path(constants.HF_HUB_CACHE)
_overlay: Path | None = None


def find(folder: Path, repo_id: str) -> Path | None:
    """Where a Hub repo lies in the assets folder: as `<folder>/org/name` or `<folder>/name`; None if nowhere."""
    places = (folder / repo_id, folder / repo_id.rpartition("/")[2])
    return next((place.absolute() for place in places if place.is_dir()), None)


def needed(policy: PreTrainedConfig, folder: Path) -> dict[str, list[str]]:
    """Hub repos without which a policy cannot be built, and the files that are read of each."""
    repos = {}
    if policy.type in TOKENIZERS:
        repos[TOKENIZERS[policy.type]] = WORDS
    vlm = getattr(policy, "vlm_model_name", None)
    if vlm:
        repos[vlm] = WORDS + NUMBERS if policy.load_vlm_weights else WORDS
    start = policy.pretrained_path and str(policy.pretrained_path)
    if start:
        if not Path(start).is_dir():
            repos[start] = WORDS + NUMBERS
        saved = (find(folder, start) or Path(start)) / f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json"
        if saved.is_file():
            # A damaged file is told of where the weights are looked over.
            with contextlib.suppress(ValueError):
                steps = json.loads(saved.read_text()).get("steps", [])
                names = (step.get("config", {}).get("tokenizer_name") for step in steps)
                repos |= {name: WORDS for name in names if name and name not in repos}
    return {name: files for name, files in repos.items() if not Path(name).is_dir()}


def mount(folder: Path, policy: PreTrainedConfig, *, weights: bool) -> None:
    """Let this process find what a policy needs under its Hub name: in `folder`, else in the Hub's cache, else
    on the Hub. Once something lies in `folder`, the process asks the Hub for nothing any more.

    Args:
        weights: False on a driver: it checks, but leaves weights of billions of parameters to its workers.

    Raises:
        InputError: Something is nowhere to be had, or what lies in `folder` is no model or tokenizer.
    """
    provide(folder, needed(policy, folder), weights=weights)
    url = backbone_url(policy)
    backbone = Path(url).name if url and policy.pretrained_path is None else None
    if backbone and (folder / backbone).is_file():
        checkpoints = _make_overlay() / "torch" / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        _link(checkpoints / backbone, (folder / backbone).absolute())
        torch.hub.set_dir(str(checkpoints.parent))


def provide(folder: Path, repos: dict[str, list[str]], *, weights: bool, flag: str = "") -> None:
    """The part of `mount` that is about Hub repos: `repos` by name, with the files that are read of each.

    Args:
        flag: The flag that names them, for messages, as `--policy.path=`.
    """
    places = {name: find(folder, name) for name in repos}
    for name, place in places.items():
        if place is not None and not (place / "config.json").is_file():
            raise InputError(
                f"{place} has no config.json, so it cannot be told what it holds. Fetch all of it:\n"
                f"{_command(folder, name)}"
            )
    for name in (name for name, place in places.items() if place is None):
        files = repos[name] if weights else [file for file in repos[name] if file not in NUMBERS]
        try:
            with hub_or_cache():
                snapshot_download(name, allow_patterns=files, cache_dir=USERS_CACHE)
        except Exception as error:
            raise InputError(
                f"{flag}{name}: not here, not in --assets.dir={folder}, and {hub_answer(error)}\n"
                f"Where there is a network:{_licence(name)} {_command(folder, name)}"
            ) from None
    if any(places.values()):
        overlay = _make_overlay()
        for name, place in places.items():
            repo = overlay / f"models--{name.replace('/', '--')}"
            if place is None:
                _link(repo, USERS_CACHE / repo.name)
                continue
            if repo.is_symlink():
                repo.unlink()  # the user's folder goes before the Hub's cache
            for part in ("refs", "snapshots"):
                (repo / part).mkdir(parents=True, exist_ok=True)
            (repo / "refs" / "main").write_text("local")
            _link(repo / "snapshots" / "local", place)
        constants.HF_HUB_OFFLINE = True


def backbone_url(policy: PreTrainedConfig) -> str | None:
    """Where torchvision has the weights that a new policy's cameras start from, if they do.

    Raises:
        ValueError, KeyError, AttributeError: torchvision knows no weights of that name.
    """
    name = getattr(policy, "pretrained_backbone_weights", None)
    return name and torchvision.models.get_weight(name).url


def _make_overlay() -> Path:
    """This process's Hub cache: the user's own, by links, with room for what lies in the assets folder."""
    global _overlay
    if _overlay is None:
        _overlay = Path(tempfile.mkdtemp(prefix="ray_jobs_hub_"))
        atexit.register(shutil.rmtree, _overlay, ignore_errors=True)
        for repo in USERS_CACHE.glob("*--*"):
            _link(_overlay / repo.name, repo)
        constants.HF_HUB_CACHE = str(_overlay)  # huggingface_hub reads it at every call
    return _overlay


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _command(folder: Path, name: str) -> str:
    return f"hf download {name} --local-dir {folder / name.rpartition('/')[2]}"


def _licence(name: str) -> str:
    return (
        f" accept the licence at {constants.ENDPOINT}/{name}, `hf auth login`, then" if name in GATED else ""
    )
