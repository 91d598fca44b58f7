"""``INFERER_CONCURRENCY=auto`` in workers on a real broker."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace

from services.inferer.engine.context import EngineMemory
from services.inferer.engine.engine import Engine
from services.inferer.engine.model import Model
from services.inferer.worker.auto_concurrency import MOST
from services.inferer.worker.worker import Worker
from shared.broker.connection import Broker, connected
from shared.broker.consumers import ensure_consumers
from shared.broker.streams import Topology
from shared.config import BrokerSettings
from shared.wire.requests import InferenceRequest
from shared.wire.results import Completed
from tests.support.processes import NatsServer
from tests.support.tiny_model import write_tiny_model
from tests.support.workers import ended, put, states, until, working

LONG = InferenceRequest(task="complete", prompt="go on", max_tokens=4000, seed=1)
N_CTX = 4096


class MeasuredEngine(Engine):
    """Whose steps are said to take what a test says."""

    said_s: Mapping[int, float] = {}

    @property
    def step_s(self) -> Mapping[int, float]:
        return self.said_s


@pytest.fixture
def engine(model: Model) -> MeasuredEngine:
    return MeasuredEngine(model, slots=1, n_ctx=N_CTX, n_batch=128, threads=1)


async def until_slots(worker: Worker, slots: int) -> None:
    async def check() -> bool:
        return worker.slots == slots

    await until(check, f"{slots} slots")


async def started_on(broker: Broker, job_id: str) -> str:
    """The inferer that has begun the job."""
    found = await until(lambda: states(broker, job_id), "started")
    assert found[0][0] == "started"
    return str(found[0][2])


async def test_slots_open_as_jobs_come(queue: Broker, engine: MeasuredEngine) -> None:
    """One more than jobs run, until there are as many as pay; and all that are open run at once."""
    await ensure_consumers(queue, Topology().ack_wait_s, "tiny", limit=64, facts=None)
    async with working(queue, engine, concurrency="auto", grace_s=0) as (worker, stopping):
        assert worker.slots == 1
        for number in range(MOST + 2):
            await put(queue, LONG)
            if number == 0:
                await until_slots(worker, 2)
        await until_slots(worker, MOST)

        async def all_run() -> bool:
            return worker.busy == MOST

        await until(all_run, "as many jobs as slots")
        waiting = await queue.js.consumer_info("REQUESTS", "tiny")
        assert waiting.num_pending == 2
        stopping.set()
    engine.close()


async def test_where_jobs_take_turns_one_slot_more_opens_than_a_batch_has_jobs(
    queue: Broker, model: Model
) -> None:
    """With a context for each job, on two threads."""
    engine = MeasuredEngine(model, slots=1, n_ctx=N_CTX, n_batch=128, threads=2, batching="off")
    engine.said_s = {1: 0.010, 2: 0.011}
    await ensure_consumers(queue, Topology().ack_wait_s, "tiny", limit=64, facts=None)
    async with working(queue, engine, concurrency="auto", grace_s=0) as (worker, stopping):
        for _ in range(5):
            await put(queue, replace(LONG, max_tokens=1000))
        await until_slots(worker, 3)
        assert engine.jobs_per_batch == 2
        engine.said_s = {1: 0.010, 2: 0.030}
        await until_slots(worker, 1)  # when a job ends
        stopping.set()
    engine.close()


async def test_slots_that_do_not_pay_are_closed(queue: Broker, engine: MeasuredEngine) -> None:
    """Running jobs go on."""
    await ensure_consumers(queue, Topology().ack_wait_s, "tiny", limit=64, facts=None)
    async with working(queue, engine, concurrency="auto", grace_s=0) as (worker, stopping):
        first = await put(queue, LONG)
        await until_slots(worker, 2)
        engine.said_s = {1: 0.010, 2: 0.020}
        second = await put(queue, replace(LONG, max_tokens=100))
        await until_slots(worker, 1)
        third = await put(queue, LONG)
        assert (await ended(queue, second)).finished_at
        for job_id, names in ((first, ["started"]), (third, [])):
            assert [name for name, *_ in await states(queue, job_id)] == names
        stopping.set()
    engine.close()


async def test_a_slot_opens_again_only_if_it_pays_clearly(
    queue: Broker, engine: MeasuredEngine
) -> None:
    """Two at once are 2 % worse than in turn, then 3 % better, then 15 %."""
    await ensure_consumers(queue, Topology().ack_wait_s, "tiny", limit=64, facts=None)
    async with working(queue, engine, concurrency="auto", grace_s=0) as (worker, stopping):
        await put(queue, replace(LONG, max_tokens=1000))
        await until_slots(worker, 2)
        for two_s, slots in ((0.0193, 1), (0.0183, 1), (0.0160, 2), (0.0183, 2)):
            engine.said_s = {1: 0.010, 2: two_s, 3: 0.030}
            job_id = await put(queue, replace(LONG, max_tokens=10))
            assert (await ended(queue, job_id)).finished_at
            await until_slots(worker, slots)
        stopping.set()
    engine.close()


async def test_an_idle_inferer_gets_the_job_first(
    queue: Broker, nats_server: NatsServer, model: Model
) -> None:
    """Though the other one, which is busy, has a free slot, and its pull has waited for longer."""
    await ensure_consumers(queue, Topology().ack_wait_s, "tiny", limit=64, facts=None)
    engines = [
        MeasuredEngine(model, slots=2, n_ctx=N_CTX, n_batch=128, threads=1) for _ in range(2)
    ]
    async with (
        connected(BrokerSettings(nats_server.url), "other") as other,
        working(queue, engines[0], "first", concurrency="auto", grace_s=0) as (first, _),
    ):
        first_job = await put(queue, LONG)
        assert await started_on(queue, first_job) == "first"
        await until_slots(first, 2)

        async def pulls() -> bool:
            return bool((await queue.js.consumer_info("REQUESTS", "tiny")).num_waiting)

        await until(pulls, "the busy one pulls another job")
        async with working(other, engines[1], "second", concurrency="auto", grace_s=0):

            async def both_pull() -> bool:
                return bool((await queue.js.consumer_info("REQUESTS", "tiny")).num_waiting == 2)

            await until(both_pull, "the idle one pulls too")
            assert await started_on(queue, await put(queue, LONG)) == "second"
    for engine in engines:
        engine.close()


class TooLarge(MeasuredEngine):
    """Asks for far more memory than there is as soon as it grows."""

    asked = 0

    def _create_memory(self, slots: int) -> EngineMemory:
        if slots == 1:
            return super()._create_memory(slots)
        self.asked += 1
        return super()._create_memory(1_000_000)


async def test_where_there_is_no_room_for_more_slots_jobs_go_on(
    queue: Broker, model: Model
) -> None:
    """In the slots that there are, and no more are tried."""
    engine = TooLarge(model, slots=1, n_ctx=N_CTX, n_batch=128, threads=1)
    async with working(queue, engine, concurrency="auto") as (worker, _):
        for _ in range(3):
            job_id = await put(queue, replace(LONG, max_tokens=3))
            assert isinstance(await ended(queue, job_id), Completed)
        assert (worker.slots, engine.asked) == (1, 1)
    engine.close()


async def test_a_model_whose_jobs_cannot_be_moved_gets_slots_when_it_is_idle(
    queue: Broker, tmp_path: Path
) -> None:
    """Those that run go on."""
    await ensure_consumers(queue, Topology().ack_wait_s, "tiny", limit=64, facts=None)
    longrope = Model(write_tiny_model(tmp_path / "longrope.gguf", longrope_from=4096), 0)
    engine = MeasuredEngine(longrope, slots=1, n_ctx=N_CTX, n_batch=128, threads=1)
    async with working(queue, engine, concurrency="auto", grace_s=0) as (worker, _):
        first = await put(queue, replace(LONG, max_tokens=800))
        await until_slots(worker, 2)  # there was room for it before the job began
        second = await put(queue, replace(LONG, max_tokens=800))
        for job_id in (first, second):
            assert isinstance(await ended(queue, job_id), Completed)
        await until_slots(worker, 4)
    engine.close()
    longrope.close()


async def test_a_number_ends_it(queue: Broker, engine: MeasuredEngine) -> None:
    """Until the next start, with the slots that were asked for."""
    await ensure_consumers(queue, Topology().ack_wait_s, "tiny", limit=64, facts=None)
    async with working(queue, engine, concurrency="auto", grace_s=0) as (worker, stopping):
        await worker.set_slots(3)
        for _ in range(5):
            await put(queue, LONG)

        async def three_run() -> bool:
            return worker.busy == 3

        await until(three_run, "three jobs run")
        await asyncio.gather(*(put(queue, LONG) for _ in range(2)))
        assert (worker.slots, worker.busy) == (3, 3)
        stopping.set()
    engine.close()
