"""Beside Celery with Redis, both with the real model: 2, 3 and 8 jobs that are submitted at the
same moment, until the last has ended, and until they have ended on average. All per token of their
answers, whose lengths may differ by rounding. Each round has prompts of its own, so that only their
first words are in a cache: llama-cpp-python keeps the last prompt of each process. Sluice also
guesses tokens from earlier answers, as it does by default.

    .venv/bin/python -m benchmarks.peers.jobs [--pairs N] [--concurrency 1 4 auto]

``--concurrency`` lists the values of INFERER_CONCURRENCY that take part with one inferer. Two
inferers with one job at a time each, and half of the CPUs, always do.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean

import nats

from benchmarks.measuring import describe_machine, in_turn, running_stack
from benchmarks.peers.comparison import Metric, row
from benchmarks.peers.environment import (
    N_CTX,
    PYTHON,
    Client,
    celery,
    celery_worker,
    has_amx,
    machine,
    redis,
    require,
    versions,
)
from benchmarks.peers.publish import command_line, comparison_arguments, publish
from benchmarks.peers.sluice_client import complete
from services.inferer.settings import InfererSettings
from shared.model_files import locate

PAIRS, TOKENS = 4, 64
JOBS = (2, 3, 8)
INFERERS = 2
CELERY = (1, 2, 4)
"""Values of its ``--concurrency``."""
PROMPT = (
    "The history since {} of {}, from the beginning until today, in several chapters. Chapter 1:"
)
FIRST_YEAR = 1000
PLACES = ["France", "Norway", "Peru", "Kenya", "Japan", "Iceland", "Chile", "Egypt"]
"""One prompt each and year, whose most probable answers are long."""

SETTINGS = {"INFERER_N_CTX": str(N_CTX), "INFERER_CACHE_MB": str(InfererSettings().cache_mb)}

ONE_SLOT = {False: 0.97, True: 0.87}
SHARED = {False: {2: 0.72, 3: 0.62, 8: 0.55}, True: {2: 0.85, 3: 0.75, 8: 0.62}}
"""Goals, without AMX and with it: total time against Celery's, by the number of jobs."""

End = tuple[float, int, int]
"""Of a job: the seconds since the first was submitted, the tokens of its prompt and its answer."""
Run = Callable[[list[str]], list[End]]


def main() -> int:
    parser = comparison_arguments(__doc__, PAIRS)
    parser.add_argument("--concurrency", nargs="+", default=["1", "4"], metavar="N")
    options = parser.parse_args()
    require(PYTHON, "redis-server")
    print(f"jobs: {describe_machine()}")
    facts, path = machine(), locate("smollm2")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sluice-bench-")))
        subjects: dict[str, Run] = {}
        for concurrency in CELERY:
            _, url = stack.enter_context(redis(folder / f"redis-{concurrency}"))
            stack.enter_context(celery(folder, url, concurrency, path))
            client = stack.enter_context(Client("celery_client", {"PEERS_REDIS": url}))
            subjects[_celery(concurrency)] = partial(_run_celery, client)
        for value in options.concurrency:
            environment = {"INFERER_CONCURRENCY": value, **SETTINGS}
            sluice = stack.enter_context(running_stack(path, "smollm2", 1, **environment))
            subjects[_sluice(value)] = partial(_run_sluice, sluice.nats.url)
        sluice = stack.enter_context(running_stack(path, "smollm2", INFERERS, **SETTINGS))
        subjects[f"Sluice, {INFERERS} inferers"] = partial(_run_sluice, sluice.nats.url)
        _warm_up(subjects)
        metrics = _measure(subjects, options)
    publish(
        options.to,
        "jobs",
        "Beside Celery: jobs that are submitted together, SmolLM2-135M-Instruct Q4_1",
        _celery(1),
        metrics,
        facts,
        versions("llama.cpp", "llama_cpp_python", "celery", "redis", "redis-server", "nats-server"),
        {
            "Celery": command_line(celery_worker(1)),
            "threads of each of Celery's processes": "usable CPUs / concurrency, at least 1",
            "Sluice": f"INFERER_CONCURRENCY={' and '.join(options.concurrency)} "
            + " ".join(f"{name}={value}" for name, value in SETTINGS.items()),
            "rounds": str(options.pairs),
            "answers": f"{TOKENS} tokens at most, temperature 0",
        },
    )
    return 0


def _measure(subjects: dict[str, Run], options: argparse.Namespace) -> list[Metric]:
    last = Metric("Until the last job has ended", "ms per token", False)
    average = Metric("Until a job has ended, on average", "ms per token", False)
    amx = has_amx()
    years = {name: count(FIRST_YEAR + 1) for name in subjects}
    for jobs in JOBS:
        measures = {
            name: partial(_per_token, run, jobs, years[name]) for name, run in subjects.items()
        }
        rounds = in_turn(measures, options.pairs)
        wanted = {
            _sluice(value): ONE_SLOT[amx] if value == "1" else SHARED[amx][jobs]
            for value in options.concurrency
        }
        last.rows.append(row(f"{jobs} jobs", rounds, lambda figures: figures[0], wanted))
        average.rows.append(row(f"{jobs} jobs", rounds, lambda figures: figures[1]))
    return [last, average]


def _warm_up(subjects: dict[str, Run]) -> None:
    """And make sure that all compute the same prompts."""
    prompts = {}
    for name, run in subjects.items():
        ends = run(_prompts(max(JOBS), FIRST_YEAR))
        prompts[name] = sorted(tokens for _, tokens, _ in ends)
    if len(set(map(tuple, prompts.values()))) > 1:
        raise RuntimeError(f"not the same tokens in the prompts: {prompts}")


def _celery(concurrency: int) -> str:
    return f"Celery, concurrency {concurrency}"


def _sluice(concurrency: str) -> str:
    return f"Sluice, concurrency {concurrency}"


def _prompts(jobs: int, year: int) -> list[str]:
    return [PROMPT.format(year, place) for place in PLACES[:jobs]]


def _per_token(run: Run, jobs: int, years: Iterator[int]) -> tuple[float, float]:
    """Milliseconds until the last end, and until an end on average, for each token of all answers
    together."""
    ends = run(_prompts(jobs, next(years)))
    tokens = sum(completion for _, _, completion in ends)
    seconds = [ended for ended, _, _ in ends]
    return 1000 * max(seconds) / tokens, 1000 * mean(seconds) / tokens


def _run_celery(client: Client, prompts: list[str]) -> list[End]:
    return [tuple(end) for end in client.ask("complete", prompts=prompts, max_tokens=TOKENS)]


def _run_sluice(url: str, prompts: list[str]) -> list[End]:
    return asyncio.run(_complete(url, prompts))


async def _complete(url: str, prompts: list[str]) -> list[End]:
    async with await nats.connect(url) as client:
        started = time.perf_counter()

        async def one(prompt: str) -> End:
            answer = await complete(client, prompt=prompt, max_tokens=TOKENS, temperature=0)
            ended = time.perf_counter()
            usage = answer["usage"]
            return ended - started, usage["prompt_tokens"], usage["completion_tokens"]

        return await asyncio.gather(*(one(prompt) for prompt in prompts))


if __name__ == "__main__":
    sys.exit(main())
