"""Declared search spaces: what they draw, and every mistake told with file and line before anything is scheduled."""

from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import yaml
from conftest import ROOT
from optuna.trial import TrialState

from ray_jobs.engine.errors import InputError
from ray_jobs.engine.flags import check_flags
from ray_jobs.search import constraints
from ray_jobs.search.options import SAMPLERS, TuneOptions
from ray_jobs.search.plan import steps_between
from ray_jobs.search.searcher import DEATHS, StudyScheduler, StudySearch
from ray_jobs.search.space import SearchSpace, flags
from ray_jobs.search.space_file import read_space
from ray_jobs.search.study import make_sampler

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
    line = SimpleNamespace(forget_beat=SimpleNamespace(remote=forgotten.append))
    scheduler = StudyScheduler(search, line)
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
        if parameter.distribution is not None and not parameter.when:
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
    "unknown source": (GOOD.replace("same_as: policy.chunk_size", "same_as: policy.chunksize"), ":12: policy.n_action_steps: knows no policy.chunksize; did you mean policy.chunk_size?"),
    "source below": (GOOD.replace("policy.chunk_size: 50\n  ", "").replace("of: policy.optimizer_lr", "of: policy.chunk_size"), "it must stand above this line"),
    "unknown condition": (GOOD.replace("when: {policy.use_vae", "when: {policy.vae"), ":14: policy.kl_weight: knows no policy.vae"),
    "baseline outside": (GOOD.replace("chunk_size: 50", "chunk_size: 500"), ":3: the baseline's policy.chunk_size is 500, but 'search' allows 10 to 100"),
    "baseline no choice": (GOOD.replace("dim_model: 256", "dim_model: 64"), ":6: the baseline's policy.dim_model is 64"),
    "baseline silent": (GOOD.replace("  policy.chunk_size: 50\n", ""), ":10: policy.chunk_size: 'baseline' has no value"),
    "baseline against a constraint": (GOOD.replace("256 * 60", "256 * 40"), "the baseline breaks the constraint"),
    "no effect": (GOOD.replace("  policy.dim_model: {", "  optimizer.lr: {low: 1e-5, high: 1e-3}\n  policy.dim_model: {"), ":15: optimizer.lr would have no effect"),
    "baseline of all": (GOOD.replace("  policy.dim_model: 256\n", "  policy.dim_model: 256\n  data.eval_horizon: 3\n"), ":7: data.eval_horizon: only on the command line, it must be the same for all trials"),
    "derived otherwise": (GOOD.replace("  policy.dim_model: 256\n", "  policy.dim_model: 256\n  policy.dim_feedforward: 3200\n"), ":7: the baseline's policy.dim_feedforward is 3200, but 'search' makes it 1024"),
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
