"""What the prompt cache gives: the time to the first token with it and without, over HTTP, in three
situations. Two stacks with the real model side by side, pairs of requests alternate between them.

- A system prompt that many jobs begin with, and a new question.
- The second turn of a conversation, right after the first.
- The same, after another conversation has had the slot.

    .venv/bin/python -m benchmarks.prompt_cache
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from typing import Any

import httpx2

from benchmarks.measuring import alternated, arguments, describe_machine, running_stack
from shared.model_files import locate
from tests.support.processes import PATIENCE_S, server_sent_events

PAIRS = 7
FACTS = " ".join(
    f"Fact {number}: item {number * 7} weighs {number * 3} grams." for number in range(16)
)
"""Some 280 tokens."""
HISTORY = " ".join(f"Line {number}: the {number * 7} ships sail east." for number in range(110))
"""Some 1,500 tokens."""

Message = dict[str, str]
numbers = count()


class Client:
    """Requests to one stack."""

    def __init__(self, url: str) -> None:
        self.http = httpx2.Client(base_url=url, timeout=PATIENCE_S * 5, trust_env=False)

    def first_token_s(self, *messages: Message) -> float:
        """Seconds until the first token of an answer to ``messages``."""
        body = {"model": "smollm2", "messages": messages, "max_tokens": 2, "stream": True}
        started = time.perf_counter()
        first = None
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            for event in server_sent_events(response):
                data = event["data"]
                if first is None and data != "[DONE]" and _text(json.loads(data)):
                    first = time.perf_counter() - started
        return time.perf_counter() - started if first is None else first


def _text(chunk: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _question() -> Message:
    return {"role": "user", "content": f"Tell me about item {next(numbers)}."}


def _common_beginning(client: Client) -> float:
    return client.first_token_s({"role": "system", "content": FACTS}, _question())


def _second_turn(client: Client, between: Callable[[Client], object] = lambda _: None) -> float:
    first = {"role": "user", "content": f"{next(numbers)}. {HISTORY}"}
    client.first_token_s(first)
    between(client)
    answer = {"role": "assistant", "content": "Yes."}
    return client.first_token_s(first, answer, _question())


def _second_turn_later(client: Client) -> float:
    other = {"role": "user", "content": f"Another {next(numbers)}. {FACTS}"}
    return _second_turn(client, lambda client: client.first_token_s(other))


SITUATIONS = {
    "a common system prompt": _common_beginning,
    "second turn": _second_turn,
    "second turn, slot taken": _second_turn_later,
}


def main() -> int:
    arguments(__doc__).parse_args()
    print(f"first token with and without the prompt cache: {describe_machine()}")
    with ExitStack() as stacks:
        clients = [
            Client(
                stacks.enter_context(
                    running_stack(locate("smollm2"), "smollm2", INFERER_CACHE_MB=megabytes)
                ).url
            )
            for megabytes in ("0", "512")
        ]
        for name, situation in SITUATIONS.items():
            pairs = alternated(
                lambda: situation(clients[0]),  # noqa: B023
                lambda: situation(clients[1]),  # noqa: B023
                PAIRS,
            )
            without, with_cache = (statistics.median(values) for values in zip(*pairs, strict=True))
            print(
                f"  {name:24} without {1000 * without:6.0f} ms   with {1000 * with_cache:6.0f} ms"
                f"   {without / with_cache:5.1f} times as fast"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
