"""What the broker's refusals, and its silence, mean for what was asked of it."""

import nats.errors
import nats.js.errors

from shared.errors import RequestTooLarge, StorageShort, StoredAlready, StreamRefused

TRANSIENT = (
    nats.errors.TimeoutError,
    nats.errors.NoRespondersError,
    nats.errors.ConnectionClosedError,
    nats.errors.ConnectionReconnectingError,
    nats.errors.OutboundBufferLimitError,
    nats.js.errors.NoStreamResponseError,
    nats.js.errors.ServiceUnavailableError,
)
"""What an outage, a restart or an election looks like from the client."""

IMPOSSIBLE = (
    nats.errors.BadSubjectError,
    nats.errors.BadHeaderError,
    nats.errors.MaxPayloadError,
)
"""What the client refuses to send, now and later: it would cost the connection."""

STORE_FULL = (10002, 10023, 10047)
"""The broker's codes for storage that is used up: the account's, the server's, what is left to
reserve. It checks before it stores, so nothing was."""

STORED_ALREADY = (10071, 10164)
"""The broker's codes for a wrong expected last sequence; and on a cluster for a subject that is
about to hold another message, which the nodes have not agreed on yet."""

LONGEST_QUOTED = 200

SAME_ID_IN_PROCESS = 10158
"""The broker's code, on a cluster, while another message with this ``Nats-Msg-Id`` is stored."""


def refusal_of(
    subject: str, error: nats.errors.Error, may_have_landed: bool
) -> StorageShort | StreamRefused | StoredAlready | RequestTooLarge | None:
    """What a failed publish means for certain; None where the next try may succeed, or where an
    earlier one may have landed."""
    code = getattr(error, "err_code", None)
    if code in STORED_ALREADY:
        return StoredAlready(sentence_of(error))
    if may_have_landed:
        return None
    if code in STORE_FULL:
        return StorageShort(sentence_of(error, "the broker's storage is full"))
    if isinstance(error, nats.errors.MaxPayloadError):
        return RequestTooLarge(f"the message on {subject[:LONGEST_QUOTED]} is too large")
    if isinstance(error, IMPOSSIBLE):
        return StreamRefused(f"{subject[:LONGEST_QUOTED]} cannot be published: {error}")
    if isinstance(error, TRANSIENT) or code == SAME_ID_IN_PROCESS:
        return None
    return StreamRefused(sentence_of(error, f"the broker refuses the message on {subject}"))


def sentence_of(error: BaseException, what: str = "the broker refused the request") -> str:
    if isinstance(error, nats.js.errors.APIError) and error.description:
        return f"{what}: {error.description}"
    return f"the broker did not answer: {error or type(error).__name__}"
