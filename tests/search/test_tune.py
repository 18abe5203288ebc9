"""The tuner end to end: real searches on a Ray cluster of this session, read back with plain Optuna.

The policies are tiny and the data has no cameras: a step takes milliseconds.
"""

import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import draccus
import optuna
import psutil
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from ray_jobs.cli import progress
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError, RunError, StorageLost
from ray_jobs.search import results
from ray_jobs.search.results import importances
from ray_jobs.search.study import storage as storage_module
from ray_jobs.search.study.study import BASELINE
from ray_jobs.storage import retry
from ray_jobs.storage.records import read_json, read_metrics
from support.commands import PATIENCE, ROOT, job
from support.data_sets import make
from support.machine import free_port, small_disk
from support.processes import Run, alive
from support.runs import wandb_runs
from support.searches import ACT, on_numbers, search, space_file, study_of
from support.vla import save_base, tiny


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("tune") / "numbers", [23, 17, 9, 20, 21], seed=2)


@pytest.fixture(scope="module")
def common(numbers) -> list[str]:
    return [*on_numbers(numbers), "--steps=18", "--eval_steps=2"]


@pytest.fixture(scope="module")
def asha(common, tmp_path_factory) -> Path:
    """A search of 12 trials with ASHA, and W&B offline; shared by the tests that look at what it left behind."""
    folder = tmp_path_factory.mktemp("asha")
    wandb = ("--wandb.enable=true", "--wandb.mode=offline", "--wandb.project=test")
    where = (f"--space={space_file(folder)}", f"--output_dir={folder / 'run'}")
    assert search(*common, *where, *wandb, "--tune.num_samples=12") == 0
    return folder / "run"


def test_study_tells_pruned_from_complete(asha):
    """Read with plain Optuna: pruned trials are PRUNED with their validations; the best is the summary's."""
    study, summary = study_of(asha), read_json(asha / "summary.json")
    states = [trial.state for trial in study.trials]
    assert len(states) == 12 and set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in study.trials:
        recorded = {
            r["step"]: r["val/action_error"]
            for r in read_metrics(asha / f"trials/{trial.number:04d}")
            if "val/action_error" in r
        }
        assert trial.intermediate_values == recorded and recorded
        if trial.state == TrialState.PRUNED:
            assert max(recorded) in (2, 6) and trial.value == recorded[max(recorded)]
        else:
            assert max(recorded) == 18 and trial.value == min(recorded.values())
    assert study.best_trial.number == summary["best"]["trial"]
    assert study.best_value == summary["best"]["values"]["val/action_error"]
    assert study.trials[0].state == TrialState.COMPLETE  # the baseline is never given up
    assert study.trials[0].params["policy.optimizer_lr"] == 1e-5
    assert summary["baseline"]["values"]["val/action_error"] == study.trials[0].value
    assert summary["trained_share"] < 0.7
    assert len({json.dumps(trial.user_attrs["config"]) for trial in study.trials}) == 12


def test_slots_are_reused(asha):
    """Twelve trials, two processes."""
    slots = [trial.user_attrs["times"]["slot"] for trial in study_of(asha).trials]
    assert len(set(slots)) <= 3 and len(slots) == 12  # two, or three where both had ended in the same moment


