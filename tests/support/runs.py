"""What a run leaves, compared and read."""

import json
import time
from pathlib import Path

from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from ray_jobs.storage.records import read_json


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Weights, processors, optimizer, schedule and random state, byte for byte."""
    files = {path.relative_to(a) for path in a.rglob("*") if path.is_file()}
    assert files == {path.relative_to(b) for path in b.rglob("*") if path.is_file()}
    for file in files - {Path("pretrained_model/train_config.json"), Path("pretrained_model/config.json")}:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    # LeRobot notes where a resumed policy came from.
    config_a, config_b = (read_json(path / "pretrained_model" / "config.json") for path in (a, b))
    assert config_a | {"pretrained_path": None} == config_b | {"pretrained_path": None}


def wandb_runs(output_dir: Path) -> list[dict]:
    """The runs in a folder, oldest first, read back from the files that W&B would upload."""
    files = sorted(output_dir.glob("wandb/offline-run-*/*.wandb"))
    for _ in range(100):
        runs = [wandb_run(file) for file in files]
        if all("exit" in run for run in runs):
            return runs
        time.sleep(0.1)  # W&B's own process writes them, a moment after finish() returns
    raise AssertionError("W&B never finished its files")


def wandb_run(file: Path) -> dict:
    run: dict = {"files": file.parent / "files", "history": [], "summary": {}, "config": {}}
    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run["id"] = record.run.run_id
            run["name"], run["group"] = record.run.display_name, record.run.run_group
            run["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            items = record.history.item
            run["history"].append({"/".join(i.nested_key): json.loads(i.value_json) for i in items})
        if record.HasField("summary"):
            for item in record.summary.update:
                run["summary"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("exit"):
            run["exit"] = record.exit.exit_code
    return run
