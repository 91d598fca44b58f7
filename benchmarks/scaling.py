"""What a second inferer brings: twenty equal jobs through one inferer on one core, and through two
on a core each; beside the same two processes with nothing between them and llama.cpp.

Medians of alternated pairs, in one run. Which of the inferers work is set with `PUT /concurrency`,
so both live through the whole run.

    .venv/bin/python -m benchmarks.scaling
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median

from benchmarks.measuring import (
    BareLoop,
    alternated,
    arguments,
    describe_machine,
    running_stack,
    seconds,
    spread,
)
from shared.cpus import own_cpus
from shared.model_files import locate
from shared.wire.requests import Sampling
from tests.support.processes import Stack, clean_environment, scripts

JOBS, TOKENS, PAIRS = 20, 32, 7
PROMPT, OPTIONS, SEED = "The history of the lighthouse began", Sampling(temperature=0.8), 1
WANTED = 1.8
TOO_MANY_EXIT_STATUS = 2


def main() -> int:
    arguments(__doc__).parse_args()
    print(f"scaling: {describe_machine()}")
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(cpu)) for cpu in own_cpus()[:2]]
        bare = _pairs(lambda: workers[0].run(JOBS), lambda: _together(workers))
    with running_stack(locate("smollm2"), "smollm2", inferers=2) as sluice:
        through = _pairs(lambda: _run(sluice, 1), lambda: _run(sluice, 2))
    for name, pairs in (("no broker", bare), ("Sluice", through)):
        one, two = ([JOBS / pair[number] for pair in pairs] for number in (0, 1))
        ratios = [first / second for first, second in pairs]
        print(f"  {name}:")
        print(f"    one process    {spread(one)} jobs/s")
        print(f"    two processes  {spread(two)} jobs/s")
        print(f"    ratio          {spread(ratios)} over {len(pairs)} pairs")
    gain = median(first / second for first, second in through)
    print(f"  a second inferer brings {gain:.2f} times the throughput (wanted: {WANTED})")
    refused = _too_many()
    return 0 if gain >= WANTED and refused else 1


def _pairs(one: Callable[[], float], two: Callable[[], float]) -> list[tuple[float, float]]:
    alternated(one, two, 1)
    return alternated(one, two, PAIRS)


def _run(stack: Stack, inferers: int) -> float:
    """Seconds for all jobs; the second inferer takes none when ``inferers`` is 1."""
    order = {"inferer": "inferer-1", "concurrency": inferers - 1}
    stack.http.put("/concurrency", json=order).raise_for_status()
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "seed": SEED, "temperature": 0.8}

    def ask() -> None:
        answer = stack.http.post("/jobs", json=body, headers={"prefer": "wait=600"})
        if answer.json()["state"] != "SUCCESS":
            raise RuntimeError(answer.text)

    with ThreadPoolExecutor(JOBS) as clients:
        return seconds(lambda: [job.result() for job in [clients.submit(ask) for _ in range(JOBS)]])


class _Worker:
    """A process of its own on one core that runs the jobs as fast as llama.cpp can."""

    def __init__(self, cpu: int) -> None:
        self._process = subprocess.Popen(
            ["taskset", "-c", str(cpu), sys.executable, "-m", "benchmarks.scaling", "worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("")

    def start(self, jobs: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{jobs}\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError("a worker died")

    def run(self, jobs: int) -> float:
        def work() -> None:
            self.start(jobs)
            self.wait()

        return seconds(work)


def _together(workers: list[_Worker]) -> float:
    def work() -> None:
        for worker in workers:
            worker.start(JOBS // len(workers))
        for worker in workers:
            worker.wait()

    return seconds(work)


def _work() -> int:
    """The worker's side: a number of jobs on a line, ``done`` when they are."""
    loop = BareLoop(locate("smollm2"), threads=1)
    for line in sys.stdin:
        for _ in range(int(line)):
            loop.run(PROMPT, OPTIONS, SEED, TOKENS)
        print("done", flush=True)
    loop.close()
    return 0


def _too_many() -> bool:
    """Whether `sluice up` refuses more inferers than there are cores."""
    wanted = len(own_cpus()) + 1
    refused = subprocess.run(
        [str(scripts() / "sluice"), "up", "--inferers", str(wanted), "--port", "0"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(f"  {wanted} inferers: {refused.stderr.strip()}")
    return refused.returncode == TOO_MANY_EXIT_STATUS


if __name__ == "__main__":
    sys.exit(_work() if sys.argv[1:] == ["worker"] else main())
