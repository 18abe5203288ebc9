"""A command line is answered before anything heavy is imported: all of its mistakes, and a text is taken as it is typed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs.cli import flags
from ray_jobs.cli.command_line import read_flags
from ray_jobs.cli.early_checks import check_command
from ray_jobs.cli.resolve import resolve
from ray_jobs.config import flag_table
from ray_jobs.config.errors import InputError
from support.commands import ROOT, job, tiny_act, train_in_process

# Names that YAML reads as something else: a comment, a number, a date, a mapping, a truth value, a file to open.
NAMES = [
    "state #2",
    "2026_11_30",
    "2026-11-30",
    "act: second try",
    "off",
    "7",
    "'",
    "ü [v2]",
    "a=b",
    "{x}",
]


def test_flags_are_those_of_lerobot():
    """`python -m ray_jobs.config.flag_table` writes them anew. In a process of its own, without other tests' plugins."""
    code = "from ray_jobs.config.flag_table import *; assert load() == of_lerobot()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_names_are_those_of_lerobot():
    from lerobot.configs.train import TRAIN_CONFIG_NAME
    from lerobot.utils import constants

    model = constants.PRETRAINED_MODEL_DIR
    last = f"{constants.CHECKPOINTS_DIR}/{constants.LAST_CHECKPOINT_LINK}/{model}"
    assert (flags.TRAIN_CONFIG_NAME, flags.INSIDE) == (TRAIN_CONFIG_NAME, (model, last))


def test_defaults_are_read_as_they_are_typed():
    table = flag_table.load()
    for policy in table.policies:
        for flag in table.flags(policy).values():
            if (
                flag.default is not None and flag.name != "policy.replace_final_stride_with_dilation"
            ):  # an int: False
                typed = flag.default if isinstance(flag.default, str) else json.dumps(flag.default)
                assert flag.read(typed) == flag.default, flag


