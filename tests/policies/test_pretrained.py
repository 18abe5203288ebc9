"""What the published recipes name: their flags, and models and tokenizers fetched ahead into a folder."""

import json

import pytest
import torch
from huggingface_hub import constants, try_to_load_from_cache
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError
from ray_jobs.config.events import Log
from ray_jobs.policies import assets
from ray_jobs.storage.records import read_json
from support.commands import job, tiny_act, train_in_process
from support.hub import hub_with
from support.vla import RESNET, save_base, tiny


def tiny_tokenizer(folder) -> None:
    """A tokenizer of four words, as `hf download` would leave one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "sort": 2, "parts": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "paligemma"}))


def test_smolvla_flags_beside_a_checkpoint(no_network, parts, models, tmp_path):
    """Without a --policy.type, the checkpoint under its Hub name says whose flags these are."""
    save_base("smolvla", models / "smolvla_base", parts, models)
    flags = ["--policy.path=lerobot/smolvla_base", "--dataset.repo_id=a/b", f"--assets.dir={models}"]
    recipe = resolve(
        [
            *flags,
            "--policy.dtype=float32",
            "--policy.image_resolution=[28,28]",
            f"--output_dir={tmp_path / 'x'}",
        ]
    )
    assert recipe.lerobot.policy.resize_imgs_with_padding == (28, 28)
    (notice,) = (notice for notice in recipe.notices if "policy.dtype" in notice)
    assert (
        "is --policy.use_amp=false today" in notice
        and "loads the vision-language model in bfloat16" in notice
    )
    with pytest.raises(InputError, match="--policy.dtype=bfloat16: SmolVLA has no such switch"):
        resolve([*flags, "--policy.dtype=bfloat16"])
    assert no_network == []


def test_tokenizer_under_its_hub_name(no_network, tmp_path):
    """What LeRobot's pi0 processor asks for, from a folder without the Hub's name on it; and afterwards this process
    has the Hub and its cache back as they were."""
    name, before = "google/paligemma-3b-pt-224", (constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE)
    tiny_tokenizer(tmp_path / "pretrained" / "paligemma-3b-pt-224")
    with assets.mounted(tmp_path / "pretrained", PI0Config(device="cpu"), weights=True):
        assert AutoTokenizer.from_pretrained(name)("sort parts")["input_ids"] == [2, 3]
    assert no_network == []
    assert (constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE) == before
    assert try_to_load_from_cache(name, "tokenizer.json") is None


def test_policy_under_its_hub_name(no_network, parts, tmp_path):
    """A checkpoint in `pretrained/` is fine-tuned by its Hub name: no connection is tried, its weights are used."""
    flags = tiny_act(parts, tmp_path / "first", "--steps=2", "--seed=1")
    train_in_process(flags)
    start = tmp_path / "pretrained" / "some_org" / "tiny_act"
    start.parent.mkdir(parents=True)
    (tmp_path / "first/checkpoints/000002/pretrained_model").rename(start)
    common = [flag for flag in flags if not flag.startswith(("--policy.", "--output_dir"))]
    losses = {}
    for where in ("some_org/tiny_act", str(start)):
        output_dir = tmp_path / where.replace("/", "_")
        _, events = train_in_process(
            [
                *common,
                f"--policy.path={where}",
                "--policy.push_to_hub=false",
                f"--assets.dir={tmp_path / 'pretrained'}",
                f"--output_dir={output_dir}",
            ]
        )
        losses[where] = [event.values["train/loss"] for event in events if isinstance(event, Log)]
    assert losses["some_org/tiny_act"] == losses[str(start)]
    assert no_network == []


def test_the_rest_of_the_hub_stays_in_reach(parts, models, tmp_path):
    """As the short published commands: a base in the assets folder, a data set that only the Hub has, an upload at the
    end. The Hub is asked for the data set and offered the policy, and not asked for the base."""
    save_base("pi0", models / "pi0_base", parts, models)
    flags = [flag for flag in tiny("pi0", parts, tmp_path / "run", models) if "policy." not in flag]
    flags = [flag for flag in flags if not flag.startswith("--dataset.r")]
    flags += ["--policy.path=lerobot/pi0_base", "--policy.device=cpu", "--policy.push_to_hub=true"]
    flags += ["--dataset.repo_id=some_org/parts", "--policy.repo_id=me/trained", "--steps=1"]
    flags += ["--ray.num_workers=0"]
    with hub_with("some_org/parts", parts) as (address, asked):
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_of_nobody"}
        result = job("ray_jobs.train", *flags, **env)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert any(line.startswith("GET /datasets/some_org/parts/resolve/") for line in asked)
    assert "POST /api/repos/create" in asked and "not uploaded to me/trained" in result.stdout
    assert not [line for line in asked if "pi0_base" in line or "paligemma" in line]
    saved = json.loads((tmp_path / "run/checkpoints/000001/pretrained_model/train_config.json").read_text())
    assert saved["policy"]["pretrained_path"] == "lerobot/pi0_base"


def test_backbone_in_the_assets_folder(no_network, parts, models, tmp_path, monkeypatch):
    """ACT starts from torchvision's weights that lie there; what goes on from a checkpoint does without them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    flags = [f for f in tiny_act(parts, tmp_path / "run", "--save_freq=2") if "backbone_weights" not in f]
    train_in_process([*flags, f"--assets.dir={models}", "--steps=2"])
    saved = tmp_path / "run/checkpoints/000002/pretrained_model"
    assert read_json(saved / "config.json")["pretrained_backbone_weights"] == "ResNet18_Weights.IMAGENET1K_V1"
    weight = load_file(saved / "model.safetensors")["model.backbone.conv1.weight"]
    torch.testing.assert_close(weight, torch.load(models / RESNET)["conv1.weight"], rtol=0, atol=1e-3)
    summary, _ = train_in_process([*flags, "--steps=4", "--resume=true"])  # nothing in any folder
    assert summary["step"] == 4
    config = read_json(tmp_path / "run/checkpoints/000004/pretrained_model/config.json")
    assert config["pretrained_backbone_weights"] == "ResNet18_Weights.IMAGENET1K_V1"
    more = [
        f"--policy.path={saved}",
        "--policy.push_to_hub=false",
        f"--output_dir={tmp_path / 'tuned'}",
        "--steps=1",
    ]
    kept = [f for f in flags if not f.startswith(("--policy.", "--output_dir"))]
    summary, _ = train_in_process([*kept, *more, "--policy.device=cpu"])
    assert summary["step"] == 1 and no_network == []


def test_missing_asset_names_the_command(no_network, tmp_path):
    folder, policy = tmp_path / "pretrained", PI0Config(device="cpu")
    with pytest.raises(InputError) as refused, assets.mounted(folder, policy, weights=True):
        pass
    message = str(refused.value)
    assert f"hf download google/paligemma-3b-pt-224 --local-dir {folder}/paligemma-3b-pt-224" in message
    assert "accept the licence" in message and len(message.splitlines()) == 2
    (folder / "paligemma-3b-pt-224").mkdir(parents=True)
    with pytest.raises(InputError, match=r"has no config.json"), assets.mounted(folder, policy, weights=True):
        pass
