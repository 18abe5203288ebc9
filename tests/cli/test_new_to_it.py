"""What somebody types who has read the README alone: each slip is answered with what would be right, before anything large
is imported."""

import importlib
import re
import sys

import pytest

from ray_jobs.cli.command_line import asks_to_resume, listed, read_flags
from ray_jobs.cli.early_checks import check_command
from ray_jobs.config.errors import InputError
from ray_jobs.config.options import DataOptions

TRAIN = ("--dataset.repo_id=me/parts", "--policy.type=act")
LONG = "a" * 300

# The words, what the answer must have in it, and what it must not.
TYPED = {
    "en dash": ("–steps=5", "did you mean --steps=5?", ""),
    "em dash": ("—steps=5", "did you mean --steps=5?", ""),
    "one hyphen": ("-steps=5", "did you mean --steps=5?", ""),
    "no hyphens": ("steps=5", "did you mean --steps=5?", ""),
    "spaces around =": ("--steps = 5", "--steps: no spaces around the =, as in --steps=5", "'5'"),
    "a space behind =": ("--steps= 5", "as in --steps=5", "value is missing"),
    "a space before =": ("--steps =5", "as in --steps=5", "whole number"),
    "capitals of a choice": ("--policy.type=ACT", "did you mean act?", ""),
    "capitals of a flag": ("--STEPS=5", "did you mean --steps?", ""),
    "hyphen for a dot": ("--policy-type=act", "did you mean --policy.type?", "--policy?"),
    "underscore for a dot": ("--dataset_root=x", "did you mean --dataset.root?", "--dataset?"),
    "the policy's": ("--policy.lr=1e-4", "did you mean --policy.optimizer_lr?", "--policy?"),
    "no group": ("--device=cuda", "did you mean --policy.device?", "env"),
    "the data set's": ("--repo_id=me/parts", "did you mean --dataset.repo_id?", ""),
    "a group for its type": ("--policy=act", "did you mean --policy.type=act?", ""),
    "a group for its name": ("--dataset=me/parts", "did you mean --dataset.repo_id=me/parts?", ""),
    "a group for its switch": ("--wandb=true", "did you mean --wandb.enable=true?", ""),
    "open above": ("--ray.num_workers=2:", "--ray.num_workers=2:: must be", "missing"),
    "open below": ("--ray.num_workers=:4", "as in 2:8", "min_workers"),
    "three of two": ("--ray.num_workers=2:3:4", "as in 2:8", ""),
    "no number to it": ("--ray.num_workers=2:x", "--ray.num_workers=2:x: must be", ""),
    "seed beyond NumPy's": (f"--seed={2**32}", "must be at most 4294967295", ""),
    "NaN for LeRobot": ("--policy.optimizer_lr=nan", "must be a number", ""),
    "NaN for us": ("--ray.gpus_per_worker=nan", "must be a number", ""),
    "long name to write": (f"--output_dir=/tmp/{LONG}/run", "a name of 300 bytes; 255 is the most", ""),
    "long name to read": (f"--dataset.root=/tmp/{LONG}", "a name of 300 bytes; 255 is the most", ""),
    "one slash": ("--output_dir=s3:/bucket/run", "did you mean s3://bucket/run?", ""),
    "capitals of a bucket": ("--dataset.root=S3://bucket/parts", "did you mean s3://bucket/parts?", ""),
    "keys are not shown": ("--output_dir=S3://key:secret@bucket/run", "did you mean s3://...@bucket/run?", "secret"),
    "frames in a bucket": ("--data.cache=s3://bucket/frames", "must be a folder", ""),
    "models in a bucket": ("--assets.dir=s3://bucket/models", "must be a folder", ""),
}  # fmt: skip


@pytest.mark.parametrize("slip", TYPED)
def test_slip_of_a_training(slip):
    typed, right, wrong = TYPED[slip]
    with pytest.raises(InputError) as refused:
        check_command(read_flags([*TRAIN, *typed.split(" ")])[0])
    message = str(refused.value)
    assert right in message and len(message.splitlines()) <= 2, message
    assert not wrong or wrong not in message, message


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for place, right in (
        ("file/run", f"{tmp_path}/file is a file"),
        ("file/a/run", f"{tmp_path}/file is a file"),
        ("loop", "leads nowhere"),
        ("loop/run", "leads nowhere"),
        ("gone", "leads nowhere"),
    ):
        with pytest.raises(InputError, match=re.escape(right)):
            check_command(read_flags([*TRAIN, f"--output_dir={tmp_path / place}"])[0])
    check_command(read_flags([*TRAIN, f"--output_dir={tmp_path}/new/run"])[0])