def test_ray_of_our_own_is_reached_from_this_machine_alone(asha):
    processes = (psutil.Process(), *psutil.Process().children(recursive=True))
    addresses = [c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(addresses) > 5 and {ip.removeprefix("::ffff:") for ip in addresses} == {"127.0.0.1"}


def test_answer(asha, tmp_path):
    """trials.csv has every trial; best/ holds the winner's checkpoint and a command that trains it, as it is."""
    study = study_of(asha)
    rows = list(csv.DictReader((asha / "trials.csv").open()))
    assert [int(row["trial"]) for row in rows] == list(range(12))
    for row, trial in zip(rows, study.trials, strict=True):
        assert float(row["val/action_error"]) == trial.value and row["state"] == trial.state.name
        assert float(row["policy.optimizer_lr"]) == trial.params["policy.optimizer_lr"]
    best = study.best_trial
    config = read_json(asha / "best" / "train_config.json")
    assert (
        config["policy"]["chunk_size"]
        == config["policy"]["n_action_steps"]
        == best.params["policy.chunk_size"]
    )
    assert (asha / "best/checkpoint/pretrained_model/model.safetensors").is_file()
    script = asha / "best" / "command.sh"
    assert "--steps=100000" in script.read_text() and os.access(script, os.X_OK)
    again = tmp_path / "again"
    more = [
        "--steps=18",
        "--eval_steps=2",
        "--max_eval_samples=256",
        f"--output_dir={again}",
        "--ray.num_workers=0",
    ]
    result = subprocess.run(
        [script, *more],
        env=os.environ | {"PATH": "/usr/bin:/bin"},  # the environment need not be activated
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200 * PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    value = read_json(again / "summary.json")["best"]["val/action_error"]
    assert value == pytest.approx(best.value, rel=1e-5)  # with another number of threads


def test_what_a_search_writes_is_what_its_trials_used(asha):
    """trials.csv, search.json and command.sh against the optimizers, networks and samplers of the trials, as their checkpoints and
    logs have them, and against what the winner's command makes of it."""
    rows = {row["trial"]: row for row in csv.DictReader((asha / "trials.csv").open())}
    kept = 0
    for number, row in rows.items():
        trial = asha / f"trials/{int(number):04d}"
        summary, records = read_json(trial / "summary.json"), read_metrics(trial)
        assert {r["train/lr"] for r in records if "train/lr" in r} == {float(row["policy.optimizer_lr"])}
        assert (int(row["steps"]), float(row["wall_s"])) == (summary["step"], summary["wall_s"])
        values = {r["step"]: r["val/action_error"] for r in records if "val/action_error" in r}
        assert values[int(row["best_step"])] == float(row["val/action_error"])
        assert summary["steps"] == 18 and summary["batch_size"] == 4 and summary["eval_episodes"] == 2
        for checkpoint in trial.glob("checkpoints/0*"):
            kept += 1
            config = read_json(checkpoint / "pretrained_model/train_config.json")
            group = read_json(checkpoint / "training_state/optimizer_param_groups.json", list)[0]
            shape = load_file(checkpoint / "pretrained_model/model.safetensors")[
                "model.decoder_pos_embed.weight"
            ].shape
            assert group["lr"] == config["policy"]["optimizer_lr"] == float(row["policy.optimizer_lr"])
            assert shape[0] == config["policy"]["chunk_size"] == int(row["policy.chunk_size"])
            assert config["seed"] == 5 and read_json(trial / "options.json")["asked"]["eval_steps"] == 2
            assert f"policy.optimizer_lr={group['lr']}" in " ".join(
                f"{k}={v}" for k, v in read_json(trial / "options.json")["asked"]["typed"].items()
            )
    assert kept >= 3
    flags = read_json(asha / "search.json")["flags"]
    assert (flags["batch_size"], flags["steps"], flags["eval_steps"]) == ("4", "18", "2")

    # The winner's command, but for what is another training's: how long, how often, where.
    words = shlex.split((asha / "best/command.sh").read_text().partition("ray_jobs.train")[2])
    recipe = resolve([word for word in words if word.startswith("--") and word != "--output_dir"])
    ours, theirs = draccus.encode(recipe.lerobot), read_json(asha / "best/train_config.json")
    best = f"{read_json(asha / 'summary.json')['best']['trial']:04d}"
    assert (
        recipe.options.data.eval_episodes
        == read_json(asha / f"trials/{best}/options.json")["data"]["eval_episodes"]
    )
    for another in ("steps", "save_freq", "log_freq", "output_dir", "job_name", "wandb", "eval_steps"):
        ours.pop(another), theirs.pop(another)
    for name in ("input_features", "output_features"):  # filled in from the data
        ours["policy"].pop(name), theirs["policy"].pop(name)
    ours["dataset"]["episodes"] = theirs["dataset"]["episodes"] = None
    assert ours == theirs


def test_only_the_best_keep_checkpoints(asha):
    ranked = sorted(
        (t for t in study_of(asha).trials if t.state == TrialState.COMPLETE), key=lambda t: t.value
    )
    with_checkpoints = {int(path.parent.name) for path in asha.glob("trials/*/checkpoints")}
    assert with_checkpoints == {t.number for t in ranked[:3]}


def test_wandb_has_every_trial(asha):
    """One offline run per trial, pruned ones too, in one group, with params, step metrics and how it ended."""
    for trial in study_of(asha).trials:
        (run,) = wandb_runs(asha / f"trials/{trial.number:04d}")
        assert (run["group"], run["name"]) == ("run", f"run-{trial.number:04d}")
        assert run["config"]["policy"]["optimizer_lr"] == pytest.approx(trial.params["policy.optimizer_lr"])
        errors = {h["_step"]: h["val/action_error"] for h in run["history"] if "val/action_error" in h}
        assert errors == trial.intermediate_values
        assert run["summary"]["status"] == {"COMPLETE": "finished", "PRUNED": "pruned"}[trial.state.name]


# ---------------------------------------------------------------------- what goes wrong


def test_failed_trials_do_not_stop_the_search(common, tmp_path, capsys, monkeypatch):
    """A learning rate that explodes is a FAIL with its reason, once; the others go on. The best alone is uploaded."""
    uploaded = []

    class Hub:
        def create_repo(self, repo_id: str, **more) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            uploaded.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            raise ConnectionError("no network")

    monkeypatch.setattr(results, "HfApi", Hub)
    monkeypatch.setattr(progress, "OUTPUT_EVERY_S", 0)  # a line in a log file comes every half a minute
    push = ("--policy.push_to_hub=true", "--policy.repo_id=me/best")
    wild = {**ACT, "search": {"policy.optimizer_lr": {"choices": [1e-5, 1e-3, 1e30]}}}
    output = tmp_path / "run"
    flags = (f"--space={space_file(tmp_path, wild)}", f"--output_dir={output}", "--tune.scheduler=none")
    assert search(*common, *flags, *push, "--tune.num_samples=3", "--tune.sampler=random") == 0
    ((where, files),) = uploaded
    assert where == "me/best" and {"README.md", "model.safetensors", "config.json"} <= set(files)
    by_lr = {t.params["policy.optimizer_lr"]: t for t in study_of(output).trials if "config" in t.user_attrs}
    assert {lr: t.state.name for lr, t in by_lr.items()} == {1e-5: "COMPLETE", 1e-3: "COMPLETE", 1e30: "FAIL"}
    assert "gradient norm" in by_lr[1e30].user_attrs["reason"]
    printed = capsys.readouterr().out
    assert "failed" in printed and "not uploaded to me/best: no network" in printed
    assert re.search(r"^[0-2]/3 trials, [12] running.*; steps [\d, ]+ of 18$", printed, re.MULTILINE)
    # All there is has been tried: a fourth trial is not the same again.
    assert search(f"--output_dir={output}", "--resume=true", "--tune.num_samples=4") == 0
    assert sum("config" in t.user_attrs for t in study_of(output).trials) == 3
    assert "the space is exhausted" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_slot(common, tmp_path):
    """SIGKILL to the process of a running trial: it goes on in another one, and every trial has its value."""
    output, killed = tmp_path / "run", []

    def kill() -> None:
        while not killed:
            for process in psutil.Process().children(recursive=True):
                with_slot = "ImplicitFunc" in " ".join(process.cmdline())
                if with_slot and list(output.glob("trials/*/checkpoints/*")):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    return
            time.sleep(0.05)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    flags = (f"--space={space_file(tmp_path)}", f"--output_dir={output}", "--tune.scheduler=none")
    assert search(*common, *flags, "--tune.num_samples=4", "--tune.max_concurrent=1") == 0
    assert killed
    study = study_of(output)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 4
    assert str(killed[0]) not in {t.user_attrs["times"]["slot"].partition(":")[2] for t in study.trials}
    for trial in study.trials:
        assert sorted(trial.intermediate_values) == list(range(2, 19, 2))


@pytest.mark.slow
def test_lost_node(common, tmp_path):
    """Two machines (raylets) with a GPU each, cut in two: four trials at a time. One machine is killed while its trials
    run; the search ends by itself with every trial."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 1})
    try:
        doomed = cluster.add_node(num_cpus=4, num_gpus=1)
        output = tmp_path / "run"
        flags = [*common, f"--space={space_file(tmp_path)}", f"--output_dir={output}", "--tune.num_samples=6"]
        flags += [
            "--steps=180",
            "--eval_steps=20",
            "--tune.gpus_per_trial=0.5",
            f"--ray.address={cluster.address}",
        ]
        run = Run([*flags, "--ray.cpus_per_worker=1", "--tune.scheduler=none"], job="ray_jobs.tune")
        run.wait_for(" at step")
        cluster.remove_node(doomed, allow_graceful=False)
        assert run.end() == 0, run.printed
        assert "4 at a time" in run.printed
        trials = study_of(output).trials
        assert [t.state for t in trials] == [TrialState.COMPLETE] * 6
        assert len({json.dumps(t.user_attrs["config"]) for t in trials}) == 6
    finally:
        cluster.shutdown()


@pytest.mark.parametrize(("kills", "trials"), [(1, 4), pytest.param(3, 12, marks=pytest.mark.slow)])
def test_killed_driver(common, tmp_path, kills, trials):
    """SIGKILL to the driver at random moments, resumed each time: as many trials as asked for, all different, none RUNNING."""
    output = tmp_path / "run"
    flags = [*common, f"--space={space_file(tmp_path)}", f"--output_dir={output}"]
    flags += [f"--tune.num_samples={trials}"]
    for number in range(kills):
        run = Run([*flags, *(["--resume=true"] if number else [])], job="ray_jobs.tune")
        run.wait_for(" at step")
        time.sleep(random.uniform(0, 1))
        slots = [p for p in run.family() if "ImplicitFunc" in " ".join(p.cmdline())]
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()  # not until all that it started has ended
        psutil.wait_procs(slots, timeout=30)
    before = study_of(output).trials
    ended = {t.number: t.value for t in before if t.state.is_finished()}
    assert len(ended) >= kills and any(t.state == TrialState.RUNNING for t in before)
    result = job("ray_jobs.tune", f"--output_dir={output}", "--resume=true")
    assert result.returncode == 0, result.stdout + result.stderr
    study = study_of(output)
    drawn = [t for t in study.trials if "config" in t.user_attrs]  # the others were known already
    assert len(drawn) == trials and all(t.state.is_finished() for t in study.trials)
    assert {number: study.trials[number].value for number in ended} == ended
    assert len({json.dumps(t.user_attrs["config"]) for t in drawn}) == trials
    for trial in drawn:  # none began anew: every validation stands there once
        steps = [r["step"] for r in read_metrics(output / f"trials/{trial.number:04d}") if "val/loss" in r]
        assert steps == sorted(trial.intermediate_values) == list(range(2, steps[-1] + 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_longer_search(common, tmp_path, sent):
    """Ctrl-C, or the signal of `ray job stop`: status 130, checkpoints, no process left, how to go on; then with more trials."""
    output = tmp_path / "run"
    flags = [*common, f"--space={space_file(tmp_path)}", f"--output_dir={output}", "--tune.num_samples=4"]
    flags += ["--steps=180", "--eval_steps=20"]  # else all is over before the signal comes
    run = Run(flags, job="ray_jobs.tune")
    run.wait_for(" at step")
    family = run.family()
    run.process.send_signal(sent)
    assert run.end() == 130, run.printed
    assert "--resume=true" in run.printed and "Traceback" not in run.printed and "***" not in run.printed
    _, left = psutil.wait_procs(family, timeout=30)
    assert alive(left) == []
    assert search(f"--output_dir={output}", "--resume=true", "--tune.num_samples=5") == 0
    assert [t.state.is_finished() for t in study_of(output).trials] == [True] * 5


def test_study_that_is_away_for_a_while(tmp_path, capsys, monkeypatch):
    """Somebody else holds the file for longer than SQLite waits: the search waits on, and says so."""
    monkeypatch.setattr(storage_module, "BUSY_S", 0.1)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    storage = storage_module.open_storage(url)
    study = optuna.create_study(storage=storage, study_name="s")
    storage.be_patient(lambda: False)
    other = sqlite3.connect(tmp_path / "study.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(1.5, other.execute, ["COMMIT"]).start()
    trial = study.ask()
    study.tell(trial, 1.0)
    assert optuna.load_study(study_name="s", storage=url).best_value == 1.0
    printed = capsys.readouterr().out
    assert (
        "the study cannot be used, trying again: OperationalError" in printed and "is back after" in printed
    )


def test_study_that_was_given_up_is_not_waited_for_again(tmp_path, monkeypatch):
    """Who was asked to stop waits for a locked file once, not for every question that is left."""
    monkeypatch.setattr(storage_module, "BUSY_S", 1)
    monkeypatch.setattr(retry, "STOPPING_S", 0.5)
    storage = storage_module.open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    study = optuna.create_study(storage=storage, study_name="s")
    storage.be_patient(lambda: True)
    other = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for waited in (True, False):
        begin = time.monotonic()
        for _ in range(1 if waited else 5):
            with pytest.raises(StorageLost, match="could not be used before this was stopped"):
                study.ask()
        assert (time.monotonic() - begin > 1) == waited


def test_time_budget(common, tmp_path, capsys):
    """The time is up: a clean end with status 0, and a longer budget goes on."""
    output = tmp_path / "run"
    flags = (f"--space={space_file(tmp_path)}", f"--output_dir={output}", "--tune.num_samples=300")
    assert search(*common, *flags, "--tune.time_budget_s=30") == 0  # enough for a trial
    printed = capsys.readouterr().out
    assert "the time is up" in printed and "time is up: " in printed
    before = len(study_of(output).trials)
    assert 0 < before < 300
    assert (
        search(
            f"--output_dir={output}",
            "--resume=true",
            "--tune.time_budget_s=100",
            f"--tune.num_samples={before}",
        )
        == 0
    )
    assert all(t.state.is_finished() for t in study_of(output).trials)


# ---------------------------------------------------------------------- other kinds of search


PRUNED = {
    "hyperband": ["--tune.scheduler=hyperband"],
    "median": ["--tune.scheduler=median", "--tune.max_concurrent=1"],
    # A group of workers takes half a minute to start, for every trial.
    "two workers": ["--tune.workers_per_trial=2", "--ray.cpus_per_worker=1", "--tune.num_samples=6"],
    "joined": ["--ray.address"],
}


@pytest.mark.slow
@pytest.mark.parametrize("how", PRUNED)
def test_pruning(common, tmp_path, how):
    """Other schedulers, trials with a worker group of their own, a cluster that was there before: hopeless trials end
    early by themselves, with their W&B runs finished, and the baseline is trained to its end."""
    rates = {"policy.optimizer_lr": {"choices": [3e-3, 1e-8]}, "policy.kl_weight": {"low": 1.0, "high": 9.0}}
    baseline = {**ACT["baseline"], "policy.optimizer_lr": 3e-3, "policy.kl_weight": 5.0}
    file = space_file(tmp_path, {**ACT, "baseline": baseline, "search": rates})
    output = tmp_path / "run"
    flags = [*common, f"--space={file}", f"--output_dir={output}", "--tune.num_samples=10", *PRUNED[how]]
    flags += [
        "--steps=36",
        "--eval_steps=4",
        "--tune.sampler=random",
        "--wandb.enable=true",
        "--wandb.mode=offline",
    ]
    cluster = None
    if how == "joined":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        flags = [f"{word}={cluster.address}" if word == "--ray.address" else word for word in flags]
    try:
        result = job("ray_jobs.tune", *flags)
    finally:
        if cluster:
            cluster.shutdown()
    assert result.returncode == 0, result.stdout + result.stderr
    trials = study_of(output).trials
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    assert pruned and trials[0].state == TrialState.COMPLETE
    assert all(t.state.is_finished() for t in trials)
    assert len(trials) == (6 if how == "two workers" else 10)
    assert any(t.params["policy.optimizer_lr"] == 1e-8 for t in pruned)
    for trial in pruned:
        steps = [r["step"] for r in read_metrics(output / f"trials/{trial.number:04d}") if "val/loss" in r]
        judged = sorted(trial.intermediate_values)
        assert steps[: len(judged)] == judged and steps[-1] < 36
        # Workers of a group may be past the next validation when they hear of it.
        assert len(steps) - len(judged) <= (1 if how == "two workers" else 0)
    assert all("exit" in wandb_runs(output / f"trials/{t.number:04d}")[0] for t in trials)


@pytest.mark.slow
# A slot takes some ten seconds to start, a group of workers takes them for every trial.
@pytest.mark.parametrize(("workers", "steps"), [(1, 6000), (2, 300)])
def test_a_node_joins(common, tmp_path, workers, steps):
    """Trials with as many workers as there are CPUs, one at a time; two at a time once a second such node is there."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": workers})
    try:
        output = tmp_path / "run"
        flags = [*common, f"--space={space_file(tmp_path)}", f"--output_dir={output}", "--tune.num_samples=4"]
        flags += [
            f"--steps={steps}",
            f"--eval_steps={steps // 3}",
            "--tune.scheduler=none",
            f"--tune.workers_per_trial={workers}",
        ]
        run = Run([*flags, f"--ray.address={cluster.address}"], job="ray_jobs.tune")
        run.wait_for(" at step")
        cluster.add_node(num_cpus=workers)
        assert run.end(timeout=300) == 0, run.printed
        assert "1 at a time" in run.printed
        times = [t.user_attrs["times"] for t in study_of(output).trials]
        busy = sorted([(t["begun"], 1) for t in times] + [(t["end"], -1) for t in times])
        assert max(sum(change for _, change in busy[: n + 1]) for n in range(len(busy))) == 2
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_several_policies_and_a_front(common, tmp_path, capsys, workers):
    """ACT and Diffusion in one search, trials with one worker or two, two metrics: the front is printed."""
    diffusion = {
        "policy": "diffusion",
        "baseline": {
            "policy.horizon": 8,
            "policy.n_action_steps": 4,
            "policy.down_dims": [16, 32],
            "policy.n_groups": 4,
            "policy.diffusion_step_embed_dim": 16,
            "policy.num_train_timesteps": 5,
            "policy.optimizer_lr": 1e-4,
        },
        "search": {"policy.optimizer_lr": {"low": 1e-5, "high": 1e-2, "log": True}},
    }
    files = f"{space_file(tmp_path)},{space_file(tmp_path, diffusion, 'diffusion')}"
    output = tmp_path / "run"
    flags = (f"--space={files}", f"--output_dir={output}", "--tune.metric=val/action_error,val/inference_ms")
    more = (f"--tune.workers_per_trial={workers}", "--ray.cpus_per_worker=1", "--tune.num_samples=2")
    assert search(*common, *flags, *more, "--steps=6") == 0
    study, summary = study_of(output), read_json(output / "summary.json")
    assert [t.user_attrs["policy"] for t in study.trials] == ["act", "diffusion"]
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
    front = {t.number for t in study.best_trials}
    assert {row["trial"] for row in summary["front"]} == front
    assert capsys.readouterr().out.count("front  ") == len(front)
    assert summary["horizon"] == 6  # the smallest chunk that either space allows
    for trial in study.trials:
        assert read_json(output / f"trials/{trial.number:04d}/summary.json")["num_workers"] == workers


