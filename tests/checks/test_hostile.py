"""Hostile input: checkpoints, data sets, space files, options and addresses that somebody else has made.

All are refused in two lines, in seconds, and nothing outside of the test's folders is made, changed, run or unpickled.
"""

import builtins
import itertools
import json
import os
import pickle
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from ray_jobs import evaluate
from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.search.plan import read_command
from ray_jobs.search.spaces.space_file import read_space
from ray_jobs.storage import bucket
from ray_jobs.training import loop
from support.commands import tiny_act

SECONDS = 20  # any of them may take
CAMERA = "observation.images.top"
MODEL, STATE = "checkpoints/000002/pretrained_model", "checkpoints/000002/training_state"


class Trap:
    """Whoever unpickles this makes a file."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return builtins.open, (self.file, "w")


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder of somebody else's, which must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["precious"]
    assert (folder / "precious").read_text() == "mine"


@pytest.fixture(autouse=True)
def in_time():
    """Ends what hangs."""

    def too_long(signum, frame):
        raise AssertionError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(act: Callable[[], object]) -> str:
    """What an attempt is refused with."""
    with pytest.raises((InputError, RunError)) as refused:
        act()
    message = str(refused.value)
    assert 1 <= len(message.splitlines()) <= 3 and len(message) < 2000, message
    return message


def train(*flags: str) -> None:
    resolved = resolve(list(flags))
    resolved = preflight.check(resolved)
    loop.train(resolved, device="cpu")


def edit(**changes) -> Callable[[Path, Path], None]:
    def spoil(file: Path, outside: Path) -> None:
        content = json.loads(file.read_text())
        for key, value in changes.items():
            at = content
            *path, last = key.split("__")
            for part in path:
                at = at[int(part) if part.isdigit() else part]
            at[int(last) if last.isdigit() else last] = (
                value.replace("OUTSIDE", str(outside)) if isinstance(value, str) else value
            )
        file.write_text(json.dumps(content))

    return spoil


def text(content: str) -> Callable[[Path, Path], None]:
    return lambda file, outside: file.write_text(content)


def pickled(file: Path, outside: Path) -> None:
    file.write_bytes(pickle.dumps(Trap(outside / "made")))


def torch_saved(file: Path, outside: Path) -> None:
    torch.save({"weight": Trap(outside / "made")}, file)


def long_header(file: Path, outside: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def overlapping(file: Path, outside: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)


def others(file: Path, outside: Path) -> None:
    save_file({"x": torch.zeros(3)}, file)


def link(name: str) -> Callable[[Path, Path], None]:
    """A link out of the run, instead of one of its files or beside them."""

    def spoil(file: Path, outside: Path) -> None:
        target = outside / name if name else outside
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
        file.symlink_to(target)

    return spoil


CODE = {"class": "builtins.open", "config": {"file": "OUTSIDE/made", "mode": "w"}}
SHELL = {"class": "subprocess.Popen", "config": {"args": ["touch", "OUTSIDE/made"]}}
LEROBOTS = {"class": "lerobot.processor.pipeline.Path.touch", "config": {"self": "OUTSIDE/made"}}
FETCH = {"class": "lerobot.processor.pipeline.hf_hub_download",
         "config": {"repo_id": "a/b", "filename": "made", "local_dir": "OUTSIDE"}}  # fmt: skip


def step(entry: dict) -> Callable[[Path, Path], None]:
    """A processor step at the beginning of a pipeline."""

    def spoil(file: Path, outside: Path) -> None:
        content = json.loads(file.read_text())
        content["steps"].insert(0, json.loads(json.dumps(entry).replace("OUTSIDE", str(outside))))
        file.write_text(json.dumps(content))

    return spoil


CHECKPOINTS = {
    "weights are a pickle": (f"{MODEL}/model.safetensors", pickled),
    "weights by torch.save": (f"{MODEL}/model.safetensors", torch_saved),
    "header of 2^62 bytes": (f"{MODEL}/model.safetensors", long_header),
    "tensor larger than its file": (f"{MODEL}/model.safetensors", overlapping),
    "weights of something else": (f"{MODEL}/model.safetensors", others),
    "optimizer is a pickle": (f"{STATE}/optimizer_state.safetensors", pickled),
    "optimizer of something else": (f"{STATE}/optimizer_state.safetensors", others),
    "random state is a pickle": (f"{STATE}/rng_state.safetensors", torch_saved),
    "random state of something else": (f"{STATE}/rng_state.safetensors", others),
    "parameter groups are a list of lists": (f"{STATE}/optimizer_param_groups.json", text("[[[]]]")),
    "parameter groups without parameters": (f"{STATE}/optimizer_param_groups.json", text("[{}]")),
    "step is negative": (f"{STATE}/training_step.json", edit(step=-5)),
    "step is a list": (f"{STATE}/training_step.json", edit(step=[1])),
    "counter is a list": (f"{STATE}/training_step.json", text("[1]")),
    "batch size 0": (f"{STATE}/training_step.json", edit(batch_size=0)),
    "config is a list": (f"{MODEL}/config.json", text("[]")),
    "config of an unknown type": (f"{MODEL}/config.json", edit(type="../../evil")),
    "nested a thousand times": (f"{MODEL}/config.json", text("[" * 100_000)),
    "train_config is a number": (f"{MODEL}/train_config.json", text("7")),
    "train_config of an unknown optimizer": (f"{MODEL}/train_config.json", edit(optimizer={"type": "evil"})),
    "processor opens a file": (f"{MODEL}/policy_preprocessor.json", step(CODE)),
    "processor starts a program": (f"{MODEL}/policy_postprocessor.json", step(SHELL)),
    "processor calls what LeRobot has imported": (f"{MODEL}/policy_preprocessor.json", step(FETCH)),
    "processor calls a method": (f"{MODEL}/policy_preprocessor.json", step(LEROBOTS)),
    "processor of an unknown name": (f"{MODEL}/policy_preprocessor.json", step({"registry_name": "evil"})),
    "processor state elsewhere": (
        f"{MODEL}/policy_preprocessor.json",
        edit(steps__0__state_file="../../../../../outside/precious"),
    ),
    "processors are a list": (f"{MODEL}/policy_preprocessor.json", text("[]")),
    "options are a list": ("options.json", text("[1]")),
    "options of numbers": ("options.json", text('{"ray": 5}')),
    "options with words": ("options.json", text('{"ray": {"num_workers": "--steps=9"}}')),
    "asked is a list": ("options.json", text('{"asked": [1]}')),
    "options lead out": (".options.json.tmp", link("precious")),
    "lock leads out": (".lock", link("precious")),
    "metrics lead out": (".metrics.jsonl.tmp", link("precious")),
    "summary leads out": ("summary.json", link("precious")),
    "a new checkpoint leads out": ("checkpoints/.000004.tmp", link("")),
    "a checkpoint lies elsewhere": ("checkpoints/000002", link("")),
    "Ray's folder leads out": (".ray", link("")),
    "a file of a checkpoint leads out": (f"{STATE}/training_step.json", link("precious")),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(case, parts, run, tmp_path, outside):
    """A run folder is resumed that somebody else has prepared."""
    file, spoil = CHECKPOINTS[case]
    hostile = shutil.copytree(run, tmp_path / "run", symlinks=True)
    spoil(hostile / file, outside)
    refusal(lambda: train(*tiny_act(parts, hostile, "--resume=true", "--steps=4")))


@pytest.mark.parametrize("spoil", [pickled, torch_saved])
def test_backbone(spoil, parts, tmp_path, outside):
    """torchvision itself would unpickle it."""
    spoil(tmp_path / "resnet18-f37072fd.pth", outside)
    flags = [f for f in tiny_act(parts, tmp_path / "run", "--steps=1") if "backbone_weights" not in f]
    assert "holds no weights of torchvision's" in refusal(lambda: train(*flags, f"--assets.dir={tmp_path}"))
    with pytest.raises(pickle.UnpicklingError):  # whoever asks
        torch.load(tmp_path / "resnet18-f37072fd.pth", weights_only=False)


POLICIES = ("weights are a pickle", "weights by torch.save", "header of 2^62 bytes", "processor opens a file",
            "processor starts a program", "processor calls what LeRobot has imported", "processor state elsewhere",
            "config is a list")  # fmt: skip


@pytest.mark.parametrize("case", POLICIES)
def test_policy_to_start_from(case, parts, run, tmp_path, outside):
    """The same files, as a policy to start from."""
    file, spoil = CHECKPOINTS[case]
    hostile = shutil.copytree(run, tmp_path / "start", symlinks=True)
    spoil(hostile / file, outside)
    flags = [f for f in tiny_act(parts, tmp_path / "run", "--steps=1") if not f.startswith("--policy.")]
    refusal(lambda: train(*flags, "--policy.push_to_hub=false", f"--policy.path={hostile / MODEL}"))


PROCESSORS = [case for case in CHECKPOINTS if case.startswith("processor ")]


@pytest.mark.parametrize("case", PROCESSORS)
def test_policy_to_evaluate(case, run, tmp_path, outside):
    """And as one whose score is wanted."""
    file, spoil = CHECKPOINTS[case]
    hostile = shutil.copytree(run, tmp_path / "run", symlinks=True)
    spoil(hostile / file, outside)
    flags = [f"--checkpoint={hostile}", "--data.eval_episodes=[0]", f"--output_dir={tmp_path / 'scored'}"]
    assert "cannot start from" in refusal(lambda: evaluate.main(flags))


@pytest.mark.parametrize("name", [".search.json.tmp", "trials/0000", "trials/0000/metrics.jsonl", "spaces"])
def test_search_to_resume(name, tmp_path, outside):
    """A search's folder, in which something leads out."""
    folder = tmp_path / "search"
    (folder / name).parent.mkdir(parents=True)
    (folder / "search.json").write_text(json.dumps({"flags": {}, "policies": []}))
    (folder / name).symlink_to(outside / ("precious" if "." in name else ""))
    flags = [f"--output_dir={folder}", "--resume=true", "--tune.num_samples=1"]
    assert "leads out" in refusal(lambda: read_command(flags))


