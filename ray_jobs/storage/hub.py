"""The Hugging Face Hub: whether it answers, what it means by its errors, and doing without it."""

import contextlib
import threading
from collections.abc import Iterator

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from ray_jobs.config.errors import causes, first_line

HUB_WAIT_S = 5  # how long the Hub may take to answer at all
HUB_ERRORS = (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled)


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within, the Hub's cache answers where there is no network. huggingface_hub itself tries again for half
    a minute, and for several where packets are dropped."""
    with offline() if constants.HF_HUB_OFFLINE or not _hub_answers() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within, the Hub is not asked by this process: what is at hand must do."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answer(error: BaseException) -> str:
    """The end of a sentence: why something cannot be had from the Hub."""
    if any(isinstance(link, OfflineModeIsEnabled | LocalEntryNotFoundError) for link in causes(error)):
        return f"{constants.ENDPOINT} cannot be reached (or HF_HUB_OFFLINE is set)."
    return f"{constants.ENDPOINT} answers: {first_line(error)}"


def _hub_answers() -> bool:
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            get_session().head(constants.ENDPOINT, timeout=HUB_WAIT_S)
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a look-up of its name knows no time-out
    asking.start()
    asking.join(HUB_WAIT_S)
    return answered.is_set()