@pytest.mark.slow
def test_no_room_for_the_next_trial(common, tmp_path):
    """The trials before have filled the disk: the search ends, no trial counts as failed, and with room it goes on."""
    with small_disk(tmp_path / "disk", "200m") as disk:
        output, large = disk / "run", "--policy.dim_feedforward=50000"  # a checkpoint has 120 MB
        flags = (f"--space={space_file(tmp_path)}", f"--output_dir={output}", "--tune.num_samples=2", large)
        with pytest.raises(
            RunError, match="trials/0001: .* GB are free there, one checkpoint needs about 0.1"
        ):
            search(*common, *flags, "--tune.max_concurrent=1", "--steps=4", "--eval_steps=4")
        assert [t.state for t in study_of(output).trials] == [TrialState.COMPLETE, TrialState.RUNNING]
        with pytest.raises(
            InputError, match=f"^--output_dir={output}: .* GB are free there"
        ):  # not the space's fault
            search(f"--output_dir={output}", "--resume=true")
        subprocess.run(["mount", "-o", "remount,size=1200m", str(disk)], check=True)
        assert search(f"--output_dir={output}", "--resume=true") == 0
        assert [t.state for t in study_of(output).trials] == [TrialState.COMPLETE] * 2


@pytest.mark.slow  # `test_answer` ranks by actions, `test_validation` says why
def test_kl_weight_alone(common, tmp_path):
    """A search over the KL weight picks by actions: the training loss, which has the KL term in it, would rank by the
    weight. The study lies in Optuna's journal."""
    weights = {"policy.kl_weight": {"choices": [0.01, 10.0, 1000.0]}}
    file = space_file(
        tmp_path, {**ACT, "baseline": {**ACT["baseline"], "policy.optimizer_lr": 1e-3}, "search": weights}
    )
    output, journal = tmp_path / "run", tmp_path / "journal.log"
    flags = (f"--space={file}", f"--output_dir={output}", f"--tune.storage=journal://{journal}")
    assert search(*common, *flags, "--tune.num_samples=3", "--tune.scheduler=none", "--log_freq=2") == 0
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.load_study(study_name="run", storage=storage)
    trials = [t for t in study.trials if t.state == TrialState.COMPLETE]
    records = {t.number: read_metrics(output / f"trials/{t.number:04d}") for t in trials}
    errors = {
        n: min(r["val/action_error"] for r in rows if "val/action_error" in r) for n, rows in records.items()
    }
    losses = {n: [r["train/loss"] for r in rows if "train/loss" in r][-1] for n, rows in records.items()}
    assert {t.number: t.value for t in trials} == errors
    assert read_json(output / "summary.json")["best"]["trial"] == min(errors, key=errors.get)
    weight = {t.number: t.params["policy.kl_weight"] for t in trials}
    assert [weight[n] for n in sorted(losses, key=losses.get)] == [0.01, 10.0, 1000.0]
    assert max(losses.values()) > 5 * min(losses.values())
    assert max(errors.values()) < 2 * min(errors.values())


