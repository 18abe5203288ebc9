"""Tiny pi0, pi0.5 and SmolVLA beside tiny ACT and Diffusion, and the models and tokenizers they start from."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np

from support.commands import ROOT, common, tiny_act, tiny_diffusion

PALIGEMMA = "google/paligemma-3b-pt-224"
RESNET = "resnet18-f37072fd.pth"  # ResNet18_Weights.IMAGENET1K_V1
SMOLVLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
LARGE = ("pi0", "pi05", "smolvla")
ALL = ("act", "diffusion", *LARGE)
PLUGIN = "--discover_packages_path=tiny_vla"


def _tokenizer(**special):
    """One token per byte, so that tasks that differ are tokens that differ."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=special
    )


def _for_older_transformers(folder: Path) -> None:
    """Today's transformers saves a tokenizer in words of its own; those on the Hub are written as here."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    special = {key: value for key, value in config.items() if key.endswith("_token")}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": special}
    file.write_text(json.dumps(config))


def make_models(folder: Path) -> Path:
    """What `hf download` leaves of PaliGemma's tokenizer and of SmolVLM2, in tiny; and a ResNet-18 of random weights."""
    import torch
    import torchvision
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    paligemma = folder / PALIGEMMA.rpartition("/")[2]
    _tokenizer().save_pretrained(paligemma)
    _for_older_transformers(paligemma)
    (paligemma / "config.json").write_text(json.dumps({"model_type": "paligemma"}))

    smolvlm = folder / SMOLVLM.rpartition("/")[2]
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 300,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        scale_factor=2,
        image_token_id=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    SmolVLMForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(smolvlm)
    tokenizer = _tokenizer(
        fake_image_token="<fake>",
        image_token="<image>",
        end_of_utterance_token="<end>",
        global_image_token="<g>",
    )
    parts = SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor()
    SmolVLMProcessor(*parts, chat_template="").save_pretrained(smolvlm)
    for part, name in ((parts[0], "preprocessor_config"), (parts[2], "video_preprocessor_config")):
        (smolvlm / f"{name}.json").write_text(part.to_json_string())
    _for_older_transformers(smolvlm)
    torch.save(torchvision.models.resnet18().state_dict(), folder / RESNET)
    return folder


def lerobots_environment(models: Path) -> dict[str, str]:
    """Variables with which stock LeRobot finds the same models, without a network, and the tiny sizes."""
    hub = models.parent / "hub"
    for name in (PALIGEMMA, SMOLVLM):
        repo = hub / f"models--{name.replace('/', '--')}"
        for part in ("refs", "snapshots"):
            (repo / part).mkdir(parents=True, exist_ok=True)
        (repo / "refs" / "main").write_text("local")
        link = repo / "snapshots" / "local"
        if not link.is_symlink():
            link.symlink_to(models / name.rpartition("/")[2])
    return {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}


def tiny(policy: str, root: Path, output_dir: Path, models: Path, *more: str) -> list[str]:
    """Flags of a policy small enough for a CPU test; `more` overrides."""
    if policy in ("act", "diffusion"):
        make = {"act": tiny_act, "diffusion": tiny_diffusion}[policy]
        return [*make(root, output_dir), f"--assets.dir={models}", *more]
    flags = [flag for flag in common(root, output_dir) if "pretrained_backbone" not in flag]
    flags += [
        f"--policy.type={policy}",
        "--policy.chunk_size=8",
        "--policy.n_action_steps=8",
        "--policy.tokenizer_max_length=24",
        f"--assets.dir={models}",
    ]
    if policy == "smolvla":
        flags += ["--policy.resize_imgs_with_padding=[32,32]", "--policy.num_steps=2"]
    else:
        flags += [PLUGIN, "--policy.image_resolution=[28,28]", "--policy.num_inference_steps=2"]
    return [*flags, *more]


def save_base(policy: str, folder: Path, real: Path, models: Path, cameras: tuple[str, ...] = ()) -> None:
    """A pretrained policy in `folder`, made and saved by LeRobot's own classes. `cameras`: its names for them."""
    import draccus
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.configs.types import FeatureType
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.policies import make_policy, make_pre_post_processors
    from lerobot.utils.constants import OBS_IMAGES
    from lerobot.utils.feature_utils import dataset_to_policy_features

    import tiny_vla  # noqa: F401
    from ray_jobs.policies import assets

    flags = [f.replace("--policy.", "--") for f in tiny(policy, real, folder, models) if "--policy." in f]
    flags = [f for f in flags if not f.startswith("--type")]
    config = draccus.parse(PreTrainedConfig.get_choice_class(policy), args=flags)
    meta = LeRobotDatasetMetadata("local/real", root=real)
    if cameras:
        features = dataset_to_policy_features(meta.features)
        camera = next(f for f in features.values() if f.type is FeatureType.VISUAL)
        config.input_features = {key: f for key, f in features.items() if f.type is FeatureType.STATE}
        config.input_features |= {f"{OBS_IMAGES}.{name}": camera for name in cameras}
    with assets.mounted(models, config, weights=True):
        built = make_policy(config, ds_meta=meta, rename_map={"its": "own names"} if cameras else None)
        processors = make_pre_post_processors(config, dataset_stats=meta.stats)
    for saved in (built, *processors):
        saved.save_pretrained(folder)


def record_frames(real: Path, file: Path, count: int) -> Path:
    """Observations spread over an episode, for `acting.py`."""
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("local/real", root=real, episodes=[0], video_backend="pyav")
    frames = [dataset[row] for row in np.linspace(0, len(dataset) - 1, count).astype(int)]
    keys = [key for key in frames[0] if key.startswith("observation.")]
    columns = {key: np.stack([frame[key].numpy() for frame in frames]) for key in keys}
    np.savez(file, task=frames[0]["task"], **columns)
    return file


def acting(python: str, frames: Path, checkpoints: dict[str, Path], models: Path, out: Path) -> dict:
    """What checkpoints do with recorded frames in a LeRobot of its own: (frames, chunk, dims) of each."""
    out.mkdir()
    pairs = [f"{checkpoint}={out / name}.npy" for name, checkpoint in checkpoints.items()]
    command = [python, str(Path(__file__).parent / "run_alone" / "acting.py"), str(frames), *pairs]
    env = {**os.environ, **lerobots_environment(models)}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return {name: np.load(out / f"{name}.npy") for name in checkpoints}
