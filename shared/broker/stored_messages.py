"""Messages as a stream holds them, and how the broker answers when one is read."""

from collections.abc import Callable

import msgspec
from nats.aio.msg import Msg

from shared.errors import BrokerUnavailable

NO_MESSAGE_FOUND = 10037
END_OF_ANSWER = ("204", "404")
"""The status after the last message of a batch, and of a read that found nothing."""


class StoredMessage(msgspec.Struct, frozen=True):
    """A message as a stream holds it; ``time`` is the broker's, RFC 3339 with nanoseconds."""

    subject: str
    sequence: int
    time: str
    headers: dict[str, str]
    data: bytes

    @property
    def pending_after(self) -> int:
        """How many more there were after this one when the read began that found it: one with
        ``batch``, however few that asked for."""
        return int(self.headers["Nats-Num-Pending"])

    @classmethod
    def of_direct_answer(cls, stream: str, answer: Msg) -> "StoredMessage | None":
        """A message that a direct get found (ADR-31); None where there is none, or no more.

        Raises:
            BrokerUnavailable: it is not such an answer.
        """
        headers = dict(answer.headers or {})
        if "Nats-Sequence" not in headers:
            if headers.get("Status") in END_OF_ANSWER:
                return None
            raise BrokerUnavailable(f"the broker could not read {stream}: {headers}")
        return cls(
            subject=headers["Nats-Subject"],
            sequence=int(headers["Nats-Sequence"]),
            time=headers["Nats-Time-Stamp"],
            headers=headers,
            data=answer.data,
        )

    @classmethod
    def of_leader_answer(
        cls, stream: str, answer: Msg, parse_headers: Callable[[bytes], dict[str, str]]
    ) -> "StoredMessage | None":
        """What the stream's leader found.

        Raises:
            BrokerUnavailable: it could not read.
        """
        found = _decode_leader_answer(answer.data)
        message = found.message
        if message is None:
            if found.error is not None and found.error.err_code == NO_MESSAGE_FOUND:
                return None
            raise BrokerUnavailable(f"the broker could not read {stream}: {found.error}")
        return cls(
            subject=message.subject,
            sequence=message.seq,
            time=message.time,
            headers=parse_headers(message.hdrs),
            data=message.data,
        )


class _LeaderMessage(msgspec.Struct, frozen=True):
    subject: str
    seq: int
    time: str
    hdrs: bytes = b""
    data: bytes = b""


class _LeaderError(msgspec.Struct, frozen=True):
    err_code: int = 0
    description: str = ""


class _LeaderAnswer(msgspec.Struct, frozen=True):
    message: _LeaderMessage | None = None
    error: _LeaderError | None = None


_decode_leader_answer = msgspec.json.Decoder(_LeaderAnswer).decode