@pytest.fixture
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server of our own."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not installed here")
    folder, user = Path(tempfile.mkdtemp()), "postgres" if os.getuid() == 0 else None  # it refuses root
    if user:
        shutil.chown(folder, user)
    port = free_port()
    how = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
    subprocess.run([programs[-1], "-D", folder / "data", "-U", "me", "-A", "trust"], check=True, **how)
    server = [programs[-1].with_name("pg_ctl"), "-D", folder / "data", "-l", folder / "log", "-w"]
    subprocess.run([*server, "-o", f"-p {port} -k {folder}", "start"], check=True, **how)
    yield f"postgresql://me@127.0.0.1:{port}/postgres"
    subprocess.run([*server, "-m", "immediate", "stop"], check=True, **how)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_postgres(common, postgres, tmp_path):
    """A search, stopped and made longer, whose study lies in PostgreSQL."""
    flags = [*common, f"--space={space_file(tmp_path)}", f"--output_dir={tmp_path / 'run'}"]
    assert search(*flags, f"--tune.storage={postgres}", "--tune.num_samples=4") == 0
    assert search(f"--output_dir={tmp_path / 'run'}", "--resume=true", "--tune.num_samples=6") == 0
    study = optuna.load_study(study_name="run", storage=postgres)
    assert len(study.trials) == 6 and all(t.state.is_finished() for t in study.trials)
    assert study.best_value == read_json(tmp_path / "run/summary.json")["best"]["values"]["val/action_error"]


