"""What an older version has made is resumed and read by this one (see `data/made_by_0.1.0/README.md`)."""

import shutil
from importlib.metadata import version
from pathlib import Path

import fsspec
import optuna
import pytest
import torch
from optuna.trial import TrialState

from ray_jobs import cache as cache_job
from ray_jobs import evaluate, report, tune
from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.cluster import worker
from ray_jobs.config.errors import GO_ON
from ray_jobs.config.events import Notice
from ray_jobs.data.frames import FrameSource
from ray_jobs.storage.records import read_json, read_metrics
from support.commands import tiny_act, train_in_process

torch.set_num_threads(1)  # as they were made
MADE = Path(__file__).parent / "data" / "made_by_0.1.0"
TIMES = {"train/step_s", "train/data_s", "train/samples_per_s"}
STATE = ("pretrained_model/model.safetensors", "training_state")


@pytest.fixture
def made(tmp_path) -> Path:
    """A copy to work with. It names its own folder, except in the bucket, where the sizes of files are recorded."""
    copy = shutil.copytree(MADE, tmp_path / "made", symlinks=True)
    recorded = Path(read_json(MADE / "run/options.json")["asked"]["typed"]["dataset.root"]).parent
    for file in (file for folder in ("run", "search", "cache") for file in (copy / folder).rglob("*.json")):
        file.write_text(file.read_text().replace(str(recorded), str(copy)))
    return copy


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The old run's command, trained by this version to step 6 without an interruption."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    typed = read_json(MADE / "run/options.json")["asked"]["typed"]
    typed |= {"dataset.root": MADE / "numbers", "output_dir": output_dir, "steps": 6}
    train_in_process([f"--{flag}={value}" for flag, value in typed.items()])
    return output_dir


def state(checkpoint: Path) -> dict[str, bytes]:
    """Weights, and all that a training goes on with."""
    files = [path for name in STATE for path in (checkpoint / name, *(checkpoint / name).glob("*"))]
    return {path.name: path.read_bytes() for path in files if path.is_file()}


def assert_same_training(whole: Path, run: Path) -> None:
    """All losses are those of the training without an interruption: to the last bit, if this processor rounds as the one did
    on which the old checkpoint was made. So are weights and optimizer."""
    same_rounding = state(whole / "checkpoints/000004") == state(MADE / "run/checkpoints/000004")
    resumed, expected = read_metrics(run), read_metrics(whole)
    assert [record["step"] for record in resumed] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    for ours, theirs in zip(resumed, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - TIMES:
            assert ours[key] == pytest.approx(theirs[key], rel=0 if same_rounding else 1e-3, abs=0), key
    if same_rounding:
        assert state(run / "checkpoints/000006") == state(whole / "checkpoints/000006")


def test_a_run_is_resumed(made, whole):
    resumed, _ = train_in_process([f"--output_dir={made / 'run'}", "--resume=true", "--steps=6"])
    assert (resumed["start_step"], resumed["status"]) == (4, "finished")
    assert_same_training(whole, made / "run")


@pytest.fixture
def bucket(made, monkeypatch):
    """A folder of this machine that takes files as a bucket does, without folders being made for them; and a new node."""
    monkeypatch.setenv("RAY_JOBS_CACHE", str(made / "node"))
    monkeypatch.setitem(fsspec.config.conf, "file", {"auto_mkdir": True})
    fsspec.get_filesystem_class("file").clear_instance_cache()
    yield made / "bucket"
    fsspec.get_filesystem_class("file").clear_instance_cache()


def test_a_run_in_a_bucket_is_resumed(made, whole, bucket):
    run = bucket / "run"
    asked = [f"--output_dir=file://{run}", f"--dataset.root={made / 'numbers'}", "--resume=true", "--steps=6"]
    recipe = preflight.check(resolve(asked))
    resumed = worker.run_loop(
        recipe, main=True, device="cpu", report=lambda event: None, should_stop=lambda: GO_ON
    )
    assert (resumed["start_step"], resumed["status"]) == (4, "finished")
    assert_same_training(whole, run)
    assert not (run / "checkpoints/000004").exists(), "it was begun with --checkpoint.keep_last=1"


def trials(search: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{search / 'study.db'}").trials


def action_errors(checkpoint: Path, target: Path) -> list[float]:
    """What an evaluation finds, of each trial if it is a search's."""
    assert evaluate.main([f"--checkpoint={checkpoint}", f"--output_dir={target}"]) == 0
    results = read_json(target / "evaluation.json")["results"]
    return [result["val/action_error"] for result in results.values()]


def test_a_search_is_evaluated_and_reported(made, tmp_path):
    search = made / "search"
    found = action_errors(search, tmp_path / "evaluation")
    assert found == pytest.approx([trial.value for trial in trials(search)], rel=1e-5)
    assert action_errors(search / "best/checkpoint", tmp_path / "of the best") == [min(found)]
    assert report.main([f"--output_dir={search}"]) == 0
    text = (search / "report.html").read_text()
    assert "Predicted against recorded actions" in text and f"{min(found):.4f}" in text


def test_a_search_goes_on(made, tmp_path):
    """With what it knows, to one more trial."""
    search = made / "search"
    before, rows = trials(search), (search / "trials.csv").read_text().splitlines()
    assert tune.main([f"--output_dir={search}", "--resume=true", "--tune.num_samples=3"]) == 0
    *old, new = trials(search)
    assert old == before and new.state in (TrialState.COMPLETE, TrialState.PRUNED)
    assert (search / "trials.csv").read_text().splitlines()[:-1] == rows
    assert (search / "report.html").is_file()
    best = read_json(search / "summary.json")["best"]["values"]["val/action_error"]
    assert action_errors(search / "best/checkpoint", tmp_path / "evaluation") == pytest.approx(
        [best], rel=1e-5
    )


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(
    any(version(package) != which for package, which in read_json(MADE / "decoded_with.json").items()),
    reason="another decoder's frames are decoded again, as they should be",
)
def test_frames_are_not_decoded_again(made, tmp_path, monkeypatch, capsys):
    cache, pictures = made / "cache", made / "pictures"
    for decode in ("episode", "video"):
        monkeypatch.setattr(FrameSource, decode, lambda *_: pytest.fail("decoded again"))
    before = files(cache)
    flags = tiny_act(pictures, tmp_path / "run", "--steps=2", "--num_workers=0", "--save_checkpoint=false")
    _, events = train_in_process([*flags, "--dataset.repo_id=local/pictures", f"--data.cache={cache}"])
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert f"frame cache: 2.76e-05 GB of 1 camera(s) in {cache}" in notices
    after = files(cache)
    assert after == before | {Path("files.json"): after[Path("files.json")]}
    assert cache_job.main(["list", f"--data.cache={cache}"]) == 0
    listed = capsys.readouterr().out
    assert " 9 frames" in listed and "stale" not in listed
    assert cache_job.main(["verify", f"--data.cache={cache}"]) == 0
