"""What clients come for: made from the seed before anything starts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

WORDS = ("rain", "harbour", "lighthouse", "winter", "copper", "orchard", "signal", "thread")

KINDS = {
    "waits": 20,  # for the answer, with Prefer: wait
    "reads": 25,  # the job's events, and takes them up again where they broke off
    "polls": 12,  # /status
    "repeats": 8,  # its submit, with an Idempotency-Key
    "completes": 6,  # in OpenAI's words
    "asks": 8,  # over NATS
    "cancels": 9,  # after a moment
    "hurries": 6,  # with a short deadline
    "leaves": 3,  # hangs up while it waits
    "asks_too_much": 3,  # a prompt longer than the context
}
"""How many in a hundred."""

BEGINNINGS = tuple(f"The {word} and the " + "rain on the copper roof, " * 20 for word in WORDS[:3])
"""Common prefixes of some prompts, long enough for a handover."""

LENGTHS = {3: 25, 20: 26, 60: 22, 150: 11, 600: 10, 1200: 6}
"""Most tokens of an answer, and how many jobs in a hundred ask for so many."""

POISONED = "poisons"
"""The kind of a job that kills every inferer that runs it; it comes with a fault, not of itself."""

EXPECTED_FAILURES = ("prompt_too_long", "out_of_memory", "worker_lost")
"""What may become of these jobs besides an answer: three inferers lost, or three without memory."""


@dataclass(frozen=True)
class Errand:
    """One job that one client wants done, and how it goes about it."""

    number: int
    kind: str
    starts_at_s: float
    body: dict[str, Any]
    random: Random = field(compare=False, repr=False)


def errands(seed: int, count: int, duration_s: float) -> Iterator[Errand]:
    """``count`` errands, evenly spread over ``duration_s``; every kind is among the first."""
    random = Random(f"{seed}/errands")
    first = list(KINDS) * (count >= len(KINDS))
    kinds = first + random.choices(list(KINDS), list(KINDS.values()), k=count - len(first))
    for number, kind in enumerate(kinds):
        own = Random(f"{seed}/errands/{number}")
        yield Errand(number, kind, number * duration_s / count, _body(number, kind, own), own)


def _body(number: int, kind: str, random: Random) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": random.choices(list(LENGTHS), list(LENGTHS.values()))[0],
        "priority": random.choice(("high", "normal", "normal", "low")),
        "metadata": {"errand": number},
    }
    prompt = " ".join(random.choices(WORDS, k=random.randint(1, 60)))
    if kind == "hurries":
        body["timeout_s"] = round(random.uniform(0.2, 4), 1)
    if kind == "asks_too_much":
        prompt, body["max_tokens"] = "a b c d e " * 1_000, 3
    if random.random() < 0.3:
        prompt = random.choice(BEGINNINGS) + prompt
    if random.random() < 0.5:
        return body | {"prompt": prompt}
    return body | {"messages": [{"role": "user", "content": prompt}]}
