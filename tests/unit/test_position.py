"""The position of a waiting job, from one read of its model and one of its queue."""

from datetime import UTC, datetime

from nats.js.api import ConsumerConfig, ConsumerInfo, SequenceInfo

from services.gateway.eta.position import QueuePosition, position_of
from shared.broker.connection import StoredMessage
from shared.broker.consumers import ModelConsumers

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
SEQUENCE = 50


def model(delivered: int = 10, **waiting: int) -> ModelConsumers:
    """With so many jobs waiting by priority, and all up to ``delivered`` delivered."""
    return ModelConsumers(
        "m",
        {
            priority: ConsumerInfo(
                name=priority,
                stream_name="REQUESTS",
                config=ConsumerConfig(),
                created=NOW,
                delivered=SequenceInfo(consumer_seq=delivered, stream_seq=delivered),
                num_pending=count,
            )
            for priority, count in waiting.items()
        },
    )


def found(behind: int, sequence: int = SEQUENCE) -> StoredMessage:
    """The message ``sequence``, with ``behind`` more after it."""
    headers = {"Nats-Num-Pending": str(behind)}
    return StoredMessage("subject", sequence, "2026-01-31T12:00:00Z", headers, b"")


def position(
    model: ModelConsumers, found: StoredMessage | None, priority: str = "normal", requeued: int = 0
) -> QueuePosition:
    return position_of(SEQUENCE, priority, model, found, requeued)


def test_jobs_of_a_higher_priority_and_earlier_ones_are_ahead() -> None:
    """Of 9 of its own priority 4 wait behind it, so 4 before; of a lower priority none counts."""
    queue = model(high=3, normal=9, low=7)
    ahead = position(queue, found(behind=4))
    assert ahead.waiting_by_priority == {"high": 3, "normal": 4}
    assert (ahead.ahead, ahead.is_delivered) == (7, False)
    assert position(queue, found(behind=4), "high").waiting_by_priority == {"high": 0}
    lowest = position(queue, found(behind=0), "low")
    assert lowest.waiting_by_priority == {"high": 3, "normal": 9, "low": 6}


def test_requeued_jobs_are_ahead_of_all_that_wait() -> None:
    ahead = position(model(normal=9), found(behind=4), requeued=2)
    assert (ahead.waiting, ahead.requeued, ahead.ahead) == (4, 2, 6)


def test_a_priority_without_a_consumer_has_no_jobs() -> None:
    assert position(model(normal=1), found(behind=0)).waiting_by_priority == {"normal": 0}


def test_a_position_is_never_negative() -> None:
    """The two reads are not of one moment: jobs that came between them are only behind."""
    assert position(model(normal=1), found(behind=5)).ahead == 0


def test_a_delivered_job_has_nothing_of_its_own_priority_ahead() -> None:
    """It was delivered if it is no longer stored, if only a later one is, or if the consumer is
    past it; whatever will be redelivered beside it does not delay it."""
    for queue, message in (
        (model(high=1, normal=9), None),
        (model(high=1, normal=9), found(behind=4, sequence=SEQUENCE + 1)),
        (model(delivered=SEQUENCE, high=1, normal=9), found(behind=4)),
    ):
        ahead = position(queue, message, requeued=5)
        assert (ahead.is_delivered, ahead.ahead) == (True, 1)
