"""Whether anybody would still get an answer: core NATS does not say when a caller goes away."""

import asyncio
from contextlib import suppress
from secrets import token_hex

import msgspec
import nats.errors

from shared import subjects
from shared.broker import REQUEST_TIMEOUT_S, Broker
from shared.job_ids import new_job_id

LOOKS_AT_ONCE = 16

INBOX = "_INBOX"
"""What the inboxes begin with whose subscribers the broker can see: those of another account or
cluster are not among them."""

NO_RESPONDERS = "503"


class Interest:
    """Asks the broker who subscribes, and sends nothing that a subscriber would read."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._looking = asyncio.Semaphore(LOOKS_AT_ONCE)

    async def exists(self, inbox: str) -> bool:
        """Whether ``inbox`` has a subscriber; True unless the broker says that it has none."""
        if not inbox.startswith(INBOX):
            return True
        async with self._looking:
            return await self._has_wildcard(inbox) or await self._has_literal(inbox)

    async def _has_wildcard(self, inbox: str) -> bool:
        """Clients subscribe to ``<prefix>.*`` once for all their requests, and drop what carries a
        token that is not one of theirs: so does this message, which the broker refuses to take
        where there is no such subscription."""
        prefix, _, _ = inbox.rpartition(".")
        # Random, and not of the client's making: from one of its inboxes the others can be guessed,
        # and a client that knows those could have replies published there, in the broker's name.
        refusals = f"{INBOX}.{token_hex(16)}"
        try:
            received = await self._broker.nc.subscribe(refusals)
            try:
                await self._broker.nc.publish(f"{prefix}.{token_hex(16)}", reply=refusals)
                # The broker refuses before it answers this.
                await self._broker.nc.flush(REQUEST_TIMEOUT_S)
                if not received.pending_msgs:
                    return True
                refusal = await received.next_msg(REQUEST_TIMEOUT_S)
                return (refusal.headers or {}).get("Status") != NO_RESPONDERS
            finally:
                await received.unsubscribe()
        except nats.errors.Error:
            return True

    async def _has_literal(self, inbox: str) -> bool:
        """The broker says of a consumer whether its messages would reach anybody. This one never
        has a message. (Of wildcards the broker does not see it.)"""
        name = new_job_id()
        nothing = subjects.nobodys_events(name)
        config = {
            "name": name,
            "deliver_subject": inbox,
            "deliver_policy": "new",
            "filter_subject": nothing,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": 1_000_000_000,  # in case that the deletion is lost
        }
        try:
            answer = await self._broker.nc.request(
                f"$JS.API.CONSUMER.CREATE.{subjects.EVENTS}.{name}.{nothing}",
                msgspec.json.encode({"stream_name": subjects.EVENTS, "config": config}),
                REQUEST_TIMEOUT_S,
            )
            created = msgspec.json.decode(answer.data, type=_Created)
        except (nats.errors.Error, ValueError):
            return True
        with suppress(nats.errors.Error):
            await self._broker.nc.publish(f"$JS.API.CONSUMER.DELETE.{subjects.EVENTS}.{name}")
        return created.name != name or created.push_bound


class _Created(msgspec.Struct):
    """What is read of the broker's answer; an error has no name."""

    name: str = ""
    push_bound: bool = False
