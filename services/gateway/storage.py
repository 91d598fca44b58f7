"""The broker's storage: results need room too, so jobs are refused before it is full."""

from shared.broker import Broker
from shared.errors import StorageShort
from shared.logs import logger
from shared.storage import StorageUse, read_storage

SHORT_SHARE = 0.8
"""Above it no job is taken on. The rest is for the results of those that were."""

log = logger()


class Storage:
    """Whether there is room for more jobs, as of the last look, at most a few seconds ago."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._use = StorageUse(0, None)

    async def look(self) -> None:
        """Raises: BrokerUnavailable: no answer."""
        was_short = self._is_short
        self._use = await read_storage(self._broker)
        if self._is_short != was_short:
            event = "storage_short" if self._is_short else "storage_sufficient"
            log.warning(event, used=self._use.used, limit=self._use.limit)

    def require_room(self) -> None:
        """Raises: StorageShort: too much of the storage is used to take another job on."""
        if self._is_short:
            raise StorageShort(
                f"the broker's storage is {self._use.share:.0%} full; no more jobs are taken on "
                f"above {SHORT_SHARE:.0%}"
            )

    @property
    def _is_short(self) -> bool:
        return self._use.share > SHORT_SHARE
