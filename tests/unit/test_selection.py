"""Filters on the command line."""

import pytest

from cli.exit_status import CommandError
from cli.selection import metadata_of, time_of


def test_a_name_of_metadata_is_given_once() -> None:
    """One of two values must not be dropped, least of all where jobs are cancelled."""
    assert metadata_of(["a=1", "b=2=3"]) == {"a": "1", "b": "2=3"}
    for wrong in (["a=1", "a=2"], ["a"], ["=1"]):
        with pytest.raises(CommandError, match="--metadata"):
            metadata_of(wrong)


def test_a_time_before_the_first_date_is_refused() -> None:
    assert time_of("2026-01-01T00:00:00Z") == "2026-01-01T00:00:00Z"
    assert time_of("30d") is not None
    with pytest.raises(CommandError, match="999999d"):
        time_of("999999d")
