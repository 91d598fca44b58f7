"""`docs/reference/` says what the code says."""

import pytest

from tools.reference import FOLDER, GENERATED, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_current(name: str) -> None:
    """If not: ``make reference``."""
    assert (FOLDER / name).read_text() == GENERATED + PAGES[name]()
