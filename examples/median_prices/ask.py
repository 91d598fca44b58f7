"""Answers questions about prices, all of which wait in the queue together:

python ask.py "median price of three-room flats in the north" "how many flats are in the west?"

SLUICE_URL is the URL of the gateway, by default http://127.0.0.1:5001."""

import asyncio
import json
import os
import sys
from typing import Any

import httpx2
from prices import answer
from questions import MAX_TOKENS, QUESTIONS, SCHEMA, prompt

GATEWAY = os.environ.get("SLUICE_URL", "http://127.0.0.1:5001")
POLL_S = 0.5


async def main(questions: list[str]) -> int:
    async with httpx2.AsyncClient(base_url=GATEWAY, timeout=60) as http:
        try:
            # One after another, so that they are answered in this order.
            jobs = [(question, await submit(http, question)) for question in questions]
            answered = await asyncio.gather(*(follow(http, *job) for job in jobs))
        except httpx2.HTTPStatusError as error:
            print(f"{GATEWAY} returned an error: {error.response.text}", file=sys.stderr)
            return 1
        except httpx2.TransportError as error:
            print(f"no answer from {GATEWAY}: {error}", file=sys.stderr)
            return 1
    return 0 if all(answered) else 1


async def follow(http: httpx2.AsyncClient, question: str, status_url: str) -> bool:
    """Print the place in the queue whenever it changes, then the answer. False if the job fails."""
    shown = None
    while (status := await read(http, status_url))["state"] in ("PENDING", "STARTED", "RETRY"):
        if (line := waiting(status)) != shown:
            print(f"{question}  {line}", flush=True)
            shown = line
        await asyncio.sleep(POLL_S)
    if status["state"] != "SUCCESS":
        print(f"{question}  {status['state']}: {status['error']['message']}", flush=True)
        return False
    query = json.loads(status["result"]["text"])
    found = answer(query)
    print(f"{question}  {'no such flats' if found is None else f'{found:,.0f}'}  {query}")
    return True


async def submit(http: httpx2.AsyncClient, question: str) -> str:
    """Submit a job, which survives this program, and return the URL of its status."""
    job = {
        "prompt": prompt(question),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        "metadata": {"question": question},
    }
    response = await http.post("/jobs", json=job)
    response.raise_for_status()
    return str(response.json()["status_url"])


async def read(http: httpx2.AsyncClient, status_url: str) -> dict[str, Any]:
    response = await http.get(status_url)
    response.raise_for_status()
    status: dict[str, Any] = response.json()
    return status


def waiting(status: dict[str, Any]) -> str:
    """A job's place in the queue, and when it should be done, or why it cannot start."""
    if reason := status.get("blocked_reason"):
        return str(reason)
    if status["state"] == "STARTED":
        where = "running"
    else:
        where = f"{ahead} ahead" if (ahead := status.get("position")) else "next to run"
    eta = status.get("eta")  # missing while the model's speed is not known
    return f"{where}, done in about {eta['p50_s']:.0f} s" if eta else where


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:] or QUESTIONS)))
