"""Copies of requests, for those who look at a job after it has ended: the queue holds it only until
then."""

import time
from contextlib import suppress

import nats.errors

from services.gateway.jobs.accepted import AcceptedJob
from shared.broker.connection import Broker
from shared.broker.stored_messages import StoredMessage
from shared.broker.streams import Topology
from shared.broker.topology import ensure_kept
from shared.errors import SluiceError
from shared.logs import logger
from shared.wire import subjects

TRY_AGAIN_S = 10.0
"""Where the broker has no room for the stream, or too few nodes."""

log = logger()


class KeptRequests:
    """Publishes the copies to the stream KEPT, and reads them."""

    def __init__(self, broker: Broker, topology: Topology) -> None:
        """``topology`` says whether there is to be such a stream."""
        self._broker = broker
        self._topology = topology
        self._has_stream = True
        self._tried_at = 0.0

    @property
    def are_kept(self) -> bool:
        """Whether the operator wants it."""
        return self._topology.kept_requests_h > 0

    async def refresh(self, is_missing: bool) -> None:
        """Try to create the stream again, now and then, while it ``is_missing``. No job depends on
        it, so nothing waits for it, and a failure does not stop the gateway."""
        if is_missing and self._has_stream:
            log.warning("requests_not_kept")
        self._has_stream = not is_missing
        if is_missing and time.monotonic() - self._tried_at > TRY_AGAIN_S:
            self._tried_at = time.monotonic()
            with suppress(SluiceError):
                await ensure_kept(self._broker, self._topology)

    async def keep(self, accepted: AcceptedJob, payload: bytes) -> None:
        """Publish a copy of a request that was accepted. Nobody waits for its confirmation: the job
        does not depend on it."""
        if self.are_kept and self._has_stream and self._broker.is_connected:
            with suppress(nats.errors.Error):
                await self._broker.nc.publish(
                    subjects.kept(accepted.model, accepted.id),
                    payload,
                    headers=dict(accepted.caller.trace) or None,
                )

    async def find(self, job_id: str) -> StoredMessage | None:
        """Raises: BrokerUnavailable: no answer."""
        if not (self.are_kept and self._has_stream):
            return None
        return await self._broker.direct_get(subjects.KEPT, last_by_subj=subjects.kept_of(job_id))

    async def delete(self, job_id: str) -> None:
        """Raises: BrokerUnavailable: no answer."""
        if self.are_kept and self._has_stream:
            await self._broker.purge(subjects.KEPT, subjects.kept_of(job_id))
