"""What the official client's headers say: a timeout is told from a hang-up."""

import time
from typing import Any

import pytest
from litestar import Request
from msgspec.structs import replace

from services.gateway.http.client_attempt import LEAST_INTERVAL_S, TOLERANCE_S, ClientAttempt


def attempt(**headers: str) -> ClientAttempt:
    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope: Any = {"type": "http", "headers": encoded}
    return ClientAttempt.of(Request(scope))


@pytest.mark.parametrize(
    ("headers", "timeout_s", "is_retry"),
    [
        ({}, None, False),
        ({"x_stainless_read_timeout": "2.0", "x_stainless_retry_count": "0"}, 2, False),
        ({"x_stainless_read_timeout": "600", "x_stainless_retry_count": "2"}, 600, True),
        ({"x_stainless_timeout": "60", "x_stainless_retry_count": "1"}, 60, True),
        ({"x_stainless_timeout": "60", "x_stainless_read_timeout": "5"}, 5, False),
        ({"x_stainless_timeout": "0"}, None, False),
        ({"x_stainless_read_timeout": "soon", "x_stainless_retry_count": "often"}, None, False),
        ({"x_stainless_read_timeout": "inf", "x_stainless_retry_count": "-1"}, None, False),
        ({"x_stainless_read_timeout": "nan", "x_stainless_retry_count": "nan"}, None, False),
    ],
)
def test_headers_are_read(headers: dict[str, str], timeout_s: float | None, is_retry: bool) -> None:
    """Those of the Python and of the JavaScript client; what is not a number above 0 is ignored."""
    read = attempt(**headers)
    assert (read.timeout_s, read.is_retry) == (timeout_s, is_retry)


def test_only_a_client_whose_timeout_has_passed_has_timed_out() -> None:
    """With some tolerance, as a busy gateway reads a request late."""
    now = time.monotonic()
    assert not ClientAttempt(now - 1000).has_timed_out
    just_read = ClientAttempt(now, timeout_s=60)
    assert not just_read.has_timed_out
    assert replace(just_read, began=now - 60 + TOLERANCE_S).has_timed_out
    assert ClientAttempt(now, timeout_s=TOLERANCE_S).has_timed_out


def test_streams_are_silent_for_less_than_the_timeout() -> None:
    """Half of it, and never so short that comments are all that a gateway sends."""
    assert ClientAttempt(0).within(15) == 15
    assert ClientAttempt(0, timeout_s=600).within(15) == 15
    assert ClientAttempt(0, timeout_s=2).within(15) == 1
    assert ClientAttempt(0, timeout_s=1e-9).within(15) == LEAST_INTERVAL_S
