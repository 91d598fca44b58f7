"""Which failures are tried again, and when."""

import pytest

from services.inferer.worker.retry_policy import LONGEST_PAUSE_S, is_retried, pause_s
from shared.errors import InvalidRequest, ModelError, OutOfMemory, PromptTooLong, SluiceError


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (InvalidRequest, False),
        (PromptTooLong, False),
        (ModelError, True),
        (OutOfMemory, True),
        (SluiceError, True),
    ],
)
def test_what_an_inference_raises_is_in_the_table(error: type[SluiceError], again: bool) -> None:
    """What the request is to blame for ends it; everything else gets another attempt."""
    assert is_retried(error.code) == again


def test_pauses_grow_to_a_bound_and_differ() -> None:
    """About 1, 4, 16 seconds, never above 5 minutes by more than the jitter, however many."""
    assert 0.75 <= pause_s(1, 1.0) <= 1.25
    assert 3 <= pause_s(2, 1.0) <= 5
    assert 12 <= pause_s(3, 1.0) <= 20
    for attempt in (6, 1000):
        assert 0.75 * LONGEST_PAUSE_S <= pause_s(attempt, 1.0) <= 1.25 * LONGEST_PAUSE_S
    assert len({pause_s(1, 1.0) for _ in range(10)}) > 1
