"""Declared search spaces: what they draw, and every mistake told with file and line before anything is scheduled."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import yaml
from lerobot.configs.policies import PreTrainedConfig
from optuna.trial import TrialState

from ray_jobs.cli.flags import check_flags
from ray_jobs.config.errors import InputError
from ray_jobs.search.options import SAMPLERS, TuneOptions
from ray_jobs.search.plan import steps_between
from ray_jobs.search.ray_tune import DEATHS, StudyScheduler, StudySearch
from ray_jobs.search.spaces import constraints
from ray_jobs.search.spaces.space import SearchSpace, flags
from ray_jobs.search.spaces.space_file import read_space
from ray_jobs.search.study.samplers import make_sampler
from support.commands import ROOT

SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
GOOD = """\
policy: act
baseline:
  policy.chunk_size: 50
  policy.use_vae: true
  policy.kl_weight: 10.0
  policy.dim_model: 256
  policy.optimizer_lr: 1e-5
search:
  policy.optimizer_lr: {low: 1e-6, high: 1e-3, log: true}
  policy.optimizer_lr_backbone: {scale: 0.1, of: policy.optimizer_lr}
  policy.chunk_size: {low: 10, high: 100, step: 10}
  policy.n_action_steps: {same_as: policy.chunk_size}
  policy.use_vae: {choices: [true, false]}
  policy.kl_weight: {low: 1.0, high: 100.0, log: true, when: {policy.use_vae: true}}
  policy.dim_model: {choices: [128, 256]}
  policy.dim_feedforward: {scale: 4, of: policy.dim_model}
constraints:
  - policy.dim_model * policy.chunk_size <= 256 * 60
"""


def space(tmp_path: Path, text: str):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    return read_space(file)


def test_drawn_configurations(tmp_path):
    """Ranges, derived values and conditions, in a hundred drawings; the study holds what was drawn, only that."""
    search = SearchSpace((space(tmp_path, GOOD),), {})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = set()
    for _ in range(100):
        trial = study.ask()
        _, config = search.suggest(trial)
        assert config["policy.type"] == "act"
        assert 1e-6 <= config["policy.optimizer_lr"] <= 1e-3
        assert config["policy.optimizer_lr_backbone"] == 0.1 * config["policy.optimizer_lr"]
        assert config["policy.chunk_size"] in range(10, 101, 10)
        assert config["policy.n_action_steps"] == config["policy.chunk_size"]
        assert config["policy.dim_feedforward"] == 4 * config["policy.dim_model"]
        assert isinstance(config["policy.dim_feedforward"], int)
        assert ("policy.kl_weight" in config) == config["policy.use_vae"]
        drawn = {"policy.optimizer_lr", "policy.chunk_size", "policy.use_vae", "policy.dim_model"}
        assert set(trial.params) - {"policy.kl_weight"} == drawn
        seen |= {config["policy.use_vae"], config["policy.dim_model"]}
    assert seen == {True, False, 128, 256}


def test_baseline_is_the_first_trial(tmp_path):
    search = SearchSpace((space(tmp_path, GOOD),), {})
    study = optuna.create_study()
    for params in search.baselines():
        study.enqueue_trial(params)
    _, config = search.suggest(study.ask())
    assert config["policy.chunk_size"] == 50 and config["policy.kl_weight"] == 10.0
    assert config["policy.optimizer_lr"] == 1e-5 and config["policy.n_action_steps"] == 50


def test_shortest_chunk(tmp_path):
    """Found also where the corner that has it breaks a constraint beside the baseline's values."""
    text = GOOD.replace(
        "policy.dim_model * policy.chunk_size <= 256 * 60", "policy.chunk_size >= policy.dim_model / 10"
    )
    found = space(tmp_path, text)
    assert min(c["policy.chunk_size"] for _, c in found.corners({}) if not found.violated(c)) > 10
    assert {c["policy.chunk_size"] for c in found.chunk_corners({})} == {10, 100}


