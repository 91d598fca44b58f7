"""What a gateway makes of the names that clients give."""

import pytest

from services.gateway.state import fleet
from services.gateway.state.fleet import Fleet
from shared.broker.connection import Broker
from shared.broker.streams import Topology
from shared.config import BrokerSettings
from shared.errors import UnknownModel
from shared.model_names import MAX_NAME_CHARS
from shared.wire.api import ConcurrencyRequest


async def test_no_token_is_derived_from_what_is_not_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes 40 ms for each megabyte, and no other request is served meanwhile."""

    def token_of(name: str) -> str:
        assert len(name) <= MAX_NAME_CHARS
        return name

    monkeypatch.setattr(fleet, "token_of", token_of)
    known = Fleet(Broker(BrokerSettings(), "test"), Topology(), [])
    with pytest.raises(UnknownModel):
        await known.choose("A" * 1000)
    with pytest.raises(UnknownModel):
        await known.set_concurrency(ConcurrencyRequest(concurrency=1, model="A" * 1000))
