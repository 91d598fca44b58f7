"""What is started in the test's own process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.inferer.engine.model import Model
from shared.broker.connection import Broker
from shared.broker.topology import Topology, ensure_topology


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[Model]:
    """The tiny model, loaded."""
    loaded = Model(tiny_model, 0)
    yield loaded
    loaded.close()


@pytest.fixture
async def queue(broker: Broker) -> Broker:
    """A broker with our streams, and a consumer for the model `tiny` that lets out one job."""
    await ensure_topology(broker, Topology(), ["tiny"])
    return broker
