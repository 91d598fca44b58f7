"""The puller against a real broker: no job is missed, none is held by somebody who has gone."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from nats.aio.subscription import Subscription

from services.inferer.worker import pull
from services.inferer.worker.pull import Puller
from shared.broker.connection import Broker, connected
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.wire import subjects
from tests.support.processes import NatsServer

SOON_S = 9
"""Less than a lease, a pull's life or two missed heartbeats: none of them may be what helped."""


CONSUMERS = ("tiny+high", "tiny", "tiny+low")


async def publish_job(broker: Broker, job_id: str, priority: str = "normal") -> None:
    headers = {subjects.HEADER_MSG_ID: job_id}
    await broker.publish_stored(subjects.request("tiny", job_id, priority), b"{}", headers, 30)


async def pulled(puller: Puller) -> tuple[str, int]:
    """The id of the next job, which is acknowledged, and the count of its deliveries."""
    async with asyncio.timeout(SOON_S):
        message = await puller.next()
    await message.ack_sync()
    return subjects.model_and_id(message.subject)[1], message.metadata.num_delivered


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    give_up_at = time.monotonic() + SOON_S
    while not await condition():
        assert time.monotonic() < give_up_at, f"not in time: {what}"
        await asyncio.sleep(0.005)


async def until_consumer(broker: Broker, name: str = "tiny", **expected: int) -> None:
    """Until the broker counts so many ``num_waiting`` pulls, ``num_ack_pending`` messages, …"""

    async def check() -> bool:
        info: Any = await broker.js.consumer_info(subjects.REQUESTS, name)
        return all(getattr(info, name) == value for name, value in expected.items())

    await until(check, str(expected))


async def test_waiting_jobs_and_new_ones_are_received(queue: Broker) -> None:
    """In their order, each delivered once; in between no pull is open that could take another."""
    await publish_job(queue, "first")
    async with Puller(queue, "tiny") as puller:
        assert await pulled(puller) == ("first", 1)
        await until_consumer(queue, num_waiting=0)
        waiting = asyncio.create_task(pulled(puller))
        await until_consumer(queue, num_waiting=1)
        await publish_job(queue, "second")
        assert await waiting == ("second", 1)


async def test_leaving_withdraws_the_pull(queue: Broker) -> None:
    """A job that comes afterwards goes to somebody who still pulls, at once."""
    async with Puller(queue, "tiny") as gone:
        waiting = asyncio.create_task(gone.next())
        await until_consumer(queue, num_waiting=1)
        waiting.cancel()
    await until_consumer(queue, num_waiting=0)
    await publish_job(queue, "job")
    async with Puller(queue, "tiny") as other:
        assert await pulled(other) == ("job", 1)


async def test_jobs_that_cross_with_leaving_are_requeued(
    queue: Broker, nats_server: NatsServer
) -> None:
    """A hundred are published by others in the very moment: none of them waits for a lease."""
    async with connected(BrokerSettings(nats_server.url), "leaving") as leaving:
        for number in range(100):
            async with Puller(leaving, "tiny") as gone:
                waiting = asyncio.create_task(gone.next())
                await until_consumer(queue, num_waiting=1)
                waiting.cancel()
                publishing = asyncio.create_task(publish_job(queue, str(number)))
                if number % 2:
                    await asyncio.sleep(0)
            await publishing
            async with Puller(queue, "tiny") as other:
                assert (await pulled(other))[0] == str(number)


async def test_jobs_that_cross_with_a_withdrawal_are_requeued(
    queue: Broker, nats_server: NatsServer
) -> None:
    """The slot is closed and opened again: what it was sent in between goes to others at once."""
    async with (
        connected(BrokerSettings(nats_server.url), "other") as publisher,
        Puller(queue, "tiny") as closed,
        Puller(publisher, "tiny") as other,
    ):
        for number in range(50):
            waiting = asyncio.create_task(closed.next())
            await until_consumer(publisher, num_waiting=1)
            publishing = asyncio.create_task(publish_job(publisher, str(number)))
            if number % 2:
                async with asyncio.timeout(SOON_S):
                    while closed._job is None:  # it is here, and not yet returned
                        await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait((waiting,))
            await closed.requeue()
            await publishing
            assert (await pulled(other))[0] == str(number)


async def test_jobs_that_cross_with_giving_up_are_not_lost(
    queue: Broker, nats_server: NatsServer
) -> None:
    """`next` was given up and called again: what came in that moment is returned, soon."""
    async with (
        connected(BrokerSettings(nats_server.url), "other") as other,
        Puller(other, "tiny") as puller,
    ):
        for number in range(50):
            waiting = asyncio.create_task(puller.next())
            await until_consumer(queue, num_waiting=1)
            publishing = asyncio.create_task(publish_job(queue, str(number)))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            waiting.cancel()
            await publishing
            assert (await pulled(puller))[0] == str(number)