def episodes(**columns) -> Callable[[Path, Path], None]:
    def spoil(file: Path, outside: Path) -> None:
        table = pq.read_table(file)
        for name, value in columns.items():
            name = name.replace("__", "/")
            table = table.set_column(table.column_names.index(name), name, pa.array([value] * len(table)))
        pq.write_table(table, file)

    return spoil


INFO, EPISODES = "meta/info.json", "meta/episodes/chunk-000/file-000.parquet"
DATA_SETS = {
    "tables above the root": (INFO, edit(data_path="../outside/{chunk_index}-{file_index}.parquet")),
    "tables at an absolute path": (INFO, edit(data_path="/{chunk_index}/{file_index}.parquet")),
    "videos above the root": (INFO, edit(video_path="{video_key}/../../outside/precious")),
    "attributes in a path": (
        INFO,
        edit(video_path="{video_key.__class__.__mro__}/{chunk_index}/{file_index}"),
    ),
    "unknown names in a path": (INFO, edit(data_path="data/{evil}.parquet")),
    "a width of 10^9 in a path": (INFO, edit(data_path="data/{chunk_index:01000000000d}.parquet")),
    "no path at all": (INFO, edit(data_path=None)),
    "a camera named ..": (
        INFO,
        edit(**{"features__../../outside": {"dtype": "video", "shape": [64, 64, 3], "names": None}}),
    ),
    "10^15 frames": (INFO, edit(total_frames=10**15, total_episodes=10**15)),
    "no frames in a second": (INFO, edit(fps=0)),
    "images of 10^12 pixels": (INFO, edit(**{f"features__{CAMERA}__shape": [10**6, 10**6, 3]})),
    "images of no shape": (INFO, edit(**{f"features__{CAMERA}__shape": "evil"})),
    "actions of another type": (INFO, edit(features__action__dtype="object")),
    "features are a list": (INFO, edit(features=[1])),
    "info is a list": (INFO, text("[]")),
    "statistics are words": ("meta/stats.json", edit(action={"mean": "evil", "std": "evil"})),
    "statistics are a list": ("meta/stats.json", text("[]")),
    "file numbers are words": (EPISODES, episodes(data__file_index="../../outside/precious")),
    "negative file numbers": (EPISODES, episodes(data__file_index=-1)),
    "episodes are a pickle": (EPISODES, pickled),
    "tables are a pickle": ("data/chunk-000/file-000.parquet", pickled),
    "tasks are a pickle": ("meta/tasks.parquet", pickled),
    "videos are a pickle": (f"videos/{CAMERA}/chunk-000/file-000.mp4", pickled),
    "videos are a playlist": (
        f"videos/{CAMERA}/chunk-000/file-000.mp4",
        text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
    ),
}


