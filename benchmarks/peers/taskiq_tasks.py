"""The taskiq application, in the environment of the peers: a task that does nothing, on JetStream.

taskiq's client polls for results. So that it need not, the worker publishes the id of each job
whose result is stored, and the client waits for that."""

import os
from typing import Any

from nats.js.api import RetentionPolicy, StreamConfig
from taskiq import TaskiqMessage, TaskiqMiddleware, TaskiqResult
from taskiq_nats import NATSObjectStoreResultBackend, PullBasedJetStreamBroker

NATS = os.environ["NATS_URL"]
STORED = "stored"
"""The subject of the ids of jobs whose result is stored."""


class Announcement(TaskiqMiddleware):
    async def post_save(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        await self.broker.client.publish(STORED, message.task_id.encode())


broker = (
    PullBasedJetStreamBroker(
        NATS,
        # A job that has ended leaves the stream.
        stream_config=StreamConfig(retention=RetentionPolicy.WORK_QUEUE),
    )
    .with_result_backend(NATSObjectStoreResultBackend(NATS))
    .with_middlewares(Announcement())
)


@broker.task
async def nothing() -> None:
    pass