RATES = {"smolvla": 1e-4, "smolvla_lora": 1e-3, "diffusion": 1e-4, "pi0": 2.5e-5, "pi05": 2.5e-5}


@pytest.mark.slow  # that they can be read and drawn from: `test_space`
@pytest.mark.parametrize("name", RATES)
def test_shipped_space(parts, models, tmp_path, name):
    """Spaces as they are, but for the policies' size; pretrained ones from a checkpoint of LeRobot's in a folder."""
    policy, base, output = name.partition("_")[0], tmp_path / "base", tmp_path / "run"
    flags = [word for word in tiny(policy, parts, output, models) if not word.startswith("--policy.type")]
    if policy != "diffusion":
        save_base(policy, base, parts, models)
        flags.append(f"--policy.pretrained_path={base}")
    flags += [
        f"--space={ROOT / 'search_spaces' / name}.yaml",
        "--data.eval_episodes=[11]",
        "--max_eval_samples=4",
    ]
    flags += ["--batch_size=2", "--num_workers=0", "--steps=2"]
    assert search(*flags, "--tune.num_samples=2", "--tune.scheduler=none") == 0
    study = study_of(output)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2, [t.user_attrs for t in study.trials]
    if name == "smolvla_lora":
        for trial in study.trials:
            adapters = next((output / f"trials/{trial.number:04d}").rglob("adapter_config.json"))
            rank = trial.params["peft.r"]
            assert (read_json(adapters)["r"], read_json(adapters)["lora_alpha"]) == (rank, rank)
    assert study.trials[0].params["policy.optimizer_lr"] == RATES[name]  # the baseline


