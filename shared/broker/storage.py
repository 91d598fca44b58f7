"""How much of the file storage that the broker grants is used, and whether it can be written."""

import asyncio
from dataclasses import dataclass
from typing import Self

import nats.js.errors
from nats.js.api import AccountInfo, Tier

from shared.broker.connection import Broker, unavailable_on_outage
from shared.wire import subjects

SHORT_SHARE = 0.8
"""Above it, new jobs are refused. The rest is for the results of accepted jobs."""

WRITTEN = (
    subjects.REQUESTS,
    subjects.STATES,
    subjects.EVENTS,
    subjects.RESULTS,
    subjects.DEAD,
    f"KV_{subjects.INFERERS}",
    f"KV_{subjects.IDEMPOTENCY}",
)

NO_SUBJECT = "infer.nothing"
"""A subject that no stream has."""


@dataclass(frozen=True)
class StorageUse:
    """Bytes. ``limit`` is the account's, None where it has none: what the server itself may use
    (``max_file_store``) it reports only to its own system account."""

    used: int
    limit: int | None

    @property
    def share(self) -> float:
        """0 to 1; 0 where there is no limit to measure it by."""
        return self.used / self.limit if self.limit else 0.0

    @property
    def is_short(self) -> bool:
        return self.share > SHORT_SHARE

    @classmethod
    def of(cls, part: AccountInfo | Tier) -> Self:
        limit = part.limits.max_storage
        return cls(part.storage, limit if limit > 0 else None)


async def read_storage(broker: Broker) -> StorageUse:
    """The use of the account's storage; of its fullest tier, where it has tiers.

    Raises:
        BrokerUnavailable: no answer.
    """
    with unavailable_on_outage(broker):
        account = await broker.js.account_info()
    tiers = (account.tiers or {}).values()
    uses = [StorageUse.of(account), *(StorageUse.of(tier) for tier in tiers)]
    return max(uses, key=lambda use: use.share)


async def read_write_errors(broker: Broker, replicas: int) -> dict[str, str]:
    """What keeps the broker from writing streams of ours, by the stream.

    After one failed write (a full disk) a single server does not write that stream or answer
    publishes to it until it is restarted; everything else works as usual. On a cluster another node
    takes over, so nothing is checked there.

    Raises:
        BrokerUnavailable: no answer.
    """
    if replicas > 1:
        return {}
    with unavailable_on_outage(broker):
        errors = await asyncio.gather(*(_write_error(broker, stream) for stream in WRITTEN))
    return {stream: error for stream, error in zip(WRITTEN, errors, strict=True) if error}


async def _write_error(broker: Broker, stream: str) -> str | None:
    # Purging a subject without messages is a write that changes nothing, and it is answered.
    try:
        await broker.js.purge_stream(stream, subject=NO_SUBJECT)
    except nats.js.errors.NotFoundError:
        return None  # reported where the topology is checked
    except nats.js.errors.ServerError as error:
        # The last part of "write /the/whole/path: no space left on device".
        return str(error.description or error).rpartition(": ")[2]
    return None
