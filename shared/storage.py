"""How much of the file storage that the broker grants is used."""

from dataclasses import dataclass
from typing import Self

from nats.js.api import AccountInfo, Tier

from shared.broker import Broker, unavailable_on_outage


@dataclass(frozen=True)
class StorageUse:
    """Bytes. ``limit`` is the account's, None where it has none: what the server itself may use
    (``max_file_store``) it tells only to its own system account."""

    used: int
    limit: int | None

    @property
    def share(self) -> float:
        """0 to 1; 0 where there is no limit to measure it by."""
        return self.used / self.limit if self.limit else 0.0

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
