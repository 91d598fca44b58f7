"""nats-py's own client, as users have it."""

from nats.aio.client import Client


async def flush(client: Client) -> None:
    """Return when the broker has handled what was sent before. nats-py's own ``flush`` writes its
    ping ahead of what the client still holds back."""
    await client._flush_pending(force_flush=True)
    await client.flush()
