"""Copies of requests, for those who look at a job after it has ended: the queue holds it only until
then."""

from contextlib import suppress

import nats.errors

from services.gateway.jobs.accepted import AcceptedJob
from shared.broker.connection import Broker
from shared.broker.stored_messages import StoredMessage
from shared.broker.streams import Topology
from shared.wire import subjects


class KeptRequests:
    """Publishes the copies to the stream KEPT, and reads them."""

    def __init__(self, broker: Broker, topology: Topology) -> None:
        """``topology`` says whether there is such a stream."""
        self._broker = broker
        self._topology = topology

    @property
    def are_kept(self) -> bool:
        return self._topology.kept_requests_h > 0

    async def keep(self, accepted: AcceptedJob, payload: bytes) -> None:
        """Publish a copy of a request that was accepted. Nobody waits for its confirmation: the job
        does not depend on it."""
        if self.are_kept and self._broker.is_connected:
            with suppress(nats.errors.Error):
                await self._broker.nc.publish(
                    subjects.kept(accepted.model, accepted.id),
                    payload,
                    headers=dict(accepted.caller.trace) or None,
                )

    async def find(self, job_id: str) -> StoredMessage | None:
        """Raises: BrokerUnavailable: no answer."""
        if not self.are_kept:
            return None
        return await self._broker.direct_get(subjects.KEPT, last_by_subj=subjects.kept_of(job_id))