@pytest.mark.parametrize(
    "sampler", [pytest.param(s, marks=pytest.mark.slow) if s == "gp" else s for s in SAMPLERS]
)
def test_small_spaces_are_searched_whole(tmp_path, sampler):
    """No configuration twice, and a model that has found its optimum does not take the space for exhausted."""
    small = """\
policy: act
baseline: {policy.n_encoder_layers: 1, policy.n_decoder_layers: 1, policy.use_vae: true}
search:
  policy.n_encoder_layers: {low: 1, high: 4}
  policy.n_decoder_layers: {low: 1, high: 4}
  policy.use_vae: {choices: [true, false]}
"""
    options = TuneOptions(num_samples=32, sampler=sampler)
    study = optuna.create_study(sampler=make_sampler(options, 0))
    search = StudySearch(
        study, SearchSpace((space(tmp_path, small),), {}), options, 0, 10, lambda event: None
    )
    seen = set()
    while isinstance(config := search.suggest(str(len(seen))), dict):
        encoder, decoder = (int(flag[-1]) for flag in config["flags"] if "layers" in flag)
        value = (encoder - 2) ** 2 + (decoder - 3) ** 2
        search.on_trial_complete(
            str(len(seen)), {"status": "finished", "val/action_error": value, "step": 10}
        )
        assert tuple(config["flags"]) not in seen
        seen.add(tuple(config["flags"]))
    assert len(seen) >= 28


def test_a_trial_whose_slot_was_dead_is_tried_again(tmp_path):
    """Its node was lost, say, before it could begin: Ray Tune gives it up at once. One that dies at work is a FAIL."""
    options = TuneOptions(num_samples=1, sampler="random")
    study = optuna.create_study(sampler=make_sampler(options, 0))
    search = StudySearch(study, SearchSpace((space(tmp_path, GOOD),), {}), options, 0, 10, lambda event: None)
    forgotten: list[str] = []  # by the watchdog
    channel = SimpleNamespace(forget_heartbeat=SimpleNamespace(remote=forgotten.append))
    scheduler = StudyScheduler(search, channel)
    first = search.suggest("0")
    for number, status in enumerate(["PENDING"] * DEATHS + ["RUNNING"]):
        assert study.trials[0].state == TrialState.RUNNING
        trial = SimpleNamespace(trial_id=str(number), status=status, PENDING="PENDING", config=first)
        scheduler.on_trial_error(None, trial)
        search.on_trial_complete(str(number), error=True)
        if status == "PENDING":
            assert search.suggest(str(number + 1)) == first
    assert study.trials[0].state == TrialState.FAIL and len(study.trials) == 1
    assert search.suggest("end") == search.FINISHED and forgotten == ["0000"] * (DEATHS + 1)


def test_an_error_of_the_study_ends_the_search(tmp_path):
    """Its file is gone, say: no exception for Ray Tune to take for the trial's, and the reason is kept."""
    file = tmp_path / "study.db"
    study = optuna.create_study(storage=f"sqlite:///{file}", sampler=make_sampler(TuneOptions(), 0))
    search = StudySearch(
        study, SearchSpace((space(tmp_path, GOOD),), {}), TuneOptions(), 0, 10, lambda event: None
    )
    assert isinstance(search.suggest("0"), dict)
    file.write_bytes(b"not a database")
    assert search.judge("0", {"val/action_error": 1.0, "step": 5}) is False
    search.on_trial_complete("0", {"status": "finished", "val/action_error": 1.0})
    assert search.failure is not None and search.suggest("1") == search.FINISHED


def test_what_the_user_types_is_not_searched(tmp_path):
    search = SearchSpace((space(tmp_path, GOOD),), {"policy.chunk_size": 8, "policy.use_vae": False})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    _, config = search.suggest(trial)
    assert config["policy.chunk_size"] == config["policy.n_action_steps"] == 8
    assert "policy.chunk_size" not in trial.params and "policy.kl_weight" not in config
    assert "policy.chunk_size" not in search.describe()


