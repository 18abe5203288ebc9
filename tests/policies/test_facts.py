"""What is known of single policies stands in one table: a sixth policy is an entry there, and no other file knows it by name."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import lerobot.policies  # noqa: F401  (registers their configs)
import pytest
from lerobot.configs.policies import PreTrainedConfig

import ray_jobs
from ray_jobs.config import flag_table
from ray_jobs.policies.facts import FACTS, PolicyFacts, facts_of
from support.vla import ALL

PACKAGE = Path(ray_jobs.__file__).parent
KNOWN = flag_table.load().policies
# Where a policy is named all the same, and how often.
ALLOWED = {
    ("doctor.py", "act"): 1,  # that is measured if none is asked for
    ("cli/flags.py", "act"): 1,  # the example in a help text
    ("cli/translations.py", "smolvla"): 3,  # flags of its older recipes: a table of such flags
}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if PACKAGE / "policies" not in path.parents]


def test_no_other_module_knows_a_policy_by_name():
    found: dict[tuple[str, str], int] = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in KNOWN:
                place = (str(path.relative_to(PACKAGE)), node.value)
                found[place] = found.get(place, 0) + 1
    assert found == ALLOWED


def test_no_other_module_imports_a_policys_code():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith(tuple(f"lerobot.policies.{policy}" for policy in KNOWN)), path


def test_every_policy_that_is_trained_has_an_entry():
    assert {*ALL, "multi_task_dit", "tdmpc", "vqbet"} <= FACTS.keys() <= set(KNOWN)


@pytest.mark.parametrize("policy", FACTS)
def test_the_fields_that_it_names_are_in_lerobots_config(policy):
    config, facts = PreTrainedConfig.get_choice_class(policy), FACTS[policy]
    named = [*facts.tokenizer_fields, *facts.model_fields, *facts.kept_fields, *facts.idle_without_cameras]
    named += [*facts.idle_without, *(name for names in facts.idle_without.values() for name in names)]
    named += [switch for switch in facts.model_fields.values() if switch]
    named += [facts.parsed_field, facts.network_field, facts.graphed_field]
    named += [facts.size_field] if facts.size_field != PolicyFacts.size_field else []
    named += ["load_vlm_weights"] if facts.bfloat16_part or facts.loaded_weights_only else []
    named += ["horizon", "n_obs_steps", "n_action_steps"] if facts.predicts_past else []
    assert {name for name in named if name} <= {field.name for field in dataclasses.fields(config)}


def test_it_is_read_before_lerobot_is_imported():
    code = "import sys, ray_jobs.policies.facts; print(*{'torch', 'lerobot', 'ray', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


def test_a_policy_without_an_entry_is_treated_with_care():
    unknown = facts_of("a_plugins")
    assert unknown.imports and unknown.unused_parameters and not (unknown.counted or unknown.exported)