def test_importances_of_pruned_trials():
    """One parameter decides, the other does not. Pruned trials show it as well; the baseline is no drawing."""
    study = optuna.create_study()
    distributions = {name: optuna.distributions.FloatDistribution(0, 1) for name in ("lr", "dropout")}
    points = [(n / 20, n * 7 % 20 / 20) for n in range(20)]
    for number, (lr, dropout) in enumerate([(1.0, 0.5), *points]):
        state = TrialState.COMPLETE if number < 5 else TrialState.PRUNED
        study.add_trial(
            optuna.create_trial(
                params={"lr": lr, "dropout": dropout},
                distributions=distributions,
                # At their last validations pruned trials look better: they were judged earlier.
                intermediate_values={90: lr} if number < 5 else {10: lr / 100},
                value=lr if number < 5 else lr / 100,
                state=state,
                user_attrs={} if number else {BASELINE: True},
            )
        )
    # One that was recovered from its folder, whose metrics.jsonl had gone, tells nothing.
    study.add_trial(
        optuna.create_trial(
            params=study.trials[1].params, distributions=distributions, state=TrialState.PRUNED
        )
    )
    found = importances(study)
    assert list(found) == ["lr", "dropout"] and found["lr"] > 0.8


def test_finalists_with_several_seeds(common, tmp_path, capsys):
    output = tmp_path / "run"
    flags = (f"--space={space_file(tmp_path)}", f"--output_dir={output}", "--tune.num_samples=3")
    seeds = ("--tune.seeds=3", "--tune.finalists=2", "--tune.scheduler=none")
    assert search(*common, *flags, *seeds) == 0
    summary = read_json(output / "summary.json")
    repeats = json.loads(study_of(output).user_attrs["repeats"])
    best_two = sorted(study_of(output).trials, key=lambda t: t.value)[:2]
    assert set(repeats) == {str(t.number) for t in best_two} | {"0"}  # and the baseline
    assert all(set(values) == {"6", "7"} for values in repeats.values())
    best_two = {t.number: t for t in [*best_two, study_of(output).trials[0]]}.values()
    means = {t.number: (t.value + sum(repeats[str(t.number)].values())) / 3 for t in best_two}
    assert summary["best"]["trial"] == min(means, key=means.get)
    assert summary["best"]["mean"] == pytest.approx(min(means.values()))
    assert "mean of 3 seeds" in capsys.readouterr().out
    runs = sum(len(values) for values in repeats.values())
    assert summary["repeats"]["steps"] == runs * 18 and summary["repeats"]["wall_s"] > 0
    assert f">{runs * 18}<" in (output / "report.html").read_text()


