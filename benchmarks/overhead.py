"""What the pipeline adds to a job: one token of the tiny model, HTTP submit to result, against the
same work called directly on an engine in this process. Alternated, in one run.

    .venv/bin/python -m benchmarks.overhead
"""

import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.measuring import THREADS, alternated, describe_machine, running_stack, seconds
from services.inferer.engine import Engine, Sequence
from services.inferer.llama import Model
from services.inferer.sampler import Sampler
from shared.messages import Sampling
from tests.tiny_model import write_tiny_model

JOBS, WARM_UP = 400, 50
PROMPT = "one token, please"
ALLOWED_MS = 4.0


def main() -> int:
    print(f"overhead of the pipeline: {describe_machine()}")
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_model(Path(folder) / "tiny.gguf")
        model = Model(path, gpu_layers=-1)
        engine = Engine(model, slots=1, n_ctx=4096, n_batch=512, threads=THREADS)
        with running_stack(path, "tiny") as stack:

            def direct() -> float:
                return seconds(lambda: _run_directly(engine))

            def through() -> float:
                # The threads of a llama.cpp that has just worked spin on for a while: let them
                # come to rest, so that neither side pays for the other.
                time.sleep(0.01)
                return seconds(lambda: _request(connection))

            # The plainest client there is: its own cost is not the pipeline's.
            host, _, port = stack.url.removeprefix("http://").partition(":")
            connection = http.client.HTTPConnection(host, int(port), timeout=60)

            alternated(direct, through, WARM_UP)
            figures = alternated(direct, through, JOBS)
        engine.close()
    direct_ms = sorted(1000 * pair[0] for pair in figures)
    through_ms = sorted(1000 * pair[1] for pair in figures)
    for name, values in (("engine directly", direct_ms), ("HTTP to result", through_ms)):
        p50, p99 = statistics.median(values), values[int(0.99 * len(values))]
        print(f"  {name:16} p50 {p50:6.2f} ms   p99 {p99:6.2f} ms   ({len(values)} jobs)")
    added = statistics.median(through_ms) - statistics.median(direct_ms)
    print(f"  added at p50     {added:6.2f} ms   (allowed: {ALLOWED_MS} ms)")
    return 0 if added <= ALLOWED_MS else 1


def _request(connection: http.client.HTTPConnection) -> None:
    connection.request(
        "POST",
        "/jobs",
        json.dumps({"prompt": PROMPT, "max_tokens": 1, "seed": 1}),
        {"content-type": "application/json", "prefer": "wait=60"},
    )
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200 or json.loads(body)["state"] != "SUCCESS":
        raise RuntimeError(body.decode())


def _run_directly(engine: Engine) -> None:
    ended = threading.Event()
    tokens = engine.model.tokenize(PROMPT)
    engine.submit(
        Sequence(
            prepare=lambda: (tokens, Sampler(engine.model, Sampling(), 1, tokens)),
            max_tokens=1,
            stop=[],
            on_text=lambda text: None,
            on_end=lambda outcome: ended.set(),
        )
    )
    ended.wait()


if __name__ == "__main__":
    sys.exit(main())
