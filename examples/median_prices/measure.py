"""Counts how many questions in wordings.csv the model understands: python measure.py"""

import asyncio
import csv
import json
from pathlib import Path
from typing import Any

import httpx2
from ask import GATEWAY, POLL_S, read, submit
from prices import STATISTICS

WORDINGS = Path(__file__).parent / "wordings.csv"


async def main() -> None:
    with WORDINGS.open() as file:
        wordings = list(csv.DictReader(file))
    async with httpx2.AsyncClient(base_url=GATEWAY, timeout=60) as http:
        urls = await asyncio.gather(*(submit(http, wording["question"]) for wording in wordings))
        right = 0
        for wording, url in zip(wordings, urls, strict=True):
            while (status := await read(http, url))["state"] != "SUCCESS":
                await asyncio.sleep(POLL_S)
            query = json.loads(status["result"]["text"])
            understood = meaning(query) == meaning(wording)
            right += understood
            print("right" if understood else "WRONG", wording["question"], query, flush=True)
    print(f"{right} of {len(wordings)}")


def meaning(query: dict[str, Any]) -> tuple[Any, ...]:
    """The meaning of a query: equal for words that mean the same."""
    return STATISTICS[query["statistic"]], query["rooms"], query["side"]


if __name__ == "__main__":
    asyncio.run(main())
