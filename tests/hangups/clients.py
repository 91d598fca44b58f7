"""Clients that hang up early. Each kind is a function with `@hangs_up`: it sends one request and
goes away before the answer is there."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from urllib.parse import urlsplit

import nats

from shared.job_ids import new_job_id
from shared.wire import subjects
from tests.support.nats_client import flush

LONG = {"model": "tiny", "max_tokens": 8_000, "timeout_s": 600}
"""A job that has not ended when its client hangs up."""
SHORT = {"model": "tiny", "max_tokens": 3}
LONGEST_STAY_S = 0.25
"""Some hang up before the gateway has read their request, some after the first token."""


@dataclass(frozen=True)
class Where:
    http: str
    nats: str
    job_id: str
    """A job that waits, for readers of its events."""
    key: str
    """The idempotency key of a job that is to stay."""
    kind: str = ""
    """Which kind of client asks; each of its jobs says so in its metadata."""


HangUp = Callable[[Where, Random], Awaitable[None]]
Body = Mapping[str, object]


@dataclass(frozen=True)
class Kind:
    name: str
    hang_up: HangUp
    cancels: bool
    """Whether nobody waits for the job any more, so that it is to be cancelled."""


KINDS: dict[str, Kind] = {}


def hangs_up(*, cancels: bool) -> Callable[[HangUp], HangUp]:
    def add(function: HangUp) -> HangUp:
        KINDS[function.__name__] = Kind(function.__name__, function, cancels)
        return function

    return add


@hangs_up(cancels=False)
async def events(where: Where, random: Random) -> None:
    await _over_http(where, random, "GET", f"/jobs/{where.job_id}/events")


@hangs_up(cancels=True)
async def chat_stream(where: Where, random: Random) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    await _over_http(where, random, "POST", "/v1/chat/completions", body | _openai(LONG))


@hangs_up(cancels=True)
async def completion_stream(where: Where, random: Random) -> None:
    body = {"prompt": "hello", "stream": True}
    await _over_http(where, random, "POST", "/v1/completions", body | _openai(LONG))


@hangs_up(cancels=True)
async def chat_wait(where: Where, random: Random) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    await _over_http(where, random, "POST", "/v1/chat/completions", body | _openai(LONG))


@hangs_up(cancels=True)
async def submit_wait(where: Where, random: Random) -> None:
    await _over_http(where, random, "POST", "/jobs", {"prompt": "a"} | LONG, Prefer="wait=60")


@hangs_up(cancels=False)
async def submit_wait_async(where: Where, random: Random) -> None:
    """It has said that it does not mind: the job stays."""
    preferred = "respond-async, wait=60"
    await _over_http(where, random, "POST", "/jobs", {"prompt": "a"} | SHORT, Prefer=preferred)


@hangs_up(cancels=False)
async def repeated_key(where: Where, random: Random) -> None:
    """All ask for one job, which stays."""
    body = {"prompt": "hello", "stream": True} | _openai(LONG)
    path = "/v1/completions"
    await _over_http(where, random, "POST", path, body, **{"Idempotency-Key": where.key})


@hangs_up(cancels=True)
async def nats_chat(where: Where, random: Random) -> None:
    await _over_nats(where, random, {"messages": [{"role": "user", "content": "a"}]} | LONG)


@hangs_up(cancels=True)
async def nats_chat_stream(where: Where, random: Random) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True} | LONG
    await _over_nats(where, random, body)


@hangs_up(cancels=False)
async def nats_repeated_key(where: Where, random: Random) -> None:
    """The gateway answers all but the first of these itself."""
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True} | LONG
    headers = {subjects.HEADER_IDEMPOTENCY_KEY: f"{where.key}-nats"}
    await _over_nats(where, random, body, headers)


def _marked(body: Body, where: Where) -> bytes:
    return json.dumps({**body, "metadata": {"kind": where.kind}}).encode()


def _openai(options: Body) -> dict[str, object]:
    """Without what that API does not know."""
    return {name: value for name, value in options.items() if name != "timeout_s"}


async def _over_http(
    where: Where, random: Random, method: str, path: str, body: Body | None = None, **headers: str
) -> None:
    url = urlsplit(where.http)
    data = b"" if body is None else _marked(body, where)
    with suppress(OSError):
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        lines = [f"{method} {path} HTTP/1.1", f"Host: {url.netloc}", f"Content-Length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        await writer.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0, LONGEST_STAY_S)):
                while await reader.read(4096):
                    pass
        writer.transport.abort()


async def _over_nats(
    where: Where, random: Random, body: Body, headers: dict[str, str] | None = None
) -> None:
    connection = await nats.connect(where.nats, max_reconnect_attempts=0)
    inbox = f"_INBOX.{new_job_id()}"
    await connection.subscribe(inbox)
    await connection.publish("infer.chat", _marked(body, where), inbox, headers=headers)
    await flush(connection)
    await asyncio.sleep(random.uniform(0, LONGEST_STAY_S))
    await connection.close()
