"""Flags of older recipes that have another name today are translated, with a line of notice; what cannot be is refused."""

import re

import pytest

from ray_jobs.cli.command_line import read_flags
from ray_jobs.config.errors import InputError


@pytest.mark.parametrize(
    ("typed", "today", "notice"),
    [
        ("policy.image_resolution=[224,224]", {"policy.resize_imgs_with_padding": "[224,224]"}, "is called"),
        ("policy.dtype=float32", {"policy.use_amp": "false"}, "understood as that"),
        ("policy.gradient_checkpointing=false", {}, "does in any case"),
    ],
)
def test_smolvla_flags_are_translated(typed, today, notice):
    flags, notices = read_flags(["--policy.type=smolvla", f"--{typed}"])
    assert flags == {"policy.type": "smolvla", **today}
    assert len(notices) == 1 and notice in notices[0]


@pytest.mark.parametrize("typed", ["policy.dtype=bfloat16", "policy.gradient_checkpointing=true"])
def test_smolvla_flags_that_cannot_be_honoured(typed):
    with pytest.raises(InputError, match=re.escape(f"--{typed}: SmolVLA")):
        read_flags(["--policy.type=smolvla", f"--{typed}"])
    assert read_flags(["--policy.type=pi0", f"--{typed}"])[1] == []  # the others have these switches


def test_a_flag_that_has_another_name_today():
    flags, notices = read_flags(["--eval_freq=500"])
    assert flags == {"env_eval_freq": "500"} and "--env_eval_freq" in notices[0]
