"""What a command is refused with."""

import pytest

from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError


def check(*flags: str) -> None:
    preflight.check(resolve(flags))


def refusal(*flags: str) -> str:
    """What is said about a command that must be refused before anything is scheduled."""
    with pytest.raises(InputError) as refused:
        check(*flags)
    message = str(refused.value)
    assert 1 <= len(message.splitlines()) <= 2 and "<class" not in message, message
    return message
