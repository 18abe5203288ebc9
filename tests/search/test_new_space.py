"""`--new-space`: what it writes is a space, for each of LeRobot's policies that can be searched; nothing is overwritten."""

import subprocess
import sys

import optuna
import pytest
import yaml

from ray_jobs import tune
from ray_jobs.config import flag_table
from ray_jobs.config.errors import InputError
from ray_jobs.policies.facts import facts_of
from ray_jobs.search.early_checks import check_search
from ray_jobs.search.spaces.new_space import SHIPPED, space_for
from ray_jobs.search.spaces.space import SearchSpace, encoded
from ray_jobs.search.spaces.space_file import read_space
from support.commands import ROOT
from support.data_sets import make
from support.searches import plan_of

ALL = flag_table.load().policies
POLICIES = [policy for policy in ALL if facts_of(policy).scored]


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_a_space_of_the_policy(tmp_path, policy):
    """Trial 0 has LeRobot's defaults, and what is searched is what the shipped space searches, if there is one."""
    file = tmp_path / "new.yaml"
    file.write_text(space_for(policy, str(file)))
    found, flags = read_space(file), flag_table.load().flags(policy)
    search = SearchSpace((found,), {})
    study = optuna.create_study()
    (params,) = search.baselines()
    study.enqueue_trial(params)
    first = search.suggest(study.ask())[1]
    assert all(encoded(first[flag]) == value for flag, value in params.items() if flag in first)
    for p in found.parameters:
        if p.drawn is not None and p.flag in first and p.allows(flags[p.flag].default):
            assert first[p.flag] == flags[p.flag].default, p.flag
    shipped = SHIPPED / f"{policy}.yaml"
    if shipped.is_file():
        assert [p.flag for p in found.parameters] == [p.flag for p in read_space(shipped).parameters]
    else:
        assert "tried on no data set" in file.read_text()
    for _ in range(5):
        assert found.violated(search.suggest(study.ask())[1]) is None


@pytest.mark.parametrize("policy", sorted({*ALL} - {*POLICIES}))
def test_what_cannot_be_validated_cannot_be_searched(tmp_path, policy):
    with pytest.raises(InputError, match=f"{policy} predicts only from .* nothing to go by"):
        space_for(policy, "FILE")
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"policy: {policy}\nsearch:\n  policy.optimizer_lr: {{low: 1.0e-6, high: 1.0e-2, log: true}}\n"
    )
    with pytest.raises(InputError, match=f"mine.yaml: {policy} predicts only from"):
        check_search({"dataset.repo_id": "a/b", "steps": "10", "space": str(file)})


def test_a_search_can_begin_with_it(tmp_path):
    content = yaml.safe_load(space_for("act", "new.yaml"))
    root = make(tmp_path / "numbers", [30, 30])
    assert "policy.kl_weight" in plan_of(tmp_path, root, content).space.describe()


def test_command(tmp_path, capsys, monkeypatch):
    command = [sys.executable, "-X", "importtime", "-m", "ray_jobs.tune", "--new-space=act"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not {"torch", "ray", "lerobot"} & {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines()
    }
    (tmp_path / "printed.yaml").write_text(done.stdout)
    file = tmp_path / "written.yaml"
    assert tune.main(["--new-space", "act", str(file)]) == 0
    assert read_space(tmp_path / "printed.yaml").parameters == read_space(file).parameters
    assert f"--space={file} --dry-run" in capsys.readouterr().out
    before = file.read_text()
    for words, told in (
        (["--new-space=pi0", str(file)], "nothing in it is overwritten"),
        (["--new-space=ac"], "did you mean act?"),
        (["--new-space"], "--new-space=act FILE writes"),
        (["--new-space=act", "--steps=3"], "takes nothing else"),
        (["--new-space=act", str(tmp_path / "no" / "file.yaml")], "cannot be written: No such file"),
    ):
        with pytest.raises(InputError, match=told):
            tune.main(words)
    assert file.read_text() == before
