"""The streams and buckets of a deployment, as the broker is to hold them."""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from nats.js.api import (
    DiscardPolicy,
    RePublish,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamConsumerLimits,
)

from shared.broker.metadata import DEAD_THRESHOLDS, REQUESTS_THRESHOLDS, peer_thresholds
from shared.retention import DEAD_LETTER_RETENTION, IDEMPOTENCY_RETENTION, RESULT_RETENTION
from shared.wire import subjects

PRESENCE_TTL = timedelta(seconds=10)
DUPLICATE_WINDOW = timedelta(minutes=2)
EVENTS_MAX_BYTES = 1024**3
"""Of the events, and of the requests that are kept."""
EVENTS_SHARE = 10
"""If the account's storage is limited, each of the two gets at most one part in this many of it."""


@dataclass
class Topology:
    """What a deployment may choose. ``replicas``: 1, or 3 and 5 on a cluster. ``kept_requests_h``:
    for how many hours copies of requests are kept; 0: there is no stream for them."""

    replicas: int = 1
    kept_requests_h: int = 0

    @property
    def ack_wait_s(self) -> float:
        """The lease on a job: longer than a leader election where there can be one."""
        return 12.0 if self.replicas == 1 else 30.0


def streams(topology: Topology, storage_limit: int | None = None) -> list[StreamConfig]:
    """The streams of a deployment whose account may store ``storage_limit`` bytes."""
    thresholds = peer_thresholds(topology.replicas)
    shared: dict[str, Any] = {
        "metadata": thresholds,
        "storage": StorageType.FILE,
        "num_replicas": topology.replicas,
        "allow_direct": True,
        "duplicate_window": DUPLICATE_WINDOW.total_seconds(),
        # Set explicitly, so that a bound that somebody has set is removed again.
        "max_msgs": -1,
        "max_bytes": -1,
        "max_msg_size": -1,
        "max_consumers": -1,
        "consumer_limits": StreamConsumerLimits(),
    }
    results_s = RESULT_RETENTION.total_seconds()
    # The broker reserves it: a stream that may become larger than the storage is refused.
    events_max_bytes = min(EVENTS_MAX_BYTES, (storage_limit or math.inf) // EVENTS_SHARE)
    kept = StreamConfig(
        name=subjects.KEPT,
        description="Sluice: copies of requests, for those who look at finished jobs",
        subjects=[subjects.KEPT_WILDCARD],
        retention=RetentionPolicy.LIMITS,
        max_age=timedelta(hours=topology.kept_requests_h).total_seconds(),
        max_msgs_per_subject=1,
        # As much as events, and for the same reason: over it the oldest are deleted.
        **{**shared, "max_bytes": int(events_max_bytes)},
    )
    return [
        # Bounded by nothing, so that no accepted job is ever dropped: the gateways refuse new
        # ones instead.
        StreamConfig(
            name=subjects.REQUESTS,
            description="Sluice: jobs that wait, run or are to be retried",
            subjects=[
                *subjects.REQUESTS_STORED,
                subjects.REQUESTS_V1_WILDCARD,
                subjects.SCHEDULES_WILDCARD,
            ],
            retention=RetentionPolicy.WORK_QUEUE,
            max_msgs_per_subject=1,
            max_age=0,
            allow_msg_schedules=True,
            allow_rollup_hdrs=True,  # the broker sets it with schedules
            republish=RePublish(
                src=subjects.REQUESTS_WILDCARD,
                dest="infer.accepted.{{wildcard(1)}}.{{wildcard(4)}}",
                headers_only=True,
            ),
            **{**shared, "metadata": thresholds | REQUESTS_THRESHOLDS},
        ),
        # Apart from the events, which the tokens of busy inferers push out: attempts are counted
        # by the states.
        StreamConfig(
            name=subjects.STATES,
            description="Sluice: the last state of each job, the last death of each inferer",
            subjects=[subjects.STATES_WILDCARD, subjects.DEATHS_WILDCARD],
            retention=RetentionPolicy.LIMITS,
            max_age=results_s,
            max_msgs_per_subject=1,
            **shared,
        ),
        StreamConfig(
            name=subjects.EVENTS,
            description="Sluice: what happens to each job, with its tokens",
            subjects=[subjects.EVENTS_WILDCARD],
            retention=RetentionPolicy.LIMITS,
            max_age=results_s,
            **{**shared, "max_bytes": int(events_max_bytes)},
        ),
        StreamConfig(
            name=subjects.RESULTS,
            description="Sluice: one result for each job",
            subjects=[subjects.RESULTS_WILDCARD],
            retention=RetentionPolicy.LIMITS,
            max_age=results_s,
            max_msgs_per_subject=1,
            discard=DiscardPolicy.NEW,
            discard_new_per_subject=True,
            republish=RePublish(
                src=subjects.RESULTS_WILDCARD,
                dest="infer.finished.{{wildcard(1)}}.{{wildcard(2)}}",
            ),
            **shared,
        ),
        StreamConfig(
            name=subjects.DEAD,
            description="Sluice: dead letters, requests that failed for good",
            subjects=[subjects.DEAD_WILDCARD],
            retention=RetentionPolicy.LIMITS,
            max_age=DEAD_LETTER_RETENTION.total_seconds(),
            max_msgs_per_subject=1,
            **{**shared, "metadata": thresholds | DEAD_THRESHOLDS},
        ),
        # The marker of a dead inferer stays until its job has certainly been redelivered.
        _bucket(
            subjects.INFERERS,
            "Sluice: the heartbeat of each live inferer",
            PRESENCE_TTL,
            shared,
            marker_ttl_s=2 * topology.ack_wait_s,
        ),
        _bucket(
            subjects.IDEMPOTENCY,
            "Sluice: the job of each idempotency key; jobs whose client timed out",
            IDEMPOTENCY_RETENTION,
            shared,
            marker_ttl_s=1,
        ),
        # The last: nothing else depends on it.
        *([kept] if topology.kept_requests_h else []),
    ]


def _bucket(
    name: str, description: str, ttl: timedelta, shared: dict[str, Any], marker_ttl_s: float
) -> StreamConfig:
    """A key-value bucket is a stream of this form (ADR-8), with markers when an entry expires."""
    return StreamConfig(
        name=f"KV_{name}",
        description=description,
        subjects=[f"$KV.{name}.>"],
        retention=RetentionPolicy.LIMITS,
        max_age=ttl.total_seconds(),
        max_msgs_per_subject=1,
        discard=DiscardPolicy.NEW,
        allow_rollup_hdrs=True,
        deny_delete=True,
        allow_msg_ttl=True,
        subject_delete_marker_ttl=marker_ttl_s,
        **{**shared, "duplicate_window": min(ttl, DUPLICATE_WINDOW).total_seconds()},
    )


def first_sequence(stream: StreamConfig, now: datetime) -> int | None:
    """A sequence that the stream never had before, if it was deleted: old acknowledgements may
    still be in use, and must not match new messages."""
    if stream.name == subjects.REQUESTS:
        return int(now.timestamp() * 1000)
    return None
