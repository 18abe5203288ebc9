"""What `lerobot-train` does with each data set of the table, and with those drawn: five steps, or its error.

python tests/world/stock.py [NAME ...]        # records into stock.json: all, or these
python tests/world/stock.py --into=FILE       # all, into another file
"""

import contextlib
import io
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from make import RECORDINGS, write  # noqa: E402
from properties import TABLE, DataSet  # noqa: E402

from support.commands import tiny_act  # noqa: E402

RECORD = HERE / "stock.json"
STEPS = 5


def flags_for(properties: DataSet, root: Path, output_dir: Path) -> list[str]:
    """Of LeRobot's training and of ours."""
    common = ["--num_workers=0", f"--steps={STEPS}", "--save_checkpoint=false"]
    return tiny_act(root, output_dir, *common, *properties.flags)


def train_as_stock(flags: list[str]) -> list[float | None] | str:
    """The losses, with all their digits, or the last line of LeRobot's error."""
    from lerobot.scripts.lerobot_train import main

    losses: list[float | None] = []
    with _heard(losses), _words(flags), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except BaseException as error:
            return (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[-1]
    return losses


@contextlib.contextmanager
def _heard(losses: list[float | None]) -> Iterator[None]:
    """A line of its log has three decimals; the object behind it has all."""
    from lerobot.utils.logging_utils import MetricsTracker

    make_record, handlers, level = logging.getLogRecordFactory(), logging.root.handlers[:], logging.root.level

    def hear(*args, **kwargs):
        record = make_record(*args, **kwargs)
        if isinstance(record.msg, MetricsTracker):
            loss = record.msg.to_dict()["loss"]
            losses.append(loss if math.isfinite(loss) else None)
        return record

    logging.setLogRecordFactory(hear)
    before = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    try:
        yield
    finally:
        logging.disable(before)
        logging.setLogRecordFactory(make_record)
        logging.root.handlers[:], logging.root.level = handlers, level


@contextlib.contextmanager
def _words(flags: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, [sys.argv[0], *flags]
    try:
        yield
    finally:
        sys.argv = before


def record(names: list[str]) -> dict[str, dict]:
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            root = write(TABLE[name], Path(folder))
            found[name] = outcome = train_as_stock(flags_for(TABLE[name], root, Path(folder) / "run"))
            if isinstance(outcome, str):
                found[name] = outcome.replace(str(folder), "<folder>")
        print(f"{name}: {found[name]}", flush=True)
    return found


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    into = [word.removeprefix("--into=") for word in sys.argv[1:] if word.startswith("--into=")]
    names, file = [word for word in sys.argv[1:] if not word.startswith("--")], Path(*into or [RECORD])
    known = json.loads(file.read_text()) if file.is_file() else {}
    there = [
        name for name, line in TABLE.items() if (RECORDINGS / line.recording).is_dir() or not line.recording
    ]
    known |= record(names or there)
    kept = {name: known[name] for name in TABLE if name in known}
    file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