def test_all_mistakes_at_once(parts, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").touch()
    wrong = {
        "--stepz=3": "did you mean --steps?",
        "--batch_size=two": "a whole number",
        "--policy.type=acts": "did you mean act?",
        "--num_workers=-1": "at least 0",
        "--dataset.episodes=[1": "bracket",
        f"--dataset.root={tmp_path}/none": "no such folder",
        f"--output_dir={tmp_path}/run": "nothing in it is overwritten",
        f"--config_path={tmp_path}/c.json": "no such file",
    }
    with pytest.raises(InputError) as refused:
        check_command(read_flags(list(wrong))[0])
    for right in wrong.values():
        assert right in str(refused.value)
    with pytest.raises(InputError, match="(?s)at least -1.*pack or spread"):
        check_command(
            read_flags(tiny_act(parts, tmp_path / "a", "--ray.max_failures=-2", "--ray.placement=x"))[0]
        )


REFUSED = {  # what is told of a command without importing anything
    "train --stepz=3": "--steps?",
    "train --dataset.repo_id=a/b --dataset.root=/none --policy.type=act --steps=foo": "whole number",
    "train --help": "",
    "train --policy.type=act --help": "--policy.chunk_size",
    "tune --space=/none.yaml --steps=5 --dataset.repo_id=a/b": "/none.yaml",
    "tune --stepz=3": "--steps?",
    "tune --resume=true --output_dir=/none": "nothing to resume",
    "tune --help": "--tune.num_samples",
    "evaluate --checkpoint=/none --foo=1": "/none",
    "evaluate --help": "--checkpoint",
    "doctor --dataset.repo_id=a/b --dataset.root=/none": "/none",
    "doctor --polcy.type=act": "--policy.type?",
    "cache list --foo=1": "--foo",
    "cache list": "no frames",
    "cache build --dataset.repo=x": "--dataset.repo_id?",
    "export --lerobot=0.4 --checkpoint=/none --output_dir=/tmp/new": "/none",
    "report --output_dir=/none": "/none",
    "demo --episods=3": "--episodes?",
    # of a data set that is there, {parts}, one without its table, {torn}, and an {empty} folder
    "train --dataset.repo_id=a/b --dataset.root={torn} --policy.type=act": "(episode 0 is in it) is missing",
    "tune --dataset.repo_id=a/b --dataset.root={torn} --steps=5": "(episode 0 is in it) is missing",
    "cache build --dataset.repo_id=a/b --dataset.root={torn}": "(episode 0 is in it) is missing",
    "cache build": "--dataset.repo_id is missing",
    "train --dataset.repo_id=a/b --dataset.root={parts} --policy.type=act --data.eval_episodes=[4,4]": "twice",
    "doctor --dataset.repo_id=a/b --dataset.root={parts} --dataset.episodes=[99]": "no episode 99",
    "train --resume=true --output_dir={empty}": "nothing to resume",
    "evaluate --checkpoint={empty}": "no checkpoint in it",
    "evaluate --checkpoint=,": "--checkpoint is missing",
    "evaluate --checkpoint={parts}": "no checkpoint in it",
    "doctor {parts}": "did you mean --dataset.root=",
    "report {empty}": "did you mean --output_dir=",
    "train --hlep": "did you mean --help?",
    "train --policy.type=act --dataset.repo_id=a/b --output_dir=/proc/x": "/proc cannot be written",
    "train --config_path=README.md": "not JSON",
    "train --policy.type=act --dataset.repo_id=https://huggingface.co/datasets/lerobot/pusht": "mean lerobot/pusht?",
}


def test_answers_without_torch_lerobot_or_ray(parts, tmp_path):
    """All in one process, where an import would be seen: each of these is 3 to 12 s away from an answer."""
    torn, empty = shutil.copytree(parts, tmp_path / "torn"), tmp_path / "empty"
    (torn / "data/chunk-000/file-000.parquet").unlink()
    empty.mkdir()
    places = {"{torn}": torn, "{parts}": parts, "{empty}": empty}
    commands = {}
    for command, right in REFUSED.items():
        for name, place in places.items():
            command = command.replace(name, str(place))
        commands[command] = right
    code = f"""
import contextlib, importlib, io, sys
from ray_jobs.config.errors import InputError
for command, right in {commands!r}.items():
    name, *argv = command.split()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            importlib.import_module("ray_jobs." + name).main(argv)
        except InputError as error:
            print(error)
    assert right in said.getvalue(), (command, said.getvalue())
    heavy = {{"torch", "lerobot", "ray", "transformers", "datasets"}} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    env = {"RAY_JOBS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr


def test_what_takes_long_is_said_before_it_begins(parts, run, tmp_path):
    """Ten seconds of imports, on a busy machine a minute. Here they fail, which ends each job."""
    (tmp_path / "search.json").write_text('{"flags": {"steps": "4"}, "policies": ["act"]}')
    data = ["--dataset.repo_id=local/parts", f"--dataset.root={parts}"]
    commands = {
        "train": [*tiny_act(parts, tmp_path / "new"), "--ray.num_workers=0"],
        "tune": [f"--output_dir={tmp_path}", "--resume=true"],
        "evaluate": [f"--checkpoint={run}"],
        "export": [f"--checkpoint={run}", "--lerobot=0.4", f"--output_dir={tmp_path / 'new'}"],
        "doctor": data,
        "cache": ["build", *data],
    }
    code = f"""
import contextlib, importlib, io, sys
from ray_jobs.cli.terminal import doing
sys.modules["torch"] = sys.modules["lerobot"] = None
for name, argv in {commands!r}.items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(ImportError):
        importlib.import_module("ray_jobs." + name).main(argv)
    with contextlib.redirect_stdout(io.StringIO()):
        doing("")
    assert said.getvalue().startswith("importing LeRobot"), (name, said.getvalue())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_exit_status_and_no_traceback():
    done = job("ray_jobs.train", "--steps=foo", "--dataset.root=/none")
    assert (
        done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: --steps=foo: must be")
    )
    assert "/none" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_taken_as_typed(parts, tmp_path, name):
    root, output_dir = tmp_path / "data" / name, tmp_path / "runs" / name
    root.parent.mkdir()
    root.symlink_to(parts)
    recipe = resolve(
        [
            *tiny_act(root, output_dir),
            f"--job_name={name}",
            f"--wandb.notes={name}",
            f"--assets.dir={tmp_path / name}",
            f"--data.cache={tmp_path / 'frames' / name}",
        ]
    )
    cfg = recipe.lerobot
    assert (Path(cfg.dataset.root), cfg.output_dir) == (root, output_dir)
    assert (cfg.job_name, cfg.wandb.notes) == (name, name)
    assert recipe.options.assets.dir == tmp_path / name
    assert recipe.options.data.cache == str(tmp_path / "frames" / name)


def test_what_lerobot_would_open_as_a_file(parts, tmp_path):
    with pytest.raises(InputError, match="--job_name=include me: .*another name"):
        resolve(tiny_act(parts, tmp_path / "run", "--job_name=include me"))


def test_a_relative_folder_with_a_number_for_a_name(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2026_11_30", "2026-11-30", "12"):
        assert resolve(tiny_act(parts, Path(name))).output_dir == tmp_path / name


def test_home_is_expanded(parts, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found, _ = read_flags(
        ["--output_dir=~/runs/a", "--dataset.root=~/d", "--checkpoint=~/a,~/b", "--job_name=~/x"]
    )
    assert found["output_dir"] == f"{tmp_path}/runs/a" and found["dataset.root"] == f"{tmp_path}/d"
    assert found["checkpoint"] == f"{tmp_path}/a,{tmp_path}/b" and found["job_name"] == "~/x"


def test_quotes_that_lerobot_wants_are_taken_off(parts, tmp_path):
    assert resolve(tiny_act(parts, tmp_path / "r", "--job_name='a #1'")).lerobot.job_name == "a #1"


def test_a_run_in_a_folder_of_such_a_name_goes_on_from_its_last_screen(parts, tmp_path):
    """Also with such a data set: what is typed, written down and read again is the same."""
    root, output_dir = tmp_path / "state #2", tmp_path / "act: 1 #1"
    root.symlink_to(parts)
    train_in_process(tiny_act(root, output_dir, "--steps=1", "--job_name=2026_11_30"))
    config = output_dir / "checkpoints/000001/pretrained_model/train_config.json"
    again = resolve([f"--config_path={config}", "--resume=true", "--steps=2", "--wandb.notes=x #1"])
    assert (again.output_dir, Path(again.lerobot.dataset.root)) == (output_dir, root)
    assert (again.lerobot.job_name, again.lerobot.wandb.notes) == ("2026_11_30", "x #1")
    again = resolve(tiny_act(root, output_dir, "--resume=true", "--steps=2"))
    assert again.output_dir == output_dir


def test_an_empty_folder_is_as_good_as_none(run, tmp_path):
    from ray_jobs import export

    place, link = tmp_path / "place", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    command = ["--lerobot=0.4", f"--checkpoint={run}", f"--output_dir={link}"]
    assert export.main(command) == 0
    assert (place / "config.json").is_file() and (place / "model.safetensors").is_file()
    assert not list(place.glob(".*"))
    with pytest.raises(InputError, match="nothing in it is overwritten"):
        export.main(command)


def test_the_jobs_are_named():
    done = subprocess.run([sys.executable, "-m", "ray_jobs"], capture_output=True, text=True, cwd=ROOT)
    named = set(re.findall(r"^python -m ray_jobs\.(\w+) +\w", done.stdout, re.MULTILINE))
    jobs = {file.stem for file in (ROOT / "ray_jobs").glob("*.py") if not file.name.startswith("__")}
    assert (done.returncode, done.stderr, named) == (2, "", jobs - {"interface"})
