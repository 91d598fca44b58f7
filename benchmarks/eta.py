"""How honest the estimate is: the real model, jobs of mixed length that arrive at random at 80 % of
what the inferers can do, and each job's ETA at its submission beside the time it really took.

After 20 warm-up jobs, five seeds of 40 jobs each, once with one inferer and once with two. Only
jobs that waited count: those that came while every slot was busy. The true time is counted, like
the ETA, from the response with the ETA to the job's end.

    .venv/bin/python -m benchmarks.eta [TRACE.jsonl]
"""

import asyncio
import json
import random
import statistics
import sys
import time
from typing import Any

import httpx

from benchmarks.measuring import describe_machine, running_stack, spread
from shared.model_files import locate
from shared.timestamps import milliseconds_between, parse_timestamp

SEEDS, JOBS, WARM_UP, LOAD = 5, 40, 20, 0.8
WAITED_MS = 50.0
CACHE_MB = "512"
"""As by default."""
ALLOWED_ERROR, COVERAGE = 0.20, (0.80, 0.97)

ARTICLE = (
    "A lighthouse is a tower with a bright light at the top, built at an important or dangerous "
    "place on a coast. Keepers used to live in it and to trim its lamp; today nearly all of them "
    "work by themselves. The oldest ones burned wood or coal in the open air. "
) * 4

KINDS: list[tuple[str, int]] = [
    ("Answer with one word: what is the capital of {}?", 32),
    ("Name three things that are typical of {}.", 64),
    ("Write two sentences about {}.", 96),
    ("Tell a story that takes place in {}.", 160),
    (ARTICLE + "What has this text to do with {}? Answer briefly.", 48),
]
PLACES = ["France", "Norway", "Peru", "Kenya", "Japan", "Iceland", "Chile", "Egypt", "Canada"]


def main() -> int:
    print(f"honesty of the ETA: {describe_machine()}")
    passed, trace = True, []
    for inferers in (1, 2):
        with running_stack(
            locate("smollm2"), "smollm2", inferers, INFERER_CACHE_MB=CACHE_MB
        ) as stack:
            jobs = asyncio.run(_measure(stack.url, inferers))
        trace += jobs
        waited = [job for job in jobs if job["queued_s"] * 1000 > WAITED_MS]
        known = [job for job in waited if job["eta"] is not None]
        silent = len(waited) - len(known)
        errors = [abs(job["eta"]["p50_s"] - job["true_s"]) / job["true_s"] for job in known]
        covered = statistics.mean(job["true_s"] <= job["eta"]["p90_s"] for job in known)
        error = statistics.median(errors)
        passed = (
            passed
            and not silent
            and error <= ALLOWED_ERROR
            and COVERAGE[0] <= covered <= COVERAGE[1]
        )
        print(f"  {inferers} inferer(s), {len(jobs)} jobs, of which {len(waited)} waited:")
        print(f"    without an ETA {silent}")
        print(f"    true time      {spread([job['true_s'] for job in waited])} s")
        print(f"    error of p50   {spread(errors)} of the true time (allowed: {ALLOWED_ERROR})")
        print(f"    p90 covers     {covered:.0%} (allowed: {COVERAGE[0]:.0%} to {COVERAGE[1]:.0%})")
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:  # noqa: PTH123
            file.writelines(json.dumps(job) + "\n" for job in trace)
    return 0 if passed else 1


async def _measure(url: str, inferers: int) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:
        warm_up = [await _finished(http, await _submit(http, job)) for job in _jobs(0, WARM_UP)]
        service_s = statistics.mean(job["service_s"] for job in warm_up)
        found = []
        for seed in range(1, SEEDS + 1):
            arrivals = random.Random(seed)
            running = []
            for body in _jobs(seed, JOBS):
                running.append(asyncio.create_task(_one(http, body)))
                await asyncio.sleep(arrivals.expovariate(LOAD * inferers / service_s))
            found += await asyncio.gather(*running)
        return found


def _jobs(seed: int, count: int) -> list[dict[str, Any]]:
    """Bodies of jobs of all kinds, the same for the same seed."""
    dice = random.Random(1000 + seed)
    bodies = []
    for _ in range(count):
        prompt, max_tokens = dice.choice(KINDS)
        content = prompt.format(dice.choice(PLACES))
        message = {"role": "user", "content": content}
        bodies.append(
            {"messages": [message], "max_tokens": max_tokens, "seed": dice.getrandbits(31)}
        )
    return bodies


async def _one(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """A job's ETA right after it was accepted, and what became of it."""
    job_id = await _submit(http, body)
    asked_at = time.time()
    status = (await http.get(f"/status/{job_id}")).json()
    ended = await _finished(http, job_id)
    true_s = max(ended.pop("finished") - asked_at, 0.001)
    early = {"eta": status.get("eta"), "position": status.get("position")}
    return {**ended, **early, "true_s": true_s, "max_tokens": body["max_tokens"]}


async def _submit(http: httpx.AsyncClient, body: dict[str, Any]) -> str:
    answer = await http.post("/jobs", json=body)
    answer.raise_for_status()
    return str(answer.json()["id"])


async def _finished(http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async with http.stream("GET", f"/jobs/{job_id}/events") as events:
        async for _ in events.aiter_lines():
            pass
    status = (await http.get(f"/status/{job_id}")).json()
    if status["state"] != "SUCCESS":
        raise RuntimeError(f"a job failed: {status}")
    return {
        "id": job_id,
        "inferer": status["inferer"],
        "usage": status["result"]["usage"],
        "queued_s": milliseconds_between(status["queued_at"], status["started_at"]) / 1000,
        "service_s": milliseconds_between(status["started_at"], status["finished_at"]) / 1000,
        "finished": parse_timestamp(status["finished_at"]).timestamp(),
    }


if __name__ == "__main__":
    sys.exit(main())
