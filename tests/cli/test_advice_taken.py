"""What a refusal advises is not refused itself, and does what it says."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_jobs import doctor, train
from ray_jobs.checks import preflight
from ray_jobs.checks.output_dir import RUN, check_output_dir
from ray_jobs.cli.command_line import read_flags
from ray_jobs.cli.resolve import resolve
from ray_jobs.cli.terminal import Display
from ray_jobs.cluster import resources
from ray_jobs.config.errors import InputError
from ray_jobs.config.options import OPTIONS_FILE
from ray_jobs.policies import assets
from ray_jobs.search.options import TuneOptions
from ray_jobs.storage import mirror
from ray_jobs.training import tracking
from ray_jobs.training.memory import Memory
from support.advice import other_programs, parse_other
from support.commands import tiny_act, train_in_process
from support.vla import tiny


def check(*flags: str) -> None:
    preflight.check(resolve(flags))


def refusal(*flags: str) -> str:
    with pytest.raises(InputError) as refused:
        check(*flags)
    return str(refused.value)


def advised_in(message: str, typed: list[str]) -> list[str]:
    """The flags with values that a refusal names, beside those that it repeats."""
    words = shlex.split(re.sub(r"(?<=\w)'(?=\w)", "’", message))
    words = [word.rstrip(".,;:)") for word in words if word.startswith("--") and "=" in word]
    repeated = {f"--{name}={value}" for name, value in read_flags(typed)[0].items()}
    return [word for word in words if word not in repeated]


REFUSED = {
    "upload": ["--policy.push_to_hub=true"],
    "validation without episodes": ["--eval_steps=1"],
    "patience without validation": ["--ray.early_stopping=2"],
    "W&B without a login": ["--wandb.enable=true"],
    "a simulator beside shares": ["--ray.parallelism=fsdp", "--env.type=part_sorting", "--env_eval_freq=1"],
    "a backbone without a network": ["--policy.pretrained_backbone_weights=ResNet18_Weights.IMAGENET1K_V1"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_flags_that_a_refusal_names(parts, tmp_path, no_network, monkeypatch, case):
    """Each of them alone is taken."""
    monkeypatch.setattr(tracking, "_wandb_login", lambda: False)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    typed = [*tiny_act(parts, tmp_path / "run", f"--assets.dir={tmp_path}"), *REFUSED[case]]
    advised = advised_in(refusal(*typed), typed)
    assert advised
    for flag in advised:
        check(*typed, flag)


def test_cameras_without_statistics(parts, tmp_path):
    root = shutil.copytree(parts, tmp_path / "set")
    stats = json.loads((root / "meta/stats.json").read_text())
    del stats["observation.images.top"]
    (root / "meta/stats.json").write_text(json.dumps(stats))
    typed = tiny_act(root, tmp_path / "run")
    (flag,) = advised_in(refusal(*typed), typed)
    check(*typed, flag)


SAVED = {
    "act": [],
    "act with an average": ["--ray.ema=true"],
    "act on two to three workers": ["--ray.num_workers=2:3"],
    "act in a simulator": ["--env.type=part_sorting", "--env_eval_freq=1", "--eval.use_async_envs=false"],
    "smolvla": [],
}


@pytest.mark.parametrize("case", SAVED)
def test_what_makes_memory_less(parts, models, tmp_path, case):
    flags = tiny(case.split()[0], parts, tmp_path / "run", models, *SAVED[case])
    recipe = resolve(flags)
    told = (
        Memory(weights=10, gradients=10, optimizer=20, activations=0, building=0).savings(recipe).split("; ")
    )
    assert ("--ray.parallelism=fsdp --ray.num_workers=2" in told) == (case in ("act", "smolvla"))
    for change in told:
        check(*flags, *change.split())


def test_adapters_are_advised_where_lerobot_knows_where_to_put_them(run, parts, tmp_path):
    """Of ACT it does not."""
    saved = run / "checkpoints/000002/pretrained_model"
    flags = [f for f in tiny_act(parts, tmp_path / "run") if not f.startswith("--policy.type")]
    flags.append(f"--policy.path={saved}")
    told = Memory(weights=10, gradients=10, optimizer=20, activations=0, building=0).savings(resolve(flags))
    assert "--peft" not in told and "target_modules" in refusal(*flags, "--peft.method_type=LORA")


def test_commands_with_a_folder_of_an_odd_name(parts, tmp_path, capsys):
    """The last screen's command continues the run, and the one that fetches a model puts it where it is looked for."""
    folder = tmp_path / "second try #2"
    summary, _ = train_in_process(tiny_act(parts, folder, "--steps=1"))
    train._last_screen(summary, Display(), 1.0, None)
    (command,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("continue"))
    words = shlex.split(command)
    assert words[1:4] == ["python", "-m", "ray_jobs.train"]
    summary, _ = train_in_process(words[4:])
    assert (summary["step"], summary["output_dir"]) == (2, str(folder))

    programs = other_programs()
    parse_other(programs, assets._command(folder, "google/paligemma-3b-pt-224"))
    _, _, name, _, place = shlex.split(assets._command(folder, "google/paligemma-3b-pt-224"))
    Path(place).mkdir(parents=True)
    assert assets.find(folder, name) == Path(place)