# ---------------------------------------------------------------------- wrong input

WRONG = {
    "--tune.num_sample=3": "unknown flag --tune.num_sample; did you mean --tune.num_samples?",
    "--tune.num_samples=0": "--tune.num_samples=0: must be at least 1",
    "--tune.num_samples=x": "--tune.num_samples=x: must be a whole number",
    "--tune.sampler=tpee": "did you mean tpe?",
    "--tune.scheduler=pbt": "It can be asha, hyperband, median, none",
    "--tune.metric=val/succes": "nothing reports val/succes. Validations report val/action_error",
    "--tune.time_budget_s=0": "--tune.time_budget_s=0.0: must be above 0",
    "--tune.storage=sqlite:////nowhere/at/all.db": "--tune.storage=sqlite:////nowhere/at/all.db cannot be opened",
    "--tune.storage=nonsense": "--tune.storage=nonsense cannot be opened",
    "--tune.storage=postgresql://me:secret@host/studies": "PGPASSWORD",
    "--tune.gpus_per_trial=9": "no node of this cluster has more than 0 GPUs",
    "--policy.type=diffusion": "the space is for act",
    "--ray.num_workers=2": "--tune.workers_per_trial says how many",
    "--space=nowhere.yaml": "--space=nowhere.yaml: there is no such file. There are search_spaces/act.yaml",
    "--steps=0": "--steps=0",
    "--data.eval_horizon=7": "with policy.chunk_size=6: --data.eval_horizon=7: the policy predicts 6 actions",
    "--policy.chunksize=9": "unknown flag --policy.chunksize; did you mean --policy.chunk_size?",
    "--output_dir=/proc/run": "--output_dir=/proc/run: /proc cannot be written",
    "--resume=true": "nothing to resume, there is no search in",
}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_flag(common, tmp_path, flag):
    with pytest.raises(InputError) as refused:
        search(*common, f"--space={space_file(tmp_path)}", f"--output_dir={tmp_path / 'run'}", flag)
    message = str(refused.value)
    assert WRONG[flag] in message and len(message.splitlines()) <= 2, message


