"""The table of prices, and the answer to a query."""

import csv
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

TABLE = Path(__file__).parent / "prices.csv"

STATISTICS: dict[str, Callable[[list[int]], float]] = {
    "median": median,
    "average": mean,
    "mean": mean,
    "cheapest": min,
    "lowest": min,
    "most expensive": max,
    "highest": max,
    "how many": len,
    "number": len,
}
"""By the words that people use in questions."""

ROOMS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
SIDES = ("north", "south", "east", "west")


def answer(query: dict[str, Any]) -> float | None:
    """The answer from the table; None if it has no such flats. ``query`` has a `statistic`, the
    number of `rooms` in words and a `side`; the last two may be ``any``."""
    statistic, rooms, side = query["statistic"], query["rooms"], query["side"]
    with TABLE.open() as file:
        prices = [
            int(sale["price"])
            for sale in csv.DictReader(file)
            if (rooms == "any" or sale["rooms"] == ROOMS[rooms])
            and (side == "any" or sale["side"] == side)
        ]
    return STATISTICS[statistic](prices) if prices else None