def test_optimizer_of_ones_own(parts, tmp_path):
    typed = tiny_act(parts, tmp_path / "run", "--use_policy_training_preset=false")
    told = refusal(*typed)
    assert "needs --optimizer.type and --scheduler.type" in told
    more = ["--scheduler.peak_lr=1e-4", "--scheduler.decay_lr=1e-5", "--scheduler.num_warmup_steps=1"]
    more += ["--scheduler.num_decay_steps=9", "--scheduler.type=cosine_decay_with_warmup"]
    check(*typed, "--optimizer.type=adamw", *more)


def test_what_can_be_continued(run, tmp_path):
    with pytest.raises(InputError, match="--resume=true"):
        check_output_dir(run, RUN)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError) as refused:
        check_output_dir(tmp_path, RUN)
    assert "--resume" not in str(refused.value)
    assert "nothing to resume" in refusal("--resume=true", f"--output_dir={tmp_path}")
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    for name, begun in (("notes.txt", False), (OPTIONS_FILE, True)):
        (bucket / name).touch()
        with pytest.raises(InputError, match="already exists") as refused:
            mirror.check_new(f"file://{bucket}")
        assert ("--resume=true" in str(refused.value)) == begun


def test_cpus_that_are_left_to_decode(monkeypatch):
    monkeypatch.setattr(resources, "nodes", lambda: [{"CPU": 4.0}])
    monkeypatch.setattr(resources, "may_grow", lambda: False)
    for cpus in (1, 2, 4):
        with pytest.raises(InputError, match="Leave --ray.cpus_per_worker out"):
            resources.per_worker(4 // cpus, cpus, 0, "cpu", decoders=True)
        resources.per_worker(4 // cpus, None, 0, "cpu", decoders=True)
    with pytest.raises(InputError, match="Fewer workers"):
        resources.per_worker(7, None, 0, "cpu", decoders=True)
    resources.per_worker(6, None, 0, "cpu", decoders=True)


def test_driver_of_a_database(monkeypatch):
    """It is advised where it is missing, not where the server is."""
    from ray_jobs.search.study.begin import open_study

    storage = "postgresql://me@127.0.0.1:1/studies"
    plan = SimpleNamespace(
        options=SimpleNamespace(tune=TuneOptions(storage=storage)), study_name="s", output_dir=Path("s")
    )
    with pytest.raises(InputError) as refused:
        open_study(plan, 0)
    assert "pip install" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match=r"pip install 'psycopg\[binary\]'"):
        open_study(plan, 0)


@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (720, 1280), (300, 280), (1080, 300)])
def test_size_that_doctor_advises(shape):
    """It keeps an image's proportions, and is not larger, which is refused."""
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    camera = {"observation.images.top": {"shape": [*shape, 3]}}
    (text,) = doctor._advice({"cameras": camera}, None, ACTConfig())
    height, width = json.loads(re.search(r"--data.resize='(.*?)'", text)[1])
    assert height < shape[0] and width < shape[1]
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.01)
    wide = DiffusionConfig(resize_shape=(96, 2000))
    assert "2000" not in "".join(doctor._advice({"cameras": camera}, None, wide))
    depth = {"observation.images.top": {"shape": [*shape, 1], "depth": True}}
    assert doctor._advice({"cameras": depth}, None, ACTConfig()) == []


def test_renaming_is_advised_where_lerobot_renames(parts, tmp_path):
    """For a policy that is new it refuses to."""
    takes = '{"observation.images.other": {"type": "VISUAL", "shape": [3, 64, 64]}}'
    told = refusal(*tiny_act(parts, tmp_path / "run", f"--policy.input_features={takes}"))
    assert "lacks observation.images.other" in told and "--rename_map" not in told
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.envs.configs import EnvConfig
    from lerobot.policies.act.configuration_act import ACTConfig

    import ray_jobs.part_sorting  # noqa: F401
    from ray_jobs.training import simulator

    env = EnvConfig.get_choice_class("part_sorting")()
    options = simulator.SimulatorOptions(env)
    other = {"observation.images.other": PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}
    for start, helps in ((None, False), (Path("base"), True)):
        policy = ACTConfig(input_features=other, pretrained_path=start)
        with pytest.raises(InputError) as refused:
            simulator.check(options, policy, {})
        assert ("--rename_map" in str(refused.value)) == helps