def test_several_policies_in_one_search():
    """The policy is a choice; parameters of one are no parameters of the other."""
    search = SearchSpace(
        tuple(read_space(ROOT / f"search_spaces/{name}.yaml") for name in ("act", "diffusion")), {}
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for params in search.baselines():
        study.enqueue_trial(params)
    configs = [search.suggest(study.ask()) for _ in range(20)]
    assert [config["policy.type"] for _, config in configs[:2]] == ["act", "diffusion"]
    assert {config["policy.type"] for _, config in configs[2:]} == {"act", "diffusion"}
    for trial, (_, config) in zip(study.trials, configs, strict=True):
        names = {name for name in trial.params if "/" in name}
        assert names and all(name.startswith(config["policy.type"] + "/") for name in names)


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_shipped_spaces(file):
    """LeRobot knows every flag, the baseline lies inside, all ends keep the constraints or are few that do not."""
    shipped = read_space(file)
    assert shipped.policy == file.stem.partition("_")[0]
    corners = list(shipped.corners({}))
    assert len(corners) >= 2 * len(shipped.parameters)
    for _, config in corners:
        words = {
            "dataset.repo_id": "a/b",
            **{w[2:].partition("=")[0]: w.partition("=")[2] for w in flags(config)},
        }
        check_flags(words)
    assert sum(shipped.violated(config) is not None for _, config in corners) <= 2
    for parameter in shipped.parameters:
        if parameter.drawn is not None and not parameter.when:
            assert parameter.flag in shipped.baseline


MISTAKES = {
    "not YAML": ("policy: [", "not YAML"),
    "a list": ("- policy", "must be a mapping"),
    "unknown section": (GOOD.replace("search:", "serach:"), ":8: unknown section 'serach'; did you mean search?"),
    "no policy": (GOOD.replace("policy: act", "policy:"), ":1: 'policy: act'"),
    "nothing searched": ("policy: act\nbaseline: {}\n", "'search' is missing"),
    "a flag twice": (GOOD + "  - 1 < 2\nbaseline: {}\n", "'baseline' stands here twice"),
    "no range": (GOOD.replace("{same_as: policy.chunk_size}", "5"), ":12: policy.n_action_steps: must be a range"),
    "unknown key": (GOOD.replace("step: 10", "stepp: 10"), ":11: policy.chunk_size: unknown key 'stepp'; did you mean step?"),
    "no high": (GOOD.replace("low: 10, high: 100", "low: 10"), "policy.chunk_size: 'high' is missing"),
    "empty range": (GOOD.replace("low: 10, high: 100", "low: 100, high: 10"), "low 100 must be less than high 10"),
    "log of nothing": (GOOD.replace("low: 1e-6", "low: 0"), ":9: policy.optimizer_lr: a logarithmic range must begin above 0"),
    "log and step": (GOOD.replace("step: 10", "step: 10, log: true"), "'log' and 'step' exclude each other"),
    "wide step": (GOOD.replace("step: 10", "step: 200"), "step 200 must be above 0 and at most 90"),
    "a word": (GOOD.replace("high: 100.0", "high: much"), ":14: policy.kl_weight: high: much must be a number"),
    "one choice": (GOOD.replace("[128, 256]", "[256]"), "at least two values"),
    "a choice twice": (GOOD.replace("[128, 256]", "[256, 256]"), "a choice stands there twice"),
    "scale of what": (GOOD.replace("scale: 0.1, of: policy.optimizer_lr", "scale: 0.1"), "'of' is missing"),
    "unknown source": (GOOD.replace("same_as: policy.chunk_size", "same_as: policy.chunksize"), ":12: policy.n_action_steps: no such flag as policy.chunksize; did you mean policy.chunk_size?"),
    "unknown condition": (GOOD.replace("when: {policy.use_vae", "when: {policy.vae"), ":14: policy.kl_weight: no such flag as policy.vae; did you mean policy.use_vae?"),
    "baseline outside": (GOOD.replace("chunk_size: 50", "chunk_size: 500"), ":3: the baseline's policy.chunk_size is 500, but 'search' allows 10 to 100"),
    "baseline no choice": (GOOD.replace("dim_model: 256", "dim_model: 64"), ":6: the baseline's policy.dim_model is 64"),
    "baseline against a constraint": (GOOD.replace("256 * 60", "256 * 40"), "the baseline breaks the constraint"),
    "no effect": (GOOD.replace("  policy.dim_model: {", "  optimizer.lr: {low: 1e-5, high: 1e-3}\n  policy.dim_model: {"), ":15: optimizer.lr would have no effect"),
    "baseline of all": (GOOD.replace("  policy.dim_model: 256\n", "  policy.dim_model: 256\n  data.eval_horizon: 3\n"), ":7: data.eval_horizon: only on the command line, it must be the same for all trials"),
    "derived otherwise": (GOOD.replace("  policy.dim_model: 256\n", "  policy.dim_model: 256\n  policy.dim_feedforward: 3200\n"), ":7: the baseline's policy.dim_feedforward is 3200, but 'search' makes it 1024"),
    "a circle": (GOOD.replace("same_as: policy.chunk_size", "same_as: policy.dim_feedforward").replace("of: policy.dim_model", "of: policy.n_action_steps"), ":12: policy.n_action_steps: stands in a circle: policy.n_action_steps needs policy.dim_feedforward needs policy.n_action_steps."),
    "a circle of values in the baseline": ("policy: act\nbaseline: {policy.dim_model: 32, policy.dim_feedforward: 64}\nsearch:\n  policy.dropout: {low: 0, high: 1}\n  policy.dim_model: {same_as: policy.dim_feedforward}\n  policy.dim_feedforward: {same_as: policy.dim_model}\n", ":5: policy.dim_model: stands in a circle"),
    "a circle of conditions": (GOOD.replace("[true, false]}", "[true, false], when: {policy.kl_weight: 10.0}}"), ":13: policy.use_vae: stands in a circle: policy.use_vae needs policy.kl_weight needs policy.use_vae."),
    "a circle of its own": (GOOD.replace("[128, 256]}", "[128, 256], when: {policy.dim_model: 128}}"), ":15: policy.dim_model: stands in a circle"),
    "no such flag": (GOOD.replace("policy.dropout", "").replace("  policy.dim_model: {", "  policy.dropuot: {low: 0, high: 1}\n  policy.dim_model: {"), ":15: policy.dropuot: no such flag; did you mean policy.dropout?"),
    "parts of a whole number": (GOOD.replace("low: 10, high: 100, step: 10", "low: 10.5, high: 100"), ":11: policy.chunk_size: low: 10.5 must be a whole number"),
    "a part of a whole number": (GOOD.replace("[128, 256]", "[128, 256.5]"), ":15: policy.dim_model: choice 256.5 must be a whole number."),
    "a range of no numbers": (GOOD.replace("{choices: [true, false]}", "{low: 0, high: 1}"), ":13: policy.use_vae: no range, for it takes true or false"),
    "a truth that is none": (GOOD.replace("use_vae: true\n", "use_vae: perhaps\n"), ":4: policy.use_vae: perhaps must be true or false."),
    "a condition that cannot be": (GOOD.replace("when: {policy.use_vae: true}", "when: {policy.use_vae: 3}"), ":14: policy.kl_weight: when policy.use_vae 3 must be true or false."),
    "scale of a truth": (GOOD.replace("of: policy.dim_model", "of: policy.use_vae"), ":16: policy.dim_feedforward: policy.use_vae cannot be scaled"),
    "nothing to begin from": (GOOD.replace("  policy.dim_model: {", "  policy.temporal_ensemble_coeff: {low: 0, high: 1}\n  policy.dim_model: {"), ":15: policy.temporal_ensemble_coeff: LeRobot's default for policy.temporal_ensemble_coeff is none: 'baseline' must say where to begin"),
    "a default outside": (GOOD.replace("  policy.dim_model: {", "  policy.latent_dim: {low: 2, high: 8}\n  policy.dim_model: {"), ":15: policy.latent_dim: LeRobot's default, 32, is outside: 'baseline' must say where to begin."),
    "decided elsewhere": (GOOD.replace("  policy.dim_model: 256\n", "  policy.dim_model: 256\n  ray.num_workers: 2\n"), ":7: ray.num_workers: --tune.workers_per_trial says"),
    "code": (GOOD.replace("policy.dim_model * policy.chunk_size <= 256 * 60", "print(1) < 2"), ":18: constraint 'print(1) < 2': must be a comparison"),
    "no comparison": (GOOD.replace(" <= 256 * 60", ""), "must be a comparison"),
    "constraint on what": (GOOD.replace("policy.dim_model *", "policy.dim_modle *"), ":18: constraint 'policy.dim_modle"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_with_file_and_line(tmp_path, mistake):
    text, told = MISTAKES[mistake]
    with pytest.raises(InputError) as refused:
        space(tmp_path, text)
    message = str(refused.value)
    assert told in message and "space.yaml:" in message and len(message.splitlines()) <= 2, message


# As they are spelled; what a flag takes is another matter.
SPELLED = """\
policy: act
baseline: {policy.dropout: 0, policy.kl_weight: 10, batch_size: 8, policy.optimizer_lr: 1e-5}
search:
  policy.dropout: {low: 0, high: 1}
  policy.kl_weight: {low: 1, high: 100, log: true}
  policy.optimizer_lr: {choices: [1, 1e-5, "1e-4"]}
  batch_size: {low: 4.0, high: 1e1, step: 2}
  policy.optimizer_weight_decay: {scale: 0.25, of: batch_size}
  policy.dim_feedforward: {scale: 100.4, of: policy.kl_weight}
"""


def test_the_type_is_the_flags(tmp_path):
    """Not its spelling's: 0 to 1 has something in between where the flag is a number, and what follows from a whole
    number need not be one."""
    search = SearchSpace((space(tmp_path, SPELLED),), {})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    configs = [search.suggest(study.ask())[1] for _ in range(50)]
    for name, low, high in (("policy.dropout", 0, 1), ("policy.kl_weight", 1, 100)):
        values = {config[name] for config in configs}
        assert len(values) == 50 and all(isinstance(v, float) and low <= v <= high for v in values)
    assert {config["policy.optimizer_lr"] for config in configs} == {1, 1e-5, 1e-4}
    for config in configs:
        assert config["batch_size"] in (4, 6, 8, 10) and isinstance(config["batch_size"], int)
        assert config["policy.optimizer_weight_decay"] == 0.25 * config["batch_size"]
        assert config["policy.dim_feedforward"] == round(100.4 * config["policy.kl_weight"])
    assert isinstance(configs[0]["policy.dim_feedforward"], int)


def test_texts_stay_as_they_are_spelled(tmp_path):
    """YAML reads numbers, truth values and days where a flag takes a text, or a path."""
    texts = {
        "policy.repo_id": "2026-11-30",
        "wandb.project": "1e5",
        "wandb.notes": "no",
        "wandb.entity": "0123",
        "wandb.mode": "off",
    }
    text = "policy: act\nbaseline:\n" + "".join(f"  {flag}: {value}\n" for flag, value in texts.items())
    found = space(
        tmp_path, text + "search:\n  wandb.mode: {choices: [off, 1e3]}\n  policy.dropout: {low: 0, high: 1}\n"
    )
    config = SearchSpace((found,), {}).suggest(optuna.create_study().ask())[1]
    assert {flag: config[flag] for flag in texts} == texts | {"wandb.mode": config["wandb.mode"]}
    assert config["wandb.mode"] in ("off", "1e3")


def test_what_the_baseline_does_not_say(tmp_path):
    """LeRobot's defaults are trial 0, and count in conditions and constraints; the user hears of it."""
    text = """\
policy: act
search:
  policy.optimizer_lr: {low: 1e-6, high: 1e-3, log: true}
  policy.kl_weight: {low: 1, high: 100, log: true, when: {policy.use_vae: true}}
  policy.latent_dim: {low: 2, high: 8, when: {policy.pre_norm: true}}
  policy.dim_feedforward: {scale: 4, of: policy.dim_model}
constraints:
  - policy.dim_model % policy.n_heads == 0
"""
    found = space(tmp_path, text)
    search = SearchSpace((found,), {})
    study = optuna.create_study()
    for params in search.baselines():
        study.enqueue_trial(params)
    first = search.suggest(study.ask())[1]
    default = PreTrainedConfig.get_choice_class("act")()
    assert (
        first["policy.optimizer_lr"] == default.optimizer_lr
        and first["policy.kl_weight"] == default.kl_weight
    )
    assert first["policy.dim_feedforward"] == 4 * default.dim_model and "policy.latent_dim" not in first
    drawn = search.suggest(study.ask())[1]
    assert drawn["policy.kl_weight"] != default.kl_weight
    (notice,) = found.notices
    assert "LeRobot's defaults hold" in notice and "policy.optimizer_lr=1e-05" in notice
    assert "policy.use_vae=true" in notice and "policy.n_heads=8" in notice and "latent_dim" not in notice
    assert "policy.kl_weight" not in SearchSpace((found,), {"policy.use_vae": False}).suggest(study.ask())[1]


def test_a_pretrained_policy_has_defaults_of_its_own(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"type": "act", "dropout": 0.25}))
    text = "policy: act\nsearch:\n  policy.dropout: {low: 0, high: 1}\n"
    (tmp_path / "space.yaml").write_text(text)
    found = read_space(tmp_path / "space.yaml", {"policy.path": str(tmp_path / "base")})
    assert found.baseline == {"policy.dropout": 0.25}
    with pytest.raises(InputError, match="is not known here: 'baseline' must say"):
        read_space(tmp_path / "space.yaml", {"policy.path": "somebody/policy"})


def test_entries_may_stand_in_any_order(tmp_path):
    """What follows from another is found, wherever that stands."""
    first, second = (
        "  policy.n_action_steps: {same_as: policy.chunk_size}\n",
        "  policy.chunk_size: {low: 10, high: 100, step: 10}\n",
    )
    text = GOOD.replace(second + first, first + second)
    assert text != GOOD
    for swapped in (text, text.replace("  policy.chunk_size: 50\n", "").replace("256 * 60", "256 * 100")):
        search = SearchSpace((space(tmp_path, swapped),), {})
        config = search.suggest(optuna.create_study().ask())[1]
        assert config["policy.n_action_steps"] == config["policy.chunk_size"]


def test_stored_studies_know_their_space(tmp_path):
    """What the version of November 2026 wrote into studies for this space: they go on."""
    stored = (
        """[["act", {"policy.chunk_size": "50", "policy.dim_model": "256", "policy.kl_weight": "10.0", "policy.optimizer_lr": "1e-05", """
        """"policy.use_vae": "True"}, ["policy.optimizer_lr FloatDistribution(high=0.001, log=True, low=1e-06, step=None) None None {}", """
        """"policy.optimizer_lr_backbone None policy.optimizer_lr 0.1 {}", "policy.chunk_size IntDistribution(high=100, log=False, """
        """low=10, step=10) None None {}", "policy.n_action_steps None policy.chunk_size None {}", "policy.use_vae """
        """CategoricalDistribution(choices=(True, False)) None None {}", "policy.kl_weight FloatDistribution(high=100.0, log=True, """
        """low=1.0, step=None) None None {'policy.use_vae': [True]}", "policy.dim_model CategoricalDistribution(choices=(128, 256)) """
        """None None {}", "policy.dim_feedforward None policy.dim_model 4 {}"], ["policy.dim_model * policy.chunk_size <= 256 * 60"]]]"""
    )
    assert SearchSpace((space(tmp_path, GOOD),), {}).fingerprint() == stored


def test_all_mistakes_at_once_and_without_lerobot(tmp_path):
    """In both files, in the order of their lines, and before anything large is imported."""
    files = [tmp_path / name for name in ("one.yaml", "two.yaml")]
    text = GOOD.replace("policy.optimizer_lr: 1e-5", "policy.optimiser_lr: 1e-5").replace(
        "log: true}", "log: maybe}", 1
    )
    files[0].write_text(
        text.replace("high: 100, step: 10", "high: 100, stepp: 10").replace("[128, 256]", "[128, much]")
    )
    files[1].write_text("policy: actt\nserach: {}\n")
    command = [
        "import sys, time; start = time.monotonic()",
        "from ray_jobs.search.spaces.chosen import read_spaces",
        "from ray_jobs.config.errors import InputError",
        f"words = {{'space': '{files[0]},{files[1]}'}}",
        "try: read_spaces(words, [])",
        "except InputError as error: print(error)",
        "heavy = {'torch', 'lerobot', 'ray', 'optuna', 'transformers', 'diffusers', 'datasets'} & set(sys.modules)",
        "assert not heavy, heavy",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(command)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    for line, (file, number, what) in zip(told, [
        (0, 7, "policy.optimiser_lr: no such flag; did you mean policy.optimizer_lr?"),
        (0, 9, "policy.optimizer_lr: log: maybe must be true or false."),
        (0, 11, "policy.chunk_size: unknown key 'stepp'; did you mean step?"),
        (0, 15, "policy.dim_model: choice much must be a whole number."),
        (1, 1, "'search' is missing: what shall be varied?"),
        (1, 1, "there is no policy actt; did you mean act?"),
        (1, 2, "unknown section 'serach'; did you mean search?"),
    ], strict=True):  # fmt: skip
        assert line == f"{files[file]}:{number}: {what}"


def test_yaml_cannot_make_objects(tmp_path):
    with pytest.raises(InputError, match="not YAML"):
        space(tmp_path, "policy: !!python/object/apply:os.system ['true']\n")
    assert yaml.safe_load(GOOD)["policy"] == "act"


def test_constraints():
    config = {"a.x": 4, "a.y": 2}
    assert constraints.holds("a.x % a.y == 0 and a.x > 3", config)
    assert not constraints.holds("a.x < a.y or a.y != 2", config)
    assert constraints.holds("0 < a.y <= a.x / 2", config)
    assert constraints.holds("a.z == 1", config)  # nothing is said of flags that are not there
    for text in ("__import__('os').x < 1", "a.x", "a.x < f(1)", "[1] < [2]", "a.x <", "lambda: 1 < 2"):
        with pytest.raises((ValueError, SyntaxError)):
            constraints.names(text)


def test_steps_before_the_first_verdict():
    """An eighth of a trial, but not less than 25 steps where a quarter has as many."""
    assert [steps_between(steps) for steps in (2000, 220, 120, 40, 2)] == [250, 28, 25, 10, 1]
