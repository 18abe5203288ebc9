"""What a user copies works: `examples/`, and the jobs as functions in a notebook's kernel."""

import re
import shutil
import subprocess
import sys
import time

import pytest
from jupyter_client.manager import start_new_kernel

from ray_jobs.config.errors import InputError
from ray_jobs.interface import as_words
from support.commands import PATIENCE, ROOT, common, tiny_act

MADE = ROOT / "tests" / "data" / "made_by_0.1.0"


def test_a_finished_search_is_plotted(tmp_path):
    search = shutil.copytree(MADE / "search", tmp_path / "search")
    command = [sys.executable, ROOT / "examples" / "plot_search.py", search]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120 * PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 trials" in done.stdout and not done.stderr
    assert (tmp_path / "search.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["submit.sh", "two_policies.sh"])
def test_scripts_are_shell(name):
    assert subprocess.run(["bash", "-n", ROOT / "examples" / name]).returncode == 0


def test_flags_by_name():
    words = as_words({
        "policy": {"type": "act", "use_vae": False, "pretrained_backbone_weights": None},
        "data": {"eval_episodes": [1, 2]},
        "rename_map": {"a.b": "c"},
        "output_dir": ROOT / "a #1",
        "steps": 3,
    })  # fmt: skip
    assert list(words) == [
        "--policy.type=act",
        "--policy.use_vae=false",
        "--policy.pretrained_backbone_weights=null",
        "--data.eval_episodes=[1, 2]",
        '--rename_map={"a.b": "c"}',
        f"--output_dir={ROOT}/a #1",
        "--steps=3",
    ]


def test_importing_changes_nothing():
    """A notebook's own Ray, torch and environment are none of ours."""
    code = (
        "import os, sys; before = dict(os.environ); from ray_jobs import train, tune, evaluate; "
        "assert dict(os.environ) == before; assert not {'ray', 'torch', 'lerobot'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture(scope="module")
def kernel():
    """A notebook's kernel; called with a cell, it returns what the cell printed, and the name of its error."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))

    def run(cell: str, interrupt_at: str = "", timeout: float = 200 * PATIENCE) -> tuple[str, str]:
        asked, printed, error = client.execute(cell), "", ""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            message = client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                printed += content["text"]
                if interrupt_at and interrupt_at in printed:
                    manager.interrupt_kernel()
                    interrupt_at = ""
            elif kind == "error":
                error = content["ename"]
            elif kind == "status" and content["execution_state"] == "idle":
                return printed, error
        raise TimeoutError(printed)

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_notebook_trains(kernel, parts, tmp_path):
    words = tiny_act(parts, tmp_path / "run", "--steps=2", "--save_freq=2")
    printed, error = kernel(
        f"from ray_jobs import train\nsummary = train({words!r})\nprint('step', summary['step'])"
    )
    assert not error and printed.endswith("step 2\n"), printed
    assert "importing LeRobot" in printed and "done: step 2/2" in printed
    assert "\x1b" not in printed and "\r" not in printed  # escape codes, or a bar


def test_a_notebook_is_interrupted(kernel, parts, tmp_path):
    """The training saves a checkpoint first; the kernel lives on."""
    words = tiny_act(parts, tmp_path / "run", "--steps=5000", "--save_freq=5000", "--ray.num_workers=0")
    printed, error = kernel(f"from ray_jobs import train\ntrain({words!r})", interrupt_at="step 2/")
    assert error == "KeyboardInterrupt", printed
    assert "stopping: a checkpoint is saved first" in printed and "interrupted: step" in printed
    assert (tmp_path / "run" / "checkpoints" / "last" / "pretrained_model").is_dir()
    assert kernel("print(1 + 1)") == ("2\n", "")


def test_a_notebook_is_refused(kernel, tmp_path):
    printed, error = kernel(
        f"from ray_jobs import train\ntrain(steps='x', output_dir={str(tmp_path / 'run')!r})"
    )
    assert error == InputError.__name__ and "must be a whole number" in printed


@pytest.mark.slow
def test_a_notebook_searches_and_evaluates(kernel, parts, tmp_path):
    words = [*common(parts, tmp_path / "search"), "--steps=4", "--data.eval_episodes=[10,11]"]
    space = tmp_path / "space.yaml"
    space.write_text("policy: act\nbaseline: {policy.dim_model: 32, policy.n_heads: 2}\n"
                     "search: {policy.optimizer_lr: {low: 1.0e-5, high: 1.0e-3, log: true}}\n")  # fmt: skip
    cell = f"""
from ray_jobs import evaluate, tune
summary = tune({words!r} + ["--space={space}", "--tune.num_samples=2"])
print("trials", summary["trials"])
scores = evaluate(checkpoint={str(tmp_path / "search")!r}, output_dir={str(tmp_path / "scores")!r})
print("scores", len(scores))
"""
    printed, error = kernel(cell, timeout=600 * PATIENCE)
    assert not error, printed
    assert re.search(r"^trials 2$", printed, re.M) and re.search(r"^scores \d$", printed, re.M)
    assert "\x1b" not in printed