@pytest.mark.parametrize(
    ("flag", "entry", "told"),
    [
        ("policy.chunk_sise", {"low": 6, "high": 10}, "policy.chunk_sise: no such flag; did you mean policy.chunk_size?"),
        ("policy.dropout", {"low": 0.0, "high": 2.0}, "with policy.dropout=2.0"),
        ("policy.n_heads", {"choices": [2, 3]}, "with policy.n_heads=3"),
        ("policy.n_action_steps", {"low": 4, "high": 9}, "--policy.n_action_steps=9 must not exceed --policy.chunk_size=8"),
    ],
)  # fmt: skip
def test_ranges_that_lerobot_refuses(common, tmp_path, flag, entry, told):
    """Found at the space's corners, with file and line, before anything is scheduled."""
    baseline = ACT["baseline"] | {flag: entry.get("low", entry.get("choices", [0])[0])}
    file = space_file(tmp_path, {"policy": "act", "baseline": baseline, "search": {flag: entry}})
    # The flag stands in both sections; either line leads to it.
    lines = [n for n, text in enumerate(file.read_text().splitlines(), 1) if text.startswith(f"  {flag}:")]
    with pytest.raises(InputError) as refused:
        search(*common, f"--space={file}", f"--output_dir={tmp_path / 'run'}")
    message = str(refused.value)
    assert told in message and not (tmp_path / "run").exists(), message
    assert any(f"{file}:{line}:" in message for line in lines), message


def test_study_of_something_else(common, asha, tmp_path):
    """A stored study does not go on in another space, or with another metric."""
    storage = ("--tune.study_name=run", f"--tune.storage=sqlite:///{asha / 'study.db'}")
    where = f"--output_dir={tmp_path / 'run'}"
    other = {
        **ACT,
        "search": {"policy.dropout": {"choices": [0.0, 0.1]}},
        "baseline": {**ACT["baseline"], "policy.dropout": 0.1},
    }
    for flags, told in (
        ([f"--space={space_file(tmp_path, other)}"], "searches another space"),
        ([f"--space={space_file(tmp_path, ACT, 'same')}", "--tune.metric=val/loss"], "optimizes val/action_error, the command val/loss"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            search(*common, *flags, *storage, where)
    optuna.create_study(study_name="run", storage=f"sqlite:///{tmp_path / 'theirs.db'}").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    theirs = f"--tune.storage=sqlite:///{tmp_path / 'theirs.db'}"
    same = f"--space={space_file(tmp_path, ACT, 'same')}"
    with pytest.raises(InputError, match="is not one of ray_jobs.tune"):
        search(*common, same, "--tune.study_name=run", theirs, where)
    with pytest.raises(InputError, match="was begun with --batch_size=4, the command has 3"):
        search(*common, same, *storage, where, "--batch_size=3")


@pytest.mark.slow  # `test_killed_driver` and `test_time_budget` go on, under their own names
def test_a_renamed_search_goes_on(asha, tmp_path, capsys):
    """With its own spaces, whatever the file has become that it began with."""
    moved = Path(shutil.copytree(asha, tmp_path / "moved"))
    edited = space_file(tmp_path, {**ACT, "search": {"policy.dropout": {"choices": [0.0, 0.1]}}})
    more = (f"--space={edited}", "--tune.num_samples=13")
    assert search(f"--output_dir={moved}", "--resume=true", *more) == 0
    assert "--space is not what the search began with" in capsys.readouterr().out
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{moved / 'study.db'}")
    assert len([t for t in study.trials if "config" in t.user_attrs]) == 13
    assert [t.values for t in study.trials[:12]] == [t.values for t in study_of(asha).trials]


def test_dry_run(common, tmp_path, capsys):
    """Parameters, first configurations, cost; nothing is left behind."""
    flags = (f"--space={space_file(tmp_path)}", f"--output_dir={tmp_path / 'run'}", "--dry-run")
    assert search(*common, *flags, "--cost_per_hour=3600") == 0
    printed = capsys.readouterr().out
    hours, price = re.search(r"or (\S+) h; at 3600 an hour it costs (\S+)", printed).groups()
    assert float(price) == pytest.approx(float(hours) * 3600, rel=0.1) and float(price) > 1
    assert "policy.kl_weight" in printed and "1 to 100 log, when policy.use_vae is true" in printed
    assert "0 (baseline)" in printed and "s per step of the baseline" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("trials", [2, 6])
def test_dry_run_against_the_search(parts, tmp_path, capsys, trials):
    """On the demo's task, slots' start included: within 30 %. Both are timed: told before and after, for other work may
    come and go on the machine."""
    flags = [
        f"--space={ROOT / 'search_spaces' / 'act_demo.yaml'}",
        f"--dataset.root={parts}",
        "--policy.device=cpu",
    ]
    flags += ["--dataset.repo_id=local/parts", "--dataset.video_backend=pyav", "--data.eval_episodes=[10,11]"]
    flags += ["--num_workers=1", "--steps=60", f"--tune.num_samples={trials}"]

    def told() -> float:
        assert search(*flags, f"--output_dir={tmp_path / 'told'}", "--dry-run", "--cost_per_hour=3600") == 0
        return float(re.search(r"it costs (\S+)", capsys.readouterr().out)[1])

    before = told()
    assert search(*flags, f"--output_dir={tmp_path / 'run'}") == 0
    took, after = read_json(tmp_path / "run/summary.json")["wall_s"], told()
    assert 0.7 < (before + after) / 2 / took < 1.3, (before, took, after)