@pytest.mark.parametrize("case", DATA_SETS)
def test_data_set(case, parts, tmp_path, outside):
    file, spoil = DATA_SETS[case]
    root = shutil.copytree(parts, tmp_path / "parts")
    spoil(root / file, outside)
    refusal(lambda: train(*tiny_act(root, tmp_path / "run", "--steps=2", "--save_checkpoint=false")))


SPACE = """policy: act
baseline: {policy.chunk_size: 20, policy.n_heads: 4}
search:
  policy.chunk_size: {low: 10, high: 40}
"""
BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnop")
)
SPACES = {
    "a Python object": SPACE + "constraints: !!python/object/apply:os.system ['touch OUTSIDE/made']",
    "a Python name": SPACE + "constraints: !!python/name:os.system",
    "YAML that unfolds": BOMB + SPACE,
    "choices that unfold": SPACE + BOMB.replace("\n", "\n  ").replace("a: &a", "  policy.n_heads: &a") ,
    "a call": SPACE + "constraints: ['__import__(\"os\").system(\"touch OUTSIDE/made\") == 0']",
    "an attribute": SPACE + "constraints: ['().__class__.__mro__ == 1']",
    "a long word": SPACE + "constraints: [\"'a' * 99999999999 == policy.chunk_size\"]",
    "a large power": SPACE + "constraints: ['9 ** 9 ** 9 ** 9 > policy.chunk_size']",
    "parentheses": SPACE + "constraints: ['" + "(" * 100_000 + "1" + ")" * 100_000 + " == 1']",
    "brackets": SPACE + "constraints: " + "[" * 100_000,
    "sums": SPACE + "constraints: ['" + "1+" * 100_000 + "1 == 1']",
    "where a run is written": SPACE.replace("policy.chunk_size: {low", "output_dir: {choices: [/etc, /usr]}\n  policy.chunk_size: {low"),
    "which code is run": SPACE.replace("policy.n_heads: 4", "env.discover_packages_path: evil"),
    "NaN": SPACE.replace("low: 10", "low: .nan"),
    "infinite": SPACE.replace("high: 40", "high: .inf"),
    "bytes": "\x00\x01\x02",
}  # fmt: skip


