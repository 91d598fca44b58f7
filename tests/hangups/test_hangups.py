"""Clients that hang up early leave nothing behind; ``python -m tests.hangups.run`` does it with
1,000 of each kind."""

from pathlib import Path

import pytest

from tests.hangups.clients import KINDS
from tests.hangups.run import run

COUNT = 50
WITHIN_S = 30.0
"""The long form says five seconds; the broker deletes consumers when it has time to."""


@pytest.mark.timeout(900)
async def test_nothing_is_left_of_clients_that_hang_up(tmp_path: Path) -> None:
    """Fifty of each kind at once, while jobs wait and while they run: soon there are as many
    consumers, connections, subscriptions, tasks, files and threads as before, memory is about as it
    was, and what nobody waits for is cancelled as `client_disconnected`."""
    outcomes = await run([list(KINDS)], COUNT, tmp_path, seed=1, within_s=WITHIN_S)
    assert not [str(outcome) for outcome in outcomes if outcome.problems]
