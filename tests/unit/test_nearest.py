"""The header that names the inferer with the longest prefix of a prompt."""

import pytest

from shared.wire.nearest import NearestInferer


def test_it_comes_through_a_header() -> None:
    nearest = NearestInferer("inferer-1", 5, "0123456789abcdef")
    assert NearestInferer.read(nearest.header()) == nearest


@pytest.mark.parametrize(
    "header",
    [
        "",
        " ",
        "a",
        "a b",
        "a 0",
        "a 0 b c",
        "a b c",
        "a 10 b",
        "a -1 b",
        "a ² b",
        "a.b 0 c",
        "* 0 c",
    ],
)
def test_another_header_is_ignored(header: str) -> None:
    assert NearestInferer.read(header) is None