async def test_two_pullers_share_the_jobs(queue: Broker) -> None:
    """Under a limit of 1 the second gets its job when the first has acknowledged, not before."""
    await publish_job(queue, "first")
    await publish_job(queue, "second")
    async with Puller(queue, "tiny") as one, Puller(queue, "tiny") as two:
        async with asyncio.timeout(SOON_S):
            held = await one.next()
        waiting = asyncio.create_task(pulled(two))
        await until_consumer(queue, num_waiting=1, num_ack_pending=1, num_pending=1)
        assert not waiting.done()
        await held.ack_sync()
        assert await waiting == ("second", 1)


async def test_priorities_are_served_in_their_order(queue: Broker) -> None:
    """Strictly, and within each in the order of arrival, however they came in."""
    for priority in ("low", "normal", "high"):
        for number in (1, 2):
            await publish_job(queue, f"{priority}-{number}", priority)
    async with Puller(queue, "tiny") as puller:
        served = [await pulled(puller) for _ in range(6)]
    wanted = [f"{priority}-{n}" for priority in ("high", "normal", "low") for n in (1, 2)]
    assert served == [(name, 1) for name in wanted]


@pytest.mark.parametrize(
    ("empty_s", "wanted"),
    [(60, ["tiny+high", *["tiny"] * 5]), (0, ["tiny+high", "tiny"] * 5)],
    ids=["a moment later", "later"],
)
async def test_jobs_that_wait_are_pulled_with_few_messages(
    queue: Broker, monkeypatch: pytest.MonkeyPatch, empty_s: float, wanted: list[str]
) -> None:
    """One to each priority down to theirs, but to none that had no job just now; over one
    subscription for all of them."""
    monkeypatch.setattr(pull, "ANSWER_S", 60)
    monkeypatch.setattr(pull, "EMPTY_S", empty_s)
    sent: list[str] = []
    publish, move = queue.nc.publish, queue.nc.move

    async def counted(subject: str, *rest: Any, **named: Any) -> None:
        if ".MSG.NEXT." in subject:
            sent.append(subject.rpartition(".")[2])
        await publish(subject, *rest, **named)

    async def moved(subscription: Subscription, subject: str) -> None:
        sent.append("another subject")
        await move(subscription, subject)

    for number in range(5):
        await publish_job(queue, str(number))
    vars(queue.nc).update(publish=counted, move=moved)
    async with Puller(queue, "tiny") as puller:
        for _ in range(5):
            await pulled(puller)
    assert sent == wanted


