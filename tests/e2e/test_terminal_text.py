"""What others have written, on a terminal: shown, and never obeyed."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.broker.connection import connected
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.results import Completed, DeadLetter, Timings, Usage
from tests.support.processes import PATIENCE_S, Stack, clean_environment, eventually, scripts
from tests.support.terminal import Terminal, terminal

EVIL = "\x1b]0;owned\x07[red]:skull:\x9b2J\u202e\rend"
SHOWN = "\\x1b]0;owned\\x07[red]:skull:\\x9b2J\\u202e\\rend"


def answer(job_id: str) -> Completed:
    return Completed(
        id=job_id,
        model="tiny",
        attempt=1,
        queued_at=timestamp(),
        started_at=timestamp(),
        finished_at=timestamp(),
        inferer=EVIL,
        timings=Timings(queued_ms=0),
        text=EVIL,
        finish_reason="length",
        usage=Usage(1, 1, 2),
    )


def store(stack: Stack, subject: str, payload: bytes) -> None:
    async def put() -> None:
        async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
            await broker.publish_stored(subject, payload, {}, 5)

    asyncio.run(put())


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Stack]:
    with Stack(tmp_path) as stack:
        stack.start_gateway(GATEWAY_MODELS="tiny")
        eventually(lambda: _is_ready(stack), "the gateway is ready")
        yield stack


def _is_ready(stack: Stack) -> bool:
    try:
        return stack.http.get("/readyz").status_code == 200
    except Exception:
        return False


def said(shown: Terminal) -> str:
    shown.process.wait(PATIENCE_S)
    return shown.output


def assert_obeys_nothing(text: str) -> None:
    for order in ("\x1b]", "\x07", "\x9b", "\u202e", "\rend"):
        assert order not in text, text


def test_a_streamed_answer_brings_no_control_characters_to_a_terminal(gateway: Stack) -> None:
    """`ask` on a terminal; the test answers as an inferer would."""
    with terminal("ask", "hi", "--url", gateway.url) as shown:
        accepted = eventually(
            lambda: gateway.gateways[0].events("request_accepted") or None, "accepted"
        )
        job_id = accepted[0]["job_id"]
        store(gateway, subjects.result("tiny", job_id), encode(answer(job_id)))
        text = said(shown)
    assert SHOWN in text
    assert "cut off" in text
    assert_obeys_nothing(text)


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_a_result_brings_no_control_characters_to_a_terminal(
    gateway: Stack, flags: tuple[str, ...]
) -> None:
    """`status` of it, its inferer's name included; JSON keeps the value."""
    job_id = new_job_id()
    store(gateway, subjects.result("tiny", job_id), encode(answer(job_id)))
    with terminal("status", job_id, "--url", gateway.url, *flags) as shown:
        text = said(shown)
    assert_obeys_nothing(text)
    if not flags:
        assert text.count(SHOWN) == 2
        assert "cut off" in " ".join(text.split())
        assert "normal" in text


def test_a_pipe_gets_the_text_unchanged(gateway: Stack) -> None:
    """Byte for byte, white space included: programs want the data."""
    job_id = new_job_id()
    store(gateway, subjects.result("tiny", job_id), encode(answer(job_id)))
    piped = subprocess.run(
        [scripts() / "sluice", "status", job_id, "--url", gateway.url],
        env=clean_environment(),
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert piped.stdout.decode("utf-8").endswith(f"\n{EVIL}\n")


def test_a_dead_letter_and_a_refusal_bring_no_control_characters_to_a_terminal(
    gateway: Stack,
) -> None:
    """The request of somebody else, and an error that quotes what was sent."""
    job_id = new_job_id()
    letter = DeadLetter(
        id=job_id,
        model="tiny",
        code=EVIL,
        message=EVIL,
        attempts=1,
        at=timestamp(),
        request=EVIL,
    )
    store(gateway, subjects.dead("tiny", job_id), encode(letter))
    for command in (("dead", "show", job_id), ("dead", "list"), ("ask", "x", "--model", EVIL)):
        with terminal(*command, "--url", gateway.url) as shown:
            text = said(shown)
        assert "\\x1b]0;owned" in text
        assert_obeys_nothing(text)
