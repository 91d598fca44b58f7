"""The fleet as the broker knows it: who is live, which models there are."""

from datetime import UTC, datetime

import msgspec
import nats.js.errors
from msgspec import Struct
from nats.js.api import ConsumerInfo

from shared import subjects
from shared.broker import Broker, unavailable_on_outage
from shared.errors import BrokerUnavailable
from shared.messages import InfererEntry, decode_inferer_entry
from shared.timestamps import parse_timestamp
from shared.topology import is_ours

HEADER_MARKER_REASON, EXPIRED = "Nats-Marker-Reason", "MaxAge"


class Live(Struct, frozen=True):
    """A live inferer and how long ago it last said so."""

    entry: InfererEntry
    silent_s: float


async def read_inferers(broker: Broker) -> tuple[list[Live], bool]:
    """The live inferers, by model and id, and whether any has died of late.

    Raises:
        BrokerUnavailable: no answer.
    """
    stored = await broker.direct_get_all(
        f"KV_{subjects.INFERERS}", multi_last=[f"$KV.{subjects.INFERERS}.>"]
    )
    live, some_died, now = [], False, datetime.now(UTC)
    for message in stored:
        if not message.data:
            # A marker: the broker's for an entry that expired, its owner's for one that left.
            some_died |= message.headers.get(HEADER_MARKER_REASON) == EXPIRED
            continue
        try:
            entry = decode_inferer_entry(message.data)
        except msgspec.DecodeError:
            continue  # put there by hand
        if subjects.is_model_name(entry.model):
            silent = now - parse_timestamp(message.time)
            live.append(Live(entry, max(0.0, silent.total_seconds())))
    return sorted(live, key=lambda one: (one.entry.model, one.entry.id)), some_died


async def read_models(broker: Broker) -> dict[str, ConsumerInfo]:
    """The models' consumers; somebody else's on the same stream are none of our business.

    Raises:
        BrokerUnavailable: no answer, or no stream.
    """
    with unavailable_on_outage(broker):
        try:
            infos = await broker.js.consumers_info(subjects.REQUESTS)
        except nats.js.errors.NotFoundError:
            raise BrokerUnavailable(f"the stream {subjects.REQUESTS} is missing") from None
    return {info.name: info for info in infos if is_ours(info)}
