"""The broker's storage: results need room too, so jobs are refused before it is full."""

from shared.broker import Broker
from shared.errors import StorageShort
from shared.logs import logger
from shared.storage import SHORT_SHARE, StorageUse, read_storage, read_write_errors

log = logger()


class Storage:
    """Whether there is room for more jobs, as of the last look, at most a few seconds ago."""

    def __init__(self, broker: Broker, replicas: int) -> None:
        self._broker = broker
        self._replicas = replicas
        self._use = StorageUse(0, None)
        self._write_errors: dict[str, str] = {}

    async def look(self) -> None:
        """Raises: BrokerUnavailable: no answer."""
        before = self._state
        self._use = await read_storage(self._broker)
        self._write_errors = await read_write_errors(self._broker, self._replicas)
        if self._state != before:
            log.warning(
                self._state,
                used=self._use.used,
                limit=self._use.limit,
                write_errors=self._write_errors,
            )

    def require_writable(self) -> None:
        """Raises: StorageShort: nothing can be stored any more, not even a result."""
        for stream, error in self._write_errors.items():
            raise StorageShort(
                f"the broker cannot write {stream} ({error}); free space on its disk, then restart "
                "nats-server: see sluice doctor"
            )

    def require_room(self) -> None:
        """Raises: StorageShort: too much of the storage is used to take another job on."""
        self.require_writable()
        if self._use.is_short:
            raise StorageShort(
                f"the broker's storage is {self._use.share:.0%} full; no more jobs are taken on "
                f"above {SHORT_SHARE:.0%}"
            )

    @property
    def _state(self) -> str:
        if self._write_errors:
            return "storage_unwritable"
        return "storage_short" if self._use.is_short else "storage_sufficient"