async def test_every_priority_is_pulled_after_an_idle_time(
    queue: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that had no job before it: one after another, so that no job is requeued."""
    monkeypatch.setattr(pull, "EMPTY_S", 60)
    async with Puller(queue, "tiny") as puller:
        waiting = asyncio.create_task(pulled(puller))
        for name in CONSUMERS:
            await until_consumer(queue, name, num_waiting=1)
        await publish_job(queue, "first")
        assert await waiting == ("first", 1)
        await publish_job(queue, "second")
        await publish_job(queue, "third", "high")
        assert [await pulled(puller) for _ in range(2)] == [("third", 1), ("second", 1)]


async def test_an_answer_that_is_read_too_late_counts(queue: Broker) -> None:
    """This process was busy until the pull was given up: the job that had come is not requeued."""
    publish, loop = queue.nc.publish, asyncio.get_running_loop()

    async def held_up(subject: str, *rest: Any, **named: Any) -> None:
        await publish(subject, *rest, **named)
        if subject.endswith(".tiny"):
            loop.call_soon(time.sleep, 2 * pull.ANSWER_S)  # once it has been written

    await publish_job(queue, "job")
    vars(queue.nc)["publish"] = held_up
    async with Puller(queue, "tiny") as puller:
        assert await pulled(puller) == ("job", 1)


async def test_waiting_pulls_that_expire_are_made_again(queue: Broker) -> None:
    """At every priority, and the next job is delivered once."""
    async with Puller(queue, "tiny") as puller:
        waiting = asyncio.create_task(pulled(puller))
        for name in CONSUMERS:
            await until_consumer(queue, name, num_waiting=1)
        before = dict.fromkeys(puller._watchdogs)
        await until(lambda: _are_new(puller, before), "pulls that have replaced those")
        for name in CONSUMERS:
            await until_consumer(queue, name, num_waiting=1)
        await publish_job(queue, "job", "low")
        assert await waiting == ("job", 1)


@pytest.mark.parametrize("priority", subjects.PRIORITIES)
async def test_an_idle_slot_waits_for_every_priority(queue: Broker, priority: str) -> None:
    """Whatever comes first is taken at once, and the other pulls are withdrawn."""
    async with Puller(queue, "tiny") as puller:
        waiting = asyncio.create_task(pulled(puller))
        for name in CONSUMERS:
            await until_consumer(queue, name, num_waiting=1)
        await publish_job(queue, "job", priority)
        assert await waiting == ("job", 1)
        for name in CONSUMERS:
            await until_consumer(queue, name, num_waiting=0)


async def test_a_slot_takes_one_of_two_that_come_at_once(queue: Broker) -> None:
    """Jobs of two priorities reach one slot at once: it keeps one, the other goes to the
    next slot at once."""
    async with connected(queue._settings, "publisher") as publisher:
        for number in range(30):
            async with Puller(queue, "tiny") as one:
                held = asyncio.create_task(pulled(one))
                await until_consumer(queue, "tiny+low", num_waiting=1)
                await asyncio.gather(
                    publish_job(publisher, f"high-{number}", "high"),
                    publish_job(publisher, f"normal-{number}"),
                )
                first = (await held)[0]
                async with Puller(queue, "tiny") as two:
                    second = (await pulled(two))[0]
            assert {first, second} == {f"high-{number}", f"normal-{number}"}


async def test_a_priority_at_its_limit_does_not_hold_up_the_others(queue: Broker) -> None:
    """Another slot has all that may run of `high`, and more of it waits: a normal job is taken, and
    the next high one as soon as the limit allows it."""
    for name in ("high-1", "high-2"):
        await publish_job(queue, name, "high")
    await publish_job(queue, "normal")
    async with Puller(queue, "tiny") as one, Puller(queue, "tiny") as two:
        async with asyncio.timeout(SOON_S):
            held = await one.next()
        assert await pulled(two) == ("normal", 1)
        waiting = asyncio.create_task(pulled(two))
        await until_consumer(queue, "tiny+low", num_waiting=1)
        await held.ack_sync()
        assert await waiting == ("high-2", 1)


async def test_the_lowest_priority_does_not_starve(queue: Broker) -> None:
    """A priority that has not been pulled for a while is pulled first, once."""
    for number in range(40):
        await publish_job(queue, f"high-{number}", "high")
    for number in (1, 2):
        await publish_job(queue, f"low-{number}", "low")
    served = []
    async with Puller(queue, "tiny", fair_s=0.3) as puller:
        while "low-2" not in served:
            served.append((await pulled(puller))[0])
            await asyncio.sleep(0.05)  # the work
    first, second = served.index("low-1"), served.index("low-2")
    assert 3 <= first <= 8, served
    assert 3 <= second - first <= 8, served


async def test_a_restart_of_the_broker_is_survived(queue: Broker, nats_server: NatsServer) -> None:
    """The pull that was lost with the broker is made again as soon as it is back."""
    async with Puller(queue, "tiny") as puller:
        waiting = asyncio.create_task(pulled(puller))
        await until_consumer(queue, num_waiting=1)
        nats_server.process.kill()
        await asyncio.to_thread(nats_server.start)
        await publish_job(queue, "job")
        assert await waiting == ("job", 1)


async def test_an_outage_leaves_nothing_behind(queue: Broker, nats_server: NatsServer) -> None:
    """No subscription more than before, whatever was asked while it was away; and what was asked
    then does not bounce the first job after it."""
    async with Puller(queue, "tiny") as puller:
        waiting = asyncio.create_task(puller.next())
        await until_consumer(queue, num_waiting=1)
        before = len(queue.nc._subs)
        nats_server.process.kill()
        for _ in range(10):
            waiting.cancel()
            waiting = asyncio.create_task(puller.next())
            await asyncio.sleep(0.15)
        await asyncio.to_thread(nats_server.start)
        await until_consumer(queue, num_waiting=1)
        await until(lambda: _has_subscriptions(queue, before), "only those there were before")
        await publish_job(queue, "job")
        async with asyncio.timeout(SOON_S):
            message = await waiting
        assert message.metadata.num_delivered == 1
        await message.ack_sync()
    await until(lambda: _has_subscriptions(queue, before - 1), "none of the puller's")


async def test_a_consumer_that_is_created_later_is_pulled_from(queue: Broker) -> None:
    """An inferer may be there before its consumer: it keeps asking."""
    await queue.js.delete_consumer(subjects.REQUESTS, "tiny")
    async with Puller(queue, "tiny") as puller:
        waiting = asyncio.create_task(pulled(puller))
        before = queue.nc.stats["in_msgs"]
        await until(lambda: _came(queue, before + 3), "answers that there is no consumer")
        await ensure_topology(queue, Topology(), ["tiny"])
        await publish_job(queue, "job")
        assert await waiting == ("job", 1)


async def test_a_consumer_that_was_removed_is_pulled_from_once_it_is_back(queue: Broker) -> None:
    """The pull ends with the consumer; the next one reaches the new one."""
    async with Puller(queue, "tiny") as puller:
        waiting = asyncio.create_task(pulled(puller))
        await until_consumer(queue, num_waiting=1)
        await queue.js.delete_consumer(subjects.REQUESTS, "tiny")
        await ensure_topology(queue, Topology(), ["tiny"])
        await publish_job(queue, "job")
        assert await waiting == ("job", 1)


async def _has_subscriptions(broker: Broker, count: int) -> bool:
    return len(broker.nc._subs) <= count


async def _are_new(puller: Puller, before: dict[str, None]) -> bool:
    return len(puller._watchdogs) == len(before) and not before.keys() & puller._watchdogs.keys()


async def _came(broker: Broker, messages: int) -> bool:
    return broker.nc.stats["in_msgs"] >= messages
