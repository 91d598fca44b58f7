"""How soon the turns of a conversation are answered where two inferers, each with a cache of its
own, could take them: the time to the first token over HTTP, with one CPU for each inferer. Two
stacks with the real model side by side; in one of them a fixed order (``INFERER_PRIORITY``) keeps a
lone conversation at one inferer even without handover. Conversations alternate between the stacks.
Figures from before there was handover: docs/decisions/0041-handover.md.

- One conversation.
- Two at the same time, with pauses, as people make them.

    .venv/bin/python -m benchmarks.conversations
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from statistics import mean, median

from benchmarks.measuring import alternated, arguments, describe_machine
from benchmarks.peers.chat import ask
from benchmarks.prompt_cache import FACTS
from shared.cpus import own_cpus
from shared.model_files import locate
from tests.support.processes import Stack

PAIRS, TURNS, TOKENS = 4, 6, 16
PAUSE_S = 3.0
"""Between two turns, on average."""
ORDERS = ("any order", "fixed order")
numbers = count()


def main() -> int:
    arguments(__doc__).parse_args()
    print(f"conversations with two inferers: {describe_machine()}")
    with ExitStack() as stacks:
        any_order = stacks.enter_context(_stack("0", "0"))
        fixed_order = stacks.enter_context(_stack("0", "1"))
        for name, measure in (("one", _one), ("two at a time", _two)):
            pairs = alternated(_on(any_order, measure), _on(fixed_order, measure), PAIRS)
            print(f"  {name}, first token of a later turn:")
            for what, turns in zip(ORDERS, zip(*pairs, strict=True), strict=True):
                ms = [1000 * seconds for conversation in turns for seconds in conversation]
                print(f"    {what:12} mean {mean(ms):5.0f} ms, median {median(ms):5.0f} ms")
    return 0


@contextmanager
def _stack(*priorities: str) -> Iterator[Stack]:
    with (
        tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder,
        Stack(Path(folder)) as stack,
    ):
        stack.start_gateway()
        for cpu, priority in zip(own_cpus()[: len(priorities)], priorities, strict=True):
            stack.start_inferer(
                locate("smollm2"), [cpu], INFERER_ALIAS="smollm2", INFERER_PRIORITY=priority
            )
        stack.wait_until_served("smollm2", len(priorities))
        yield stack


def _on(stack: Stack, measure: Callable[[str], list[float]]) -> Callable[[], list[float]]:
    return lambda: measure(stack.url)


def _one(url: str) -> list[float]:
    return _converse(url, next(numbers), 0.0)


def _two(url: str) -> list[float]:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(_converse, url, next(numbers), PAUSE_S) for _ in range(2)]
        return [seconds for one in both for seconds in one.result()]


def _converse(url: str, number: int, pause_s: float) -> list[float]:
    """Seconds to the first token of each turn after the first."""
    pauses = random.Random(number)
    conversation = [{"role": "user", "content": f"{number}. {FACTS} Which item is heavy?"}]
    took = []
    for turn in range(TURNS):
        answer = ask(url, conversation, TOKENS)
        took.append(answer.first_token_s)
        conversation.append({"role": "assistant", "content": answer.text})
        conversation.append({"role": "user", "content": f"And of items {turn} to {turn + 9}?"})
        if turn < TURNS - 1:
            time.sleep(pauses.uniform(0, 2 * pause_s))
    return took[1:]


if __name__ == "__main__":
    sys.exit(main())
