"""Encodes and decodes payloads. Those that cannot be read are skipped, counted and logged."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from shared.logs import logger
from shared.wire.api import DeadLetterHead
from shared.wire.events import CancelNotice, InfererDeath, StateEvent, TokenFrame
from shared.wire.inferers import (
    ConcurrencyChange,
    InfererEntry,
    ModelFacts,
    OverlapNotice,
    SetConcurrency,
)
from shared.wire.listing import RequestHead, ResultHead
from shared.wire.requests import IdempotencyEntry, InferenceRequest, OrphanEntry
from shared.wire.results import DeadLetter, Result

T = TypeVar("T")

CANNOT_BE_READ = (ValueError, RecursionError)
"""What decoding raises: not JSON, not UTF-8, not of the type or out of range, nested too deeply."""

LONGEST_REASON = 500

_skipped: Counter[str] = Counter()

log = logger()


class Unreadable(ValueError):
    """What was received is not what its subject says."""


class Decoder(Generic[T]):
    """Decodes messages of one kind. The types check whatever later code relies on."""

    def __init__(self, what: str, kind: Any) -> None:
        """``what`` names the kind, for people: "state event"; ``kind`` is T."""
        self._what = what
        self._decode: Callable[[bytes | str], T] = msgspec.json.Decoder(kind).decode

    def __call__(self, data: bytes | str) -> T:
        """Raises: Unreadable."""
        try:
            if isinstance(data, bytes):
                data = data.decode()  # also what the type leaves out, or takes as it is
            return self._decode(data)
        except CANNOT_BE_READ as error:
            why = str(error)[:LONGEST_REASON]  # it quotes what it found, however long that is
            raise Unreadable(f"not a valid {self._what} of this version of Sluice: {why}") from None

    def read(self, data: bytes | str, subject: str) -> T | None:
        """Decode ``data``; None if it cannot be read, which is counted and logged."""
        try:
            return self(data)
        except Unreadable as error:
            skip(self._what, subject, error)
            return None


def skip(what: str, subject: str, error: Exception) -> None:
    """Count a message that could not be read. The first of each kind is logged, then the 10th, the
    100th and so on: a client that can publish one can publish a million."""
    _skipped[what] += 1
    count = _skipped[what]
    if str(count).strip("0") == "1":
        log.warning(
            "unreadable_skipped",
            what=what,
            subject=subject[:200],
            why=str(error)[:200] or type(error).__name__,
            count=count,
        )


encode = msgspec.json.Encoder().encode
decode_request = Decoder[InferenceRequest]("request", InferenceRequest)
decode_result = Decoder[Result]("result", Result)
decode_request_head = Decoder[RequestHead]("request", RequestHead)
decode_result_head = Decoder[ResultHead]("result", ResultHead)
decode_state_event = Decoder[StateEvent]("state event", StateEvent)
decode_inferer_death = Decoder[InfererDeath]("report of a death", InfererDeath)
decode_token_frame = Decoder[TokenFrame]("token frame", TokenFrame)
decode_cancel_notice = Decoder[CancelNotice]("cancel notice", CancelNotice)
decode_idempotency_entry = Decoder[IdempotencyEntry]("idempotency entry", IdempotencyEntry)
decode_orphan_entry = Decoder[OrphanEntry]("entry of an orphan", OrphanEntry)
decode_dead_letter = Decoder[DeadLetter]("dead letter", DeadLetter)
decode_dead_letter_head = Decoder[DeadLetterHead]("dead letter", DeadLetterHead)
decode_concurrency = Decoder[SetConcurrency]("concurrency command", SetConcurrency)
decode_concurrency_change = Decoder[ConcurrencyChange](
    "reply to a concurrency command", ConcurrencyChange
)
decode_inferer_entry = Decoder[InfererEntry]("entry of an inferer", InfererEntry)
decode_model_facts = Decoder[ModelFacts]("description of a model", ModelFacts)
decode_overlap_notice = Decoder[OverlapNotice]("notice of overlapping inferers", OverlapNotice)
