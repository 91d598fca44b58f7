"""Tokens per second of one stream through the whole pipeline, as a ratio to the bare loop over
llama.cpp: once when nobody reads the stream, once with a reader over server-sent events.

Every run generates the same tokens from the same seed, none of which ends the text, so all
subjects do the same work. The position of a process in memory affects its speed by a few percent,
so the pairs are spread over several starts of both. Medians of alternated
pairs, in one run.

    .venv/bin/python -m benchmarks.throughput [STARTS]
"""

import json
import statistics
import sys
import urllib.request
from pathlib import Path

from benchmarks.measuring import (
    BareLoop,
    alternated,
    arguments,
    describe_machine,
    running_stack,
    seconds,
    spread,
)
from shared.model_files import locate
from shared.wire.requests import Sampling
from tests.support.processes import Stack

STARTS, PAIRS = 6, 4
TOKENS = 384
PROMPT = "The history of the lighthouse began"
OPTIONS = Sampling(temperature=0.8)
WANTED = {"nobody reads": 0.97, "a reader": 0.92}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("starts", nargs="?", type=int, default=STARTS, metavar="STARTS")
    starts = parser.parse_args().starts
    print(f"throughput of one stream: {describe_machine()}")
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in WANTED}
    seed: int | None = None
    for _ in range(starts):
        path = locate("smollm2")
        bare = BareLoop(path)
        seed = seed or _endless_seed(bare)
        for name, pairs in _one_start(path, bare, seed).items():
            figures[name] += pairs
        bare.close()
    passed = True
    for name, pairs in figures.items():
        ratios = [through / directly for directly, through in pairs]
        passed = passed and statistics.median(ratios) >= WANTED[name]
        print(f"  {name}:")
        print(f"    bare loop     {spread([pair[0] for pair in pairs])} tokens/s")
        print(f"    pipeline      {spread([pair[1] for pair in pairs])} tokens/s")
        print(
            f"    ratio         {spread(ratios)} over {len(pairs)} pairs, {starts} starts "
            f"(wanted: {WANTED[name]})"
        )
    return 0 if passed else 1


def _one_start(path: Path, bare: BareLoop, seed: int) -> dict[str, list[tuple[float, float]]]:
    with running_stack(path, "smollm2") as stack:

        def alone() -> float:
            return TOKENS / seconds(lambda: bare.run(PROMPT, OPTIONS, seed, TOKENS))

        def unread() -> float:
            return TOKENS / seconds(lambda: _unread(stack, seed))

        def read() -> float:
            return TOKENS / seconds(lambda: _read(stack, seed))

        alternated(alone, unread, 1)
        ways = dict(zip(WANTED, (unread, read), strict=True))
        return {name: alternated(alone, way, PAIRS) for name, way in ways.items()}


def _endless_seed(bare: BareLoop) -> int:
    """A seed with which the model does not end its text too early."""
    for seed in range(1, 100):
        if bare.run(PROMPT, OPTIONS, seed, TOKENS) == TOKENS:
            return seed
    raise RuntimeError("no seed gives a text that is long enough")


def _body(seed: int) -> dict[str, object]:
    return {
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "seed": seed,
        "temperature": OPTIONS.temperature,
    }


def _unread(stack: Stack, seed: int) -> None:
    answer = stack.http.post("/jobs", json=_body(seed), headers={"prefer": "wait=600"})
    _check(answer.json()["result"]["usage"]["completion_tokens"])


def _read(stack: Stack, seed: int) -> None:
    """With the plainest reader there is: what it costs is not the pipeline's."""
    job_id = stack.submit(**_body(seed))
    with urllib.request.urlopen(f"{stack.url}/jobs/{job_id}/events", timeout=600) as events:
        lines = [line for line in events if line.startswith((b"event:", b"data:"))]
    status = json.loads(lines[-1].removeprefix(b"data:"))
    if lines[-2].strip() != b"event: result":
        raise RuntimeError(f"the stream ended with {lines[-2:]}")
    _check(status["result"]["usage"]["completion_tokens"])


def _check(tokens: int) -> None:
    if tokens != TOKENS:
        raise RuntimeError(f"{tokens} tokens instead of {TOKENS}: not the same work")


if __name__ == "__main__":
    sys.exit(main())
