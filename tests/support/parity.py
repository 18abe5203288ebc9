"""`lerobot-train` and our loop in processes of their own, to be compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Runs `lerobot-train` once per list of flags. Its log lines have three decimals; the object behind a line has all.
LEROBOT_TRAIN = """
import json, logging, os, sys
import torch
from lerobot.scripts.lerobot_train import main
from lerobot.utils.logging_utils import MetricsTracker

make_record = logging.getLogRecordFactory()

def print_exactly(*args, **kwargs):
    record = make_record(*args, **kwargs)
    if isinstance(record.msg, MetricsTracker):
        print(json.dumps([run, record.msg.to_dict()]), flush=True)
    return record

if __name__ == "__main__":
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        keep = torch.distributed.group.WORLD  # torch deadlocks now and then when DDP frees it at the end
    logging.setLogRecordFactory(print_exactly)
    for run, flags in enumerate(json.loads(sys.argv[1])):
        sys.argv[1:] = flags
        main()
    os._exit(0)
"""


# Runs the bare loop once per list of flags; several processes form one run.
OUR_LOOP = f"""
import json, os, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from support.commands import train_in_process

if __name__ == "__main__":
    for flags in json.loads(sys.argv[1]):
        train_in_process(flags)
    os._exit(0)
"""


def run_script(
    script: str, folder: Path, runs: list[list[str]], processes: int = 1, **env: str
) -> list[list[dict]]:
    """Run a script on lists of flags, in one or several processes; what it logged, run by run."""
    file = folder / "script.py"
    file.write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    result = subprocess.run(
        [sys.executable, *launcher * (processes > 1), str(file), json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    logged: list[list[dict]] = [[] for _ in runs]
    for line in result.stdout.splitlines():
        if line.startswith("["):
            run, record = json.loads(line)
            logged[run].append(record)
    return logged


def assert_same_training(ours: list[dict], theirs: list[dict], rel: float) -> None:
    """Loss and learning rate of every step; the gradient norm follows rounding errors a hundred times closer."""
    ours = [record for record in ours if "train/loss" in record]
    assert len(ours) == len(theirs) > 0
    for mine, stocks in zip(ours, theirs, strict=True):
        assert mine["step"] == stocks["steps"]
        for key, tolerance in (("loss", rel), ("grad_norm", 100 * rel), ("lr", 1e-12)):
            assert mine[f"train/{key}"] == pytest.approx(stocks[key], rel=tolerance), (mine["step"], key)
