"""How accurate the ETA is: the real model, jobs of mixed length that arrive at random at 80 % of
what the inferers can do, and each job's ETA at its submission beside the time it really took.

Each situation is measured by itself, after a warm-up: several seeds of 40 jobs, three unless
``--seeds`` says otherwise. With three, the share of jobs that p90 covers has a standard error of
about four points, whatever the estimate is worth. Only jobs that waited count: those that came
while every slot was busy. The true time is counted, like the ETA, from the response with the ETA to
the job's end. It is compared with the simplest estimate: one more than the position, times the
median duration of a job so far, divided by the slots. Where jobs run strictly one after another, it
is also compared with an estimate that nobody can make: it knows how many tokens each answer will
have, and the average speed of the whole run. What it misses is mostly how the speed of the machine
varied.

    .venv/bin/python -m benchmarks.eta [--seeds N] [SITUATION ...]
"""

import asyncio
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy

from benchmarks.measuring import arguments, describe_machine, running_stack, spread
from shared.model_files import locate
from shared.timestamps import milliseconds_between, parse_timestamp

SEEDS, JOBS, WARM_UP, LOAD = 3, 40, 24, 0.8
WAITED_MS = 50.0
ALLOWED_ERROR, COVERAGE = 0.07, (0.85, 0.95)


@dataclass(frozen=True)
class Situation:
    """Inferers, and the jobs that they get."""

    inferers: int = 1
    slots: int = 1
    """Of each inferer; with ``auto``, the most that it opens."""
    environment: dict[str, str] = field(default_factory=dict)
    priorities: tuple[str, ...] = ("normal",)
    shared_prompt: str = ""
    """Before every prompt."""

    @property
    def is_in_turn(self) -> bool:
        """Whether jobs run one after another, in the order in which they came."""
        return self.inferers == self.slots == len(self.priorities) == 1


ARTICLE = (
    "A lighthouse is a tower with a bright light at the top, built at an important or dangerous "
    "place on a coast. Keepers used to live in it and to trim its lamp; today nearly all of them "
    "work by themselves. The oldest ones burned wood or coal in the open air. "
) * 4

SITUATIONS = {
    "1 slot": Situation(),
    "2 inferers": Situation(inferers=2),
    "2 slots": Situation(slots=2, environment={"INFERER_CONCURRENCY": "2"}),
    "4 slots": Situation(slots=4, environment={"INFERER_CONCURRENCY": "4"}),
    "auto": Situation(slots=8, environment={"INFERER_CONCURRENCY": "auto"}),
    "priorities": Situation(priorities=("high", "normal", "normal", "low")),
    "cached prompts": Situation(environment={"INFERER_CACHE_MB": "512"}, shared_prompt=ARTICLE),
}

KINDS: list[tuple[str, int]] = [
    ("Answer with one word: what is the capital of {}?", 32),
    ("Name three things that are typical of {}.", 64),
    ("Write two sentences about {}.", 96),
    ("Tell a story that takes place in {}.", 160),
    (ARTICLE + "What has this text to do with {}? Answer briefly.", 48),
]
PLACES = ["France", "Norway", "Peru", "Kenya", "Japan", "Iceland", "Chile", "Egypt", "Canada"]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("situations", nargs="*", metavar="SITUATION")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N")
    options = parser.parse_args()
    chosen = options.situations or list(SITUATIONS)
    if unknown := [name for name in chosen if name not in SITUATIONS]:
        parser.error(f"no situation {unknown[0]!r}; there are: {', '.join(SITUATIONS)}")
    print(f"accuracy of the ETA: {describe_machine()}")
    print(f"allowed: a median error of p50 of {ALLOWED_ERROR:.0%}, p90 covers 85 to 95 %")
    passed = [_is_accurate(name, SITUATIONS[name], options.seeds) for name in chosen]
    return 0 if all(passed) else 1


def _is_accurate(name: str, situation: Situation, seeds: int) -> bool:
    with running_stack(
        locate("smollm2"), "smollm2", situation.inferers, **situation.environment
    ) as stack:
        jobs = asyncio.run(_measure(stack.url, situation, seeds))
    waited = [job for job in jobs if job["queued_s"] * 1000 > WAITED_MS]
    known = [job for job in waited if job["eta"] is not None]
    silent = len(waited) - len(known)
    errors = [_error(job["eta"]["p50_s"], job) for job in known]
    is_early = statistics.mean(job["eta"]["p50_s"] < job["true_s"] for job in known)
    plain = [_error(job["plain_s"], job) for job in known]
    covered = statistics.mean(job["true_s"] <= job["eta"]["p90_s"] for job in known)
    print(f"  {name}: {len(jobs)} jobs, of which {len(waited)} waited, {silent} without an ETA")
    print(f"    true time               {spread([job['true_s'] for job in waited])} s")
    print(f"    error of p50            {spread(errors)} of the true time")
    print(f"    p50 was too early for   {is_early:.0%}")
    print(f"    error of the simple one {spread(plain)}")
    if situation.is_in_turn:
        print(f"    error with hindsight    {spread(_errors_with_hindsight(jobs, waited))}")
    sampling_error = math.sqrt(covered * (1 - covered) / len(known))
    print(f"    p90 covers              {covered:.0%}, ± {sampling_error:.0%}", flush=True)
    return not silent and (
        statistics.median(errors) <= ALLOWED_ERROR and COVERAGE[0] <= covered <= COVERAGE[1]
    )


