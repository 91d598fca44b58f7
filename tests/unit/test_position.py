"""The position of a waiting job, from what the broker says of its queue."""

from datetime import UTC, datetime

from nats.js.api import ConsumerConfig, ConsumerInfo, SequenceInfo

from services.gateway.eta.position import count_between, position_of
from shared.broker.consumers import ModelConsumers
from shared.broker.stored_messages import StoredMessage

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


def test_jobs_of_a_higher_priority_and_earlier_ones_are_ahead() -> None:
    """Of a lower priority none counts."""
    queue = model(high=3, normal=9, low=7)
    ahead = position_of("normal", queue, between=4)
    assert (ahead.waiting, ahead.ahead, ahead.is_delivered) == (3 + 4, 7, False)
    assert position_of("high", queue, between=2).waiting == 2
    assert position_of("low", queue, between=6).waiting == 3 + 9 + 6


def test_requeued_jobs_are_ahead_of_all_that_wait() -> None:
    ahead = position_of("normal", model(normal=9), between=4, requeued=2)
    assert (ahead.waiting, ahead.requeued, ahead.ahead) == (4, 2, 6)


def test_a_delivered_job_has_nothing_of_its_own_priority_ahead() -> None:
    """Whatever will be redelivered beside it does not delay it."""
    ahead = position_of("normal", model(high=1, normal=9), between=None, requeued=5)
    assert (ahead.is_delivered, ahead.ahead) == (True, 1)


def test_jobs_between_are_counted_by_what_the_broker_says_comes_after_each() -> None:
    """9 wait, of which 4 stand behind the job: so 4 stand before it."""
    assert count_between(SEQUENCE, found(8, 11), found(behind=4)) == 4
    assert count_between(SEQUENCE, found(4), found(behind=4)) == 0


def test_a_count_is_never_negative() -> None:
    """The two reads are not of one moment: jobs that came between them are only behind."""
    assert count_between(SEQUENCE, found(1, 49), found(behind=5)) == 0


def test_a_job_that_is_no_longer_stored_is_not_counted() -> None:
    """It was delivered and has ended, or was cancelled; only a later one is there, or none."""
    assert count_between(SEQUENCE, found(1, 60), found(1, SEQUENCE + 10)) is None
    assert count_between(SEQUENCE, None, None) is None
