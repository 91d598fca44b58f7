"""A client of OpenAI's streams that does as little as it can: what it costs is not the server's."""

import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

Message = dict[str, str]
PATIENCE_S = 600.0


class Answer(Struct):
    text: str
    first_token_s: float
    total_s: float
    tokens: int
    cached_tokens: int | None
    """Of the prompt, those that were not computed; None if the server does not say."""


class Chat:
    """One connection, one request after another."""

    def __init__(self, url: str) -> None:
        host = urlsplit(url)
        assert host.hostname is not None
        self._connection = http.client.HTTPConnection(host.hostname, host.port, timeout=PATIENCE_S)

    def close(self) -> None:
        self._connection.close()

    def ask(self, messages: list[Message], max_tokens: int) -> Answer:
        """The most probable answer."""
        body = {
            "model": "smollm2",
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started = time.perf_counter()
        self._connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
        )
        response = self._connection.getresponse()
        if response.status != 200:
            raise RuntimeError(response.read().decode())
        first_s = None
        events: list[bytes] = []
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            events.append(line)
            if first_s is None and _text(json.loads(line.removeprefix(b"data: "))):
                first_s = time.perf_counter() - started
        total_s = time.perf_counter() - started
        chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
        texts = [text for chunk in chunks if (text := _text(chunk))]
        # llama-cpp-python's server sends one chunk a token, and does not count.
        usage = chunks[-1].get("usage") or {"completion_tokens": len(texts)}
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            text="".join(texts),
            first_token_s=total_s if first_s is None else first_s,
            total_s=total_s,
            tokens=usage["completion_tokens"],
            cached_tokens=details.get("cached_tokens"),
        )


def _text(chunk: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
