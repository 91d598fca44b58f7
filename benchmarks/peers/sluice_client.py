"""Sluice's client: nats-py, with one request a job."""

from typing import Any

import msgspec
from nats.aio.client import Client

PATIENCE_S = 600


async def complete(client: Client, subject: str = "infer.complete", **body: Any) -> dict[str, Any]:
    """What ``subject`` answers.

    Raises:
        RuntimeError: the job has failed, or was refused.
    """
    reply = await client.request(subject, msgspec.json.encode(body), PATIENCE_S)
    answer: dict[str, Any] = msgspec.json.decode(reply.data or b"{}")
    if "usage" not in answer:
        raise RuntimeError(f"{reply.headers} {reply.data.decode()}")
    return answer
