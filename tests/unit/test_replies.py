"""Where an answer may be sent."""

import pytest

from shared.wire.replies import LONGEST_INBOX, is_inbox


@pytest.mark.parametrize(
    "subject",
    [
        "_INBOX.a",
        "_INBOX.Pm3Hn6xLhCcHQ7.1",
        "_INBOX_alice.Pm3Hn6xLhCcHQ7.1",
        "_INBOX_.a",
        "_R_.aGc5FQ.kPZ7xT",
        "_GR_.kOzXb1.aBcD12._INBOX.a.1",
        "_INBOX." + "x" * (LONGEST_INBOX - len("_INBOX.")),
    ],
    ids=lambda subject: subject[:40],
)
def test_an_inbox_is_recognized(subject: str) -> None:
    """Those of clients, with a prefix of their own, of other accounts and of other clusters."""
    assert is_inbox(subject)


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "_INBOX",
        "_INBOX.",
        "_INBOX_",
        "_INBOX..a",
        "_INBOX.a.",
        "_INBOX.*",
        "_INBOX.a.>",
        "_INBOX.a*b",
        "_INBOX.a b",
        "_INBOX.a\tb",
        "_INBOX.a\r\nPUB x 0",
        "_INBOX.a\0b",
        "_INBOX.a\x0bb",
        "_INBOX.a\x7f",
        "_INBOX.ä",
        "_INBOX.\udcff",
        "_INBOXES.a",
        "_inbox.a",
        " _INBOX.a",
        "x._INBOX.a",
        "$JS.API.STREAM.DELETE.REQUESTS",
        "$JS.ACK.REQUESTS.tiny.1.1.1.1.0",
        "$KV.INFERERS.a",
        "infer.results.tiny.a",
        "_R_",
        "_GR_.a.b.$JS.API.STREAM.DELETE.REQUESTS",
        "_GR_.a.b.infer.results.tiny.a",
        "_GR_.a._INBOX.b",
        "_INBOX." + "x" * LONGEST_INBOX,
    ],
    ids=lambda subject: ascii(subject)[:40],
)
def test_what_is_not_an_inbox_is_refused(subject: str) -> None:
    """Subjects of the broker and of Sluice, wildcards, and what would break the protocol's line."""
    assert not is_inbox(subject)
