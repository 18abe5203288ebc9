"""Where a run is in its data, counted in samples: what a checkpoint keeps, so that a run which goes on with another batch
size, another number of workers or other accumulation reads on where it was.

Stock LeRobot takes it from the step, as if every step of the run had been like the last one. Where that is true, which it is
unless something was changed or gradients are accumulated, a checkpoint is LeRobot's own; else `training_step.json` says it:

    {"step": 6, "num_processes": 1, "batch_size": 2, "sampler": {"epoch": 0, "start_index": 18}}
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from lerobot.datasets import compute_sampler_state
from lerobot.utils.constants import TRAINING_STATE_DIR, TRAINING_STEP

SAMPLER = "sampler"


@dataclass(frozen=True)
class Position:
    """A place in the order of the data, in the terms of LeRobot's `EpisodeAwareSampler.state_dict`."""

    epoch: int = 0
    start_index: int = 0
    """Samples of the epoch that were read."""

    @classmethod
    def of(cls, counter: dict, samples: int, batch_size: int, shards: int) -> "Position":
        """Where the run was that wrote a checkpoint.

        Args:
            counter: The checkpoint's `training_step.json`.
            samples: Of an epoch.
            batch_size, shards: What counts for checkpoints of an older LeRobot, which do not say it.
        """
        if SAMPLER in counter:
            return cls(**counter[SAMPLER])
        batch_size, shards = counter.get("batch_size", batch_size), counter.get("num_processes", shards)
        return cls(**compute_sampler_state(counter["step"], samples, batch_size, shards))

    def left(self, samples: int, batch_size: int, shards: int) -> int:
        """Batches that each shard is still given in this epoch, the last ones of them filled up."""
        return math.ceil(math.ceil((samples - self.start_index) / batch_size) / shards)

    def within(self, samples: int) -> "Position":
        """The same in an epoch of so many samples: the next one's beginning, if this one has fewer than were read."""
        return self if self.start_index < samples else Position(self.epoch + 1)

    def after(self, batches: int, samples: int, batch_size: int, shards: int) -> "Position":
        """Where a run is once each shard was given so many batches more."""
        here = self.within(samples)
        left = here.left(samples, batch_size, shards)
        if batches < left:
            return Position(here.epoch, here.start_index + batches * batch_size * shards)
        later = compute_sampler_state(batches - left, samples, batch_size, shards)
        return Position(here.epoch + 1 + later["epoch"], later["start_index"])

    def write(self, checkpoint_dir: Path, samples: int) -> None:
        """Put it into a checkpoint that LeRobot has written, if LeRobot would not find it by itself."""
        file = checkpoint_dir / TRAINING_STATE_DIR / TRAINING_STEP
        counter = json.loads(file.read_text())
        if self != Position.of(counter, samples, counter["batch_size"], counter["num_processes"]):
            file.write_text(json.dumps({**counter, SAMPLER: asdict(self)}, indent=4))


START = Position()


@dataclass
class Shards:
    """The batches of a step, as a full group of workers would divide them. An elastic group that lacks some does their
    share, too: which samples a step is made of depends on the full number alone."""

    count: int
    """Workers of the full group, each with a shard of the data's order."""
    mine: range
    """Those whose share this worker does, at least its own."""
    weight: float
    """What makes the average over the workers' losses the average over all shards, when some do more than others."""
