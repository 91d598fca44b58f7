"""Replies to callers. The sender of a request names the reply subject. With our permissions a reply
could purge a stream or end another caller's job, so replies go to inboxes only."""

import re

from nats.aio.client import Client

from shared.logs import logger

LONGEST_INBOX = 1024
"""A subject as long as the server's control line (4 kB) closes the connection that publishes it."""

_TOKEN = r"[!-)+\-/-=?-~]+"  # visible ASCII without the wildcards and the dot: a byte a character
_INBOX = re.compile(
    # What a gateway between two clusters puts in front of the reply subject; the broker takes it
    # off again.
    rf"(?:_GR_\.{_TOKEN}\.{_TOKEN}\.)?"
    # An inbox, also with a prefix of the user's own; or what the broker makes of one when the
    # request comes from another account.
    rf"(?:_INBOX|_INBOX_(?:{_TOKEN})?|_R_)(?:\.{_TOKEN})+"
)

log = logger()


def is_inbox(subject: str) -> bool:
    """Whether an answer may be sent to ``subject``."""
    return len(subject) <= LONGEST_INBOX and _INBOX.fullmatch(subject) is not None


async def send_reply(
    nc: Client, reply_to: str, payload: bytes = b"", headers: dict[str, str] | None = None
) -> None:
    """Publish an answer, or a part of one, to the subject that a caller named; to nothing but an
    inbox.

    Raises:
        nats.errors.Error: it could not be sent.
    """
    if is_inbox(reply_to):
        await nc.publish(reply_to, payload, headers=headers)
    else:
        log.warning("reply_refused", reply_to=reply_to[:100], why="not a client's inbox")
