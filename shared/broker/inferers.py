"""The fleet as the broker knows it: which inferers are live, and which compete for CPUs."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import islice
from shlex import quote
from typing import NamedTuple, Self

from msgspec import Struct

from shared.broker.connection import Broker
from shared.model_names import is_name
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_inferer_entry
from shared.wire.inferers import InfererEntry

HEADER_MARKER_REASON, EXPIRED = "Nats-Marker-Reason", "MaxAge"

MOST_OVERLAPS = 32
"""Of one inferer in a report: all of a thousand on one host would be a million."""

OVERLAP_ADVICE = (
    "each slows the other down several times: give each its own with `sluice up --inferers 2`, "
    "taskset or cpusets, or set INFERER_THREADS"
)


CLOCK_ERROR = timedelta(minutes=1)
"""An inferer reads the broker's time once it is connected; until then it has its host's."""


class Live(Struct, frozen=True):
    """A live inferer, and the broker's time of its last heartbeat."""

    entry: InfererEntry
    heartbeat_at: str


class Blockage(NamedTuple):
    """Why no job of a model can start, and what to do about it."""

    cause: str
    advice: str


def find_blockage(model: str, inferers: Sequence[InfererEntry]) -> Blockage | None:
    """What keeps the ``inferers``, all live ones of ``model``, from starting a job; None if one of
    them has an open slot."""
    if any(entry.slots for entry in inferers):
        return None
    if not inferers:
        return Blockage(
            "no live inferer",
            # One may be: after a crash, or with `sluice up --min 0`.
            f"if none is starting, start one that serves {model} with `sluice up`, or see "
            "`sluice doctor`",
        )
    if all(entry.state == "stopping" for entry in inferers):
        return Blockage("every inferer is shutting down", "start another with `sluice up`")
    return Blockage(
        "all slots are closed", f"open some with `sluice concurrency 1 --model {quote(model)}`"
    )


async def read_inferers(broker: Broker) -> tuple[list[Live], bool]:
    """The live inferers, by model and id, and whether any has died recently.

    Raises:
        BrokerUnavailable: no answer.
    """
    stored = await broker.last_of_each(f"KV_{subjects.INFERERS}", subjects.INFERERS_WILDCARD)
    live, some_died = [], False
    latest_start = timestamp(broker.now() + CLOCK_ERROR)
    for message in stored:
        if not message.data:
            # A marker: the broker's for an entry that expired, its owner's for one that left.
            some_died |= message.headers.get(HEADER_MARKER_REASON) == EXPIRED
            continue
        entry = decode_inferer_entry.read(message.data, message.subject)
        if entry is not None and is_credible(entry, message.subject, latest_start):
            live.append(Live(entry, message.time))
    return sorted(live, key=lambda one: (one.entry.model, one.entry.id)), some_died


def is_credible(entry: InfererEntry, subject: str, latest_start: str) -> bool:
    """Whether what an entry at ``subject`` says can be true: it is stored under the key of its own
    model and inferer, and did not start later than ``latest_start``. A model's facts are those of
    its youngest inferer: one from the future would be the youngest for ever."""
    return (
        is_name(entry.model)
        and subject == subjects.inferer(entry.model, entry.id)
        and entry.started_at <= latest_start
    )


def overlaps(first: InfererEntry, second: InfererEntry) -> bool:
    """Whether two inferers share CPUs of a host and have more threads than there are CPUs for both.

    llama.cpp's threads wait for each other in a loop: one without a CPU of its own stops all.
    """
    return (
        first.id != second.id
        and first.host == second.host
        and _compete(Demand.of(first), Demand.of(second))
    )


def find_overlaps(inferers: Iterable[InfererEntry]) -> dict[str, list[str]]:
    """For each inferer's id those of others that it `overlaps`, at most `MOST_OVERLAPS`."""
    hosts: dict[str, dict[Demand, list[str]]] = {}
    for inferer in inferers:
        demands = hosts.setdefault(inferer.host, {})
        demands.setdefault(Demand.of(inferer), []).append(inferer.id)
    found = {}
    for demands in hosts.values():
        for demand, ids in demands.items():
            competing = (
                other_id
                for other, others in demands.items()
                if _compete(demand, other)
                for other_id in others
            )
            # One more, as the inferer itself is among them.
            some = list(islice(competing, MOST_OVERLAPS + 1))
            for inferer_id in ids:
                found[inferer_id] = [one for one in some if one != inferer_id][:MOST_OVERLAPS]
    return found


class Demand(NamedTuple):
    """What an inferer asks of the CPUs of its host; many ask the same."""

    cpus: int
    """A bit for each: every two demands of a host are compared, and there may be hundreds."""
    threads: int

    @classmethod
    def of(cls, inferer: InfererEntry) -> Self:
        return cls(sum(1 << cpu for cpu in set(inferer.cpus)), inferer.threads)


def _compete(first: Demand, second: Demand) -> bool:
    cpus = first.cpus | second.cpus
    return bool(first.cpus & second.cpus) and first.threads + second.threads > cpus.bit_count()