def _error(estimate_s: float, job: dict[str, Any]) -> float:
    return abs(estimate_s - float(job["true_s"])) / float(job["true_s"])


def _errors_with_hindsight(jobs: list[dict[str, Any]], waited: list[dict[str, Any]]) -> list[float]:
    """Those of the waiting jobs if each job's duration were known, but for the changes of speed."""
    work = numpy.array([[1, job["computed_tokens"], job["completion_tokens"]] for job in jobs])
    took = numpy.array([job["service_s"] for job in jobs])
    costs = work @ numpy.linalg.lstsq(work, took, rcond=None)[0]
    costed = list(zip(jobs, map(float, costs), strict=True))

    def estimate(job: dict[str, Any]) -> float:
        left_s = 0.0
        for one, cost_s in costed:
            if one["started"] <= job["started"] and one["finished"] > job["asked_at"]:
                left_s += max(cost_s - max(job["asked_at"] - one["started"], 0.0), 0.0)
        return left_s

    return [_error(estimate(job), job) for job in waited]


async def _measure(url: str, situation: Situation, seeds: int) -> list[dict[str, Any]]:
    slots = situation.slots * situation.inferers
    async with httpx2.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:
        ended: list[float] = []
        """The durations of the jobs that have ended."""
        # Twice: in the first round slots may still open.
        for seed in (100, 101):
            began = time.monotonic()
            everyone = [_one(http, body, slots, ended) for body in _jobs(situation, seed, WARM_UP)]
            await asyncio.gather(*everyone)
            jobs_per_s = WARM_UP / (time.monotonic() - began)
        found = []
        for seed in range(seeds):
            arrivals = random.Random(seed)
            running = []
            for body in _jobs(situation, seed, JOBS):
                running.append(asyncio.create_task(_one(http, body, slots, ended)))
                await asyncio.sleep(arrivals.expovariate(LOAD * jobs_per_s))
            found += await asyncio.gather(*running)
        return found


def _jobs(situation: Situation, seed: int, count: int) -> list[dict[str, Any]]:
    """Bodies of jobs of all kinds, the same for the same seed."""
    dice = random.Random(1000 + seed)
    bodies = []
    for _ in range(count):
        prompt, max_tokens = dice.choice(KINDS)
        content = situation.shared_prompt + prompt.format(dice.choice(PLACES))
        bodies.append(
            {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": max_tokens,
                "seed": dice.getrandbits(31),
                "priority": dice.choice(situation.priorities),
            }
        )
    return bodies


async def _one(
    http: httpx2.AsyncClient, body: dict[str, Any], slots: int, ended: list[float]
) -> dict[str, Any]:
    """A job's ETA right after it was accepted, and what became of it."""
    answer = await http.post("/jobs", json=body)
    answer.raise_for_status()
    job_id = str(answer.json()["id"])
    asked_at = time.time()
    status = (await http.get(f"/status/{job_id}")).json()
    usual_s = statistics.median(ended) if ended else 0.0
    job = await _finished(http, job_id)
    ended.append(job["service_s"])
    return {
        **job,
        "asked_at": asked_at,
        "eta": status.get("eta"),
        "plain_s": (status.get("position", 0) + 1) * usual_s / slots,
        "true_s": max(job["finished"] - asked_at, 0.001),
    }


async def _finished(http: httpx2.AsyncClient, job_id: str) -> dict[str, Any]:
    async with http.stream("GET", f"/jobs/{job_id}/events") as events:
        async for _ in events.aiter_lines():
            pass
    status = (await http.get(f"/status/{job_id}")).json()
    if status["state"] != "SUCCESS":
        raise RuntimeError(f"a job failed: {status}")
    usage = status["result"]["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "computed_tokens": usage["prompt_tokens"] - cached,
        "completion_tokens": usage["completion_tokens"],
        "started": parse_timestamp(status["started_at"]).timestamp(),
        "queued_s": milliseconds_between(status["queued_at"], status["started_at"]) / 1000,
        "service_s": milliseconds_between(status["started_at"], status["finished_at"]) / 1000,
        "finished": parse_timestamp(status["finished_at"]).timestamp(),
    }


if __name__ == "__main__":
    sys.exit(main())
