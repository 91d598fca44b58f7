"""The retention periods depend on each other; the code relies on these relations."""

from datetime import timedelta

import msgspec
import pytest

from shared import retention
from shared.broker.streams import Topology, streams
from shared.wire import subjects
from shared.wire.api import TimeoutS


def test_results_outlive_every_job_that_could_run_again() -> None:
    """The longest job ends, and an idempotency key expires, before a result is deleted."""
    longest = max(retention.MAX_JOB_LIFETIME, retention.IDEMPOTENCY_RETENTION)
    assert longest < retention.RESULT_RETENTION


def test_no_job_may_ask_for_more_time_than_the_longest_job() -> None:
    longest_s = retention.MAX_JOB_LIFETIME.total_seconds()
    assert msgspec.convert(longest_s, TimeoutS) == longest_s
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(longest_s + 1, TimeoutS)


def test_streams_keep_messages_for_their_retention() -> None:
    max_age = {
        stream.name: timedelta(seconds=stream.max_age or 0) for stream in streams(Topology())
    }
    assert max_age[subjects.REQUESTS] == timedelta(0), "waiting jobs are never deleted by age"
    assert max_age[subjects.RESULTS] == max_age[subjects.EVENTS] == retention.RESULT_RETENTION
    assert max_age[subjects.DEAD] == retention.DEAD_LETTER_RETENTION
    assert max_age[f"KV_{subjects.IDEMPOTENCY}"] == retention.IDEMPOTENCY_RETENTION
