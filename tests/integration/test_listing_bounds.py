"""Lists and bulk requests of many callers at once, and of jobs that change meanwhile."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from services.gateway.gateway import Gateway
from services.gateway.jobs import bulk
from services.gateway.jobs.job_list import MAX_PAGES
from services.gateway.settings import GatewaySettings
from shared.broker.connection import Broker
from shared.config import BrokerSettings
from shared.errors import Overloaded, StateChanged
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.events import StateEvent
from shared.wire.listing import BulkDeadRequest, BulkReport, DeadFilter, JobPage, JobQuery
from shared.wire.requests import InferenceRequest
from shared.wire.results import DeadLetter
from tests.support.processes import PATIENCE_S, NatsServer

REQUEST = encode(InferenceRequest(task="complete", prompt="x"))


@pytest.fixture
async def gateway(queue: Broker, nats_server: NatsServer) -> AsyncIterator[Gateway]:
    """One that serves nobody else, on a broker with all streams."""
    gateway = Gateway(GatewaySettings(), BrokerSettings(url=nats_server.url))
    await gateway.broker.connect()
    async with gateway.lister.running(), asyncio.timeout(PATIENCE_S):
        while not gateway.lister.is_complete:
            await asyncio.sleep(0.05)
        yield gateway
    await gateway.broker.close()


async def test_so_many_lists_are_made_at_once(gateway: Gateway) -> None:
    """Others get 503 at once, and the next one is made again."""
    pages = (gateway.job_list.page(JobQuery()) for _ in range(MAX_PAGES + 30))
    answers = await asyncio.gather(*pages, return_exceptions=True)
    assert Counter(map(type, answers)) == {JobPage: MAX_PAGES, Overloaded: 30}
    assert isinstance(await gateway.job_list.page(JobQuery()), JobPage)


async def test_dead_letters_are_searched_once_at_a_time_and_no_further_than_needed(
    gateway: Gateway, queue: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PAGE", 2)
    for _ in range(7):
        await bury(queue)
    request = BulkDeadRequest(where=DeadFilter(code="model_error"), at_most=1)
    answers = await asyncio.gather(
        *(gateway.bulk.drop(request) for _ in range(3)), return_exceptions=True
    )
    assert Counter(map(type, answers)) == {BulkReport: 1, Overloaded: 2}
    (report,) = (answer for answer in answers if isinstance(answer, BulkReport))
    assert (report.matched, report.done, report.left) == (2, 1, 1)
    everything = BulkDeadRequest(where=DeadFilter(code="model_error"))
    assert (await gateway.bulk.drop(everything)).done == 6


async def bury(broker: Broker) -> None:
    job_id = new_job_id()
    letter = DeadLetter(
        id=job_id,
        model="tiny",
        code="model_error",
        message="why",
        attempts=3,
        at=timestamp(),
        request=REQUEST.decode(),
    )
    await broker.publish_stored(subjects.dead("tiny", job_id), encode(letter), {}, PATIENCE_S)


async def test_a_job_that_has_left_its_state_is_not_cancelled(
    gateway: Gateway, queue: Broker
) -> None:
    """It was found waiting and has started since."""
    job_id = new_job_id(queue.now())
    await queue.publish_stored(subjects.request("tiny", job_id), REQUEST, {}, PATIENCE_S)
    started = StateEvent(state="started", attempt=1, at=timestamp(), inferer="a")
    await queue.publish_stored(subjects.state("tiny", job_id), encode(started), {}, PATIENCE_S)
    with pytest.raises(StateChanged, match="is STARTED by now"):
        await gateway.jobs.cancel(job_id, states=["PENDING"])
    assert (await gateway.jobs.cancel(job_id, states=["STARTED"])).state == "REVOKED"