@pytest.mark.parametrize("case", SPACES)
def test_space(case, tmp_path, outside):
    file = tmp_path / "space.yaml"
    file.write_text(SPACES[case].replace("OUTSIDE", str(outside)))
    refusal(lambda: read_space(file))


def test_space_that_never_ends(tmp_path):
    os.mkfifo(tmp_path / "space.yaml")
    assert "not a file" in refusal(lambda: read_space(tmp_path / "space.yaml"))
    assert refusal(lambda: read_space(Path("/dev/zero")))


URIS = ("s3://", "s3:///", "s3://bucket/../../etc", "file:///etc", "http://127.0.0.1:1/latest/meta-data", "memory://set",
        "zip://*::http://127.0.0.1:1/x.zip", "simplecache::s3://bucket/set", "local:///etc", "github://a:b@/", "evil://x",
        "s3://user:secret@bucket/set", "s3://key:a/secret@bucket/set", "ftp://127.0.0.1:1/set", "data:///x", "s3://anonymous@/", "s3://b/\x00")  # fmt: skip


@pytest.mark.parametrize("uri", URIS)
def test_address_of_a_data_set(uri, tmp_path, monkeypatch, outside):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    flags = tiny_act(Path("x"), tmp_path / "run", "--data.source=stream", f"--dataset.root={uri}")
    assert "secret" not in refusal(lambda: train(*flags))


def test_bucket_whose_names_lead_out(parts, tmp_path, outside, monkeypatch):
    """A bucket that lists `meta/../../outside/made`."""
    monkeypatch.setattr(bucket, "default_folder", lambda: tmp_path / "cache")
    names = ("meta/info.json", "meta/../../../../outside/made", "/meta/x", "meta/./x")
    for name in names[1:]:
        monkeypatch.setattr(
            bucket, "listing", lambda root, *folders, name=name: dict.fromkeys((names[0], name), "1")
        )
        bucket.fetch.cache_clear()
        assert "leads out" in refusal(lambda: bucket.fetch(f"file://{parts}"))
    bucket.fetch.cache_clear()
