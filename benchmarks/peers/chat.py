"""A client of OpenAI's streams that does as little as it can: what it costs is not the server's."""

import http.client
import json
import time
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

Message = dict[str, str]
PATIENCE_S = 600.0


class Answer(Struct):
    text: str
    first_token_s: float
    total_s: float
    prompt_tokens: int | None
    """None if the server does not count."""
    tokens: int
    cached_tokens: int | None
    """Of the prompt, those that were not computed; None if the server does not say."""


def ask(url: str, messages: list[Message], max_tokens: int, **options: Any) -> Answer:
    """The answer of the server at ``url``, the most probable one unless ``options`` of the request
    say otherwise, over a connection that is opened before the time counts: servers close idle
    ones."""
    body = {
        "model": "smollm2",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_S)
    with closing(connection):
        connection.connect()
        started = time.perf_counter()
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(response.read().decode())
        first_s = None
        events: list[bytes] = []
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            events.append(line)
            if first_s is None and _text(_chunk(line)):
                first_s = time.perf_counter() - started
        total_s = time.perf_counter() - started
    chunks = [_chunk(event) for event in events]
    texts = [text for chunk in chunks if (text := _text(chunk))]
    # llama-cpp-python's server sends one chunk a token, and does not count.
    usage = chunks[-1].get("usage") or {"completion_tokens": len(texts)}
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        text="".join(texts),
        first_token_s=total_s if first_s is None else first_s,
        total_s=total_s,
        prompt_tokens=usage.get("prompt_tokens"),
        tokens=usage["completion_tokens"],
        cached_tokens=details.get("cached_tokens"),
    )


def _chunk(event: bytes) -> dict[str, Any]:
    chunk: dict[str, Any] = json.loads(event.removeprefix(b"data: "))
    return chunk


def _text(chunk: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
