"""The header ``Prefer``, as RFC 7240 writes it and as others do."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from services.gateway.http.preferences import MAX_WAIT_S, Preferences


@pytest.mark.parametrize(
    ("headers", "wait_s", "respond_async"),
    [
        ([], None, False),
        (["wait=10"], 10, False),
        (["respond-async, wait=10"], 10, True),
        (["Respond-Async", "WAIT = 10"], 10, True),
        (["wait=10, wait=20"], 10, False),
        (["wait=10", "wait=20"], 10, False),
        (['wait="10"'], 10, False),
        (['wait="\\1\\0"'], 10, False),
        (['foo="a, wait=1", wait=2'], 2, False),
        (['foo="a \\" , wait=1", wait=2'], 2, False),
        (['foo="never ends, wait=1'], None, False),
        (['foo="ends in \\, wait=1, x\\'], None, False),
        (['wait=3, foo="never ends'], 3, False),
        (['foo; bar="a, wait=1"; baz, wait=2; qux=1'], 2, False),
        (["respond-async; x=y;; z , ,wait=1;"], 1, True),
        (['respond-async="", wait=1'], 1, True),
        (["wait=0"], 0, False),
        (["wait=007"], 7, False),
        ([f"wait={MAX_WAIT_S + 1}"], MAX_WAIT_S, False),
        ([f"wait={'9' * 5000}"], MAX_WAIT_S, False),
        (["wait=, wait=5"], 5, False),
        (["wait=-1"], None, False),
        (["wait=1.5"], None, False),
        (["wait=soon"], None, False),
        (["wait=\u0661"], None, False),  # a digit, but not of ASCII
        (["wait 5"], None, False),
        (["wait=5 6"], None, False),
        (["handling=lenient, return=minimal"], None, False),
        (["waiting=5, respond-asynchronously"], None, False),
    ],
)
def test_preferences_are_read_from_all_their_forms(
    headers: list[str], wait_s: int | None, respond_async: bool
) -> None:
    """The first of each counts, quotations hide what is in them, what cannot be read is ignored."""
    assert Preferences.parse(headers) == Preferences(wait_s, respond_async)


@given(some.lists(some.text(alphabet='wait=0,;" \\x\t', max_size=200), max_size=3))
def test_an_invalid_preference_is_ignored(headers: list[str]) -> None:
    """Whatever is sent, it is read or ignored, and quickly."""
    wait_s = Preferences.parse(headers).wait_s
    assert wait_s is None or 0 <= wait_s <= MAX_WAIT_S


def test_only_applied_preferences_are_named() -> None:
    """An answer with the result in it was not asynchronous."""
    both = Preferences(10, respond_async=True)
    assert both.applied(is_finished=False) == {"preference-applied": "respond-async, wait=10"}
    assert both.applied(is_finished=True) == {"preference-applied": "wait=10"}
    assert Preferences().applied(is_finished=False) == {}
