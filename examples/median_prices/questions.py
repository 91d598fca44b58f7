"""How a model turns a question into a query: the schema of queries, and the prompt."""

import json
import re
from typing import Any

from prices import ROOMS, SIDES, STATISTICS

QUESTIONS = [
    "What is the median price of three-room flats in the north?",
    "How many two-room flats are there in the west?",
]
"""The questions that are asked by default."""

SCHEMA = {
    "type": "object",
    "properties": {
        "statistic": {"enum": list(STATISTICS)},
        "rooms": {"enum": [*ROOMS, "any"]},
        "side": {"enum": [*SIDES, "any"]},
    },
    "required": ["statistic", "rooms", "side"],
}
"""Small models are good at copying and bad at translating. So the values are words that appear in
the questions, in the usual order."""

EXAMPLES = [
    ("What is the median price of two-room flats in the south?", "median", "two", "south"),
    ("Median price of flats with five rooms in the north", "median", "five", "north"),
    ("What do two-room flats in the east cost on average?", "average", "two", "east"),
    ("Cheapest flat with two rooms in the north", "cheapest", "two", "north"),
    ("Lowest price of a four-room flat in the west", "lowest", "four", "west"),
    ("The most expensive one-room flat in the east", "most expensive", "one", "east"),
    ("The highest price of a flat with three rooms in the west", "highest", "three", "west"),
    ("How many four-room flats are there in the east?", "how many", "four", "east"),
    ("Median price of four-room flats", "median", "four", "any"),
    ("Average price of a five-room flat", "average", "five", "any"),
    ("What does the cheapest one-room flat cost?", "cheapest", "one", "any"),
    ("What is the lowest price of a five-room flat?", "lowest", "five", "any"),
    ("How many three-room flats are there?", "how many", "three", "any"),
    ("Median price of flats in the north", "median", "any", "north"),
    ("The average price of flats in the west", "average", "any", "west"),
    ("Which is the cheapest flat in the west?", "cheapest", "any", "west"),
    ("What is the most expensive flat in the south?", "most expensive", "any", "south"),
    ("How many flats are there in the east?", "how many", "any", "east"),
    ("The number of flats in the west", "number", "any", "west"),
    ("What is the highest price in the east?", "highest", "any", "east"),
    ("What is the mean price of all flats?", "mean", "any", "any"),
    ("What is the highest price of all?", "highest", "any", "any"),
]
SHOWN = 10
"""How many of the examples are in a prompt."""
MAX_TOKENS = 50
"""More than any query needs."""


def prompt(question: str) -> str:
    """The question, after the examples that share the most words with it. The most similar example
    comes last, where it has the most influence."""
    asked = _words(question)

    def similarity(example: tuple[str, ...]) -> float:
        words = _words(example[0])
        return len(asked & words) / len(asked | words)

    shown = sorted(EXAMPLES, key=similarity)[-SHOWN:]
    parts = [f"{example}\n{json.dumps(_query(*values))}\n\n" for example, *values in shown]
    return "".join(parts) + question + "\n"


def _query(statistic: str, rooms: str, side: str) -> dict[str, Any]:
    return {"statistic": statistic, "rooms": rooms, "side": side}


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