@pytest.mark.parametrize("on", ["true", "True", "yes", "on", "ON"])
def test_switches_are_what_yaml_takes_them_for(on):
    assert asks_to_resume({"resume": on})
    assert not any(asks_to_resume({"resume": off}) for off in ("false", "no", "off", "False"))


def test_words_for_the_cache_are_no_folders():
    assert {DataOptions(cache=word).cache for word in ("auto", "Auto", "on", "true", "yes")} == {"auto"}
    assert {DataOptions(cache=word).cache for word in ("off", "OFF", "false", "no", "none")} == {"off"}


# A job, its words, what the answer must have in it, and what it must not.
JOBS = {
    "capitals of a sampler": ("tune", "--tune.sampler=TPE", "did you mean tpe?", ""),
    "another sampler": ("tune", "--tune.sampler=bayes", "It can be tpe", "did you mean cmaes"),
    "the search's own": ("tune", "--num_samples=4", "did you mean --tune.num_samples?", ""),
    "underscore of a switch": ("tune", "--dry_run", "--space is missing", "dry_run"),
    "value of a switch": ("tune", "--dry-run=true", "--space is missing", "dry-run"),
    "NaN for the tuner": ("tune", "--tune.time_budget_s=nan", "must be a number", ""),
    "told once": ("tune", "--cost_per_hour", "its value is missing", "must be a number"),
    "unknown, told once": ("tune", "--tune.trails=4", "unknown flag --tune.trails;", "unknown flag --tune.trails."),
    "capitals of a policy": ("tune", "--new-space=ACT", "did you mean act?", ""),
    "in another folder": ("tune", "--space=search_spaces/act.yaml", "/search_spaces/act.yaml, /", ""),
    "no folder": ("report", "--output_dir", "its value is missing", "metrics.jsonl"),
    "hyphen of a flag": ("report", "--output-dir=x", "did you mean --output_dir?", ""),
    "report of a bucket": ("report", "--output_dir=s3://bucket/run", "must be a folder", "s3:/bucket"),
    "demo in a bucket": ("demo", "--output_dir=s3://bucket/demo", "must be a folder", ""),
    "switch off": ("cache", "list --data.cache=off", "name a folder", ""),
    "cache that is not there": ("cache", "list --data.cache=/nowhere/at/all", "there is no such folder", ""),
    "neither on nor off": ("doctor", "--measure=perhaps", "--measure=perhaps: must be true or false", ""),
    "neither yes nor no": ("doctor", "--json=perhaps", "--json=perhaps: must be true or false", ""),
}  # fmt: skip


@pytest.mark.parametrize("slip", JOBS)
def test_slip_of_another_job(slip, tmp_path, monkeypatch):
    job, typed, right, wrong = JOBS[slip]
    monkeypatch.chdir(tmp_path)
    for module in {"torch", "lerobot", "ray"} - set(sys.modules):
        monkeypatch.setitem(sys.modules, module, None)  # refused before any of them is imported
    with pytest.raises(InputError) as refused:
        importlib.import_module(f"ray_jobs.{job}").main(typed.split(" "))
    assert right in str(refused.value) and (not wrong or wrong not in str(refused.value)), refused.value
    assert not list(tmp_path.iterdir())


def test_a_comma_may_be_part_of_a_name(tmp_path):
    """Of a search's folder, say, whose spaces it goes on with."""
    for name in ("a,b", "c", "a,b,c"):
        (tmp_path / name).touch()
    place = str(tmp_path)
    assert listed(f"{place}/a,b, {place}/c") == [f"{place}/a,b", f"{place}/c"]
    assert listed(f"{place}/a,b,c") == [f"{place}/a,b,c"]
    assert listed(f"{place}/c,{place}/a,b,s3://x/y") == [f"{place}/c", f"{place}/a,b", "s3://x/y"]
    assert listed("none, such,") == ["none", "such"] and listed("") == []
