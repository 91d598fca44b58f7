"""The first waiting jobs of a model, and how large their requests are."""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

from services.gateway.eta.position import higher_than
from services.gateway.eta.simulation import Waiting
from services.gateway.state.waiting_jobs import WaitingJobs
from shared.broker.connection import Broker
from shared.broker.consumers import ModelConsumers
from shared.broker.stored_messages import StoredMessage
from shared.wire import subjects
from shared.wire.codecs import decode_request
from shared.wire.requests import InferenceRequest, Work

MOST_IN_LINE = 50
"""How many of the first waiting jobs of a model are read and simulated one by one. Of those behind
them, only the number counts."""
READ_BYTES = 1024 * 1024
"""How much of their requests is read at once."""
MOST_SIZES = 5000
"""Requests whose sizes are remembered."""


class Line:
    """What is known of waiting jobs. The size of each request is read once."""

    def __init__(self, broker: Broker, waiting_jobs: WaitingJobs) -> None:
        self._broker = broker
        self._waiting_jobs = waiting_jobs
        self._sizes: OrderedDict[str, Work | None] = OrderedDict()
        """By the subjects of the requests; None for what is not a request."""

    async def first(self, model: ModelConsumers) -> list[subjects.RequestSubject]:
        """The first `MOST_IN_LINE` waiting jobs of ``model``, in the order of delivery.

        Raises:
            BrokerUnavailable: no answer.
        """
        known = self._waiting_jobs.first(model, MOST_IN_LINE)
        if known is not None:
            return known
        found: list[StoredMessage] = []
        for priority in subjects.PRIORITIES:
            limit = MOST_IN_LINE - len(found)
            info = model.by_priority.get(priority)
            if limit and info is not None and info.num_pending:
                found += await self._broker.direct_get_all(
                    subjects.REQUESTS,
                    seq=model.last_delivered(priority) + 1,
                    next_by_subj=info.config.filter_subject,
                    batch=limit,
                    max_bytes=READ_BYTES,
                )
        requests: list[subjects.RequestSubject] = []
        for message in found:
            with suppress(ValueError):  # its id is longer than any of ours
                requests.append(subjects.RequestSubject.parse(message.subject))
                self.note(message, decode_request.read(message.data, message.subject), model)
        return requests

    async def with_sizes(
        self, requests: Sequence[subjects.RequestSubject], model: ModelConsumers
    ) -> list[Waiting]:
        """``requests`` of ``model`` as a simulation takes them. Those whose sizes are not known are
        read, up to `READ_BYTES`.

        Raises:
            BrokerUnavailable: no answer.
        """
        # By subject: for a range, the broker would also count what follows each one.
        if names := [one.request for one in requests if one.request not in self._sizes]:
            for message in await self._broker.direct_get_all(
                subjects.REQUESTS, multi_last=names, max_bytes=READ_BYTES
            ):
                self.note(message, decode_request.read(message.data, message.subject), model)
        arrivals = self._waiting_jobs.arrivals
        per_s = {one: arrivals.per_s(model.token, [one]) for one in subjects.PRIORITIES}
        return [
            Waiting(
                self._sizes.get(one.request),
                {higher: per_s[higher] for higher in higher_than(one.priority)},
            )
            for one in requests
        ]

    def note(
        self, message: StoredMessage, request: InferenceRequest | None, model: ModelConsumers
    ) -> Work | None:
        """The size of a request; None if it cannot be read, or the model is not known yet."""
        if model.facts is None:
            return None
        work = None if request is None else request.work(model.facts.n_ctx)
        self._sizes[message.subject] = work
        if len(self._sizes) > MOST_SIZES:
            self._sizes.popitem(last=False)
        return work
