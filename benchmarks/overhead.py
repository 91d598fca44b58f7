"""What the pipeline adds to a job: one token of the tiny model, HTTP submit to result, against the
same work called directly on an engine in this process; and the CPU time that each part takes for
it.

One client, one job after another; blocks of jobs alternate between the two, in one run. Both
engines are set up alike.

    .venv/bin/python -m benchmarks.overhead
"""

import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measuring import (
    THREADS,
    alternated,
    arguments,
    cpu_ms,
    describe_machine,
    running_stack,
    seconds,
)
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.settings import InfererSettings
from shared.wire.requests import Sampling
from tests.support.tiny_model import write_tiny_model

BLOCKS, BLOCK, WARM_UP = 25, 20, 3
PROMPT = "one token, please"
ALLOWED_MS = 4.0
REST_S = 0.03
"""Between blocks: the threads of a llama.cpp that has just worked spin on for a moment."""


def main() -> int:
    arguments(__doc__).parse_args()
    print(f"overhead of the pipeline: {describe_machine()}")
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_model(Path(folder) / "tiny.gguf")
        model = Model(path, gpu_layers=-1)
        engine = Engine(
            model, slots=1, n_ctx=4096, n_batch=InfererSettings().n_batch, threads=THREADS
        )
        with running_stack(path, "tiny") as stack, _connect(stack.url) as connection:

            def direct() -> list[float]:
                return _block(lambda: _run_directly(engine))

            def through() -> list[float]:
                return _block(lambda: _request(connection))

            parts = {
                "gateway": stack.gateways[0],
                "inferer": stack.inferers[0],
                "broker": stack.nats.process,
            }
            alternated(direct, through, WARM_UP)
            before = {name: cpu_ms(part) for name, part in parts.items()}
            blocks = alternated(direct, through, BLOCKS)
            used = {name: cpu_ms(part) - before[name] for name, part in parts.items()}
        engine.close()
    direct_ms = sorted(value for block, _ in blocks for value in block)
    through_ms = sorted(value for _, block in blocks for value in block)
    for name, values in (("engine directly", direct_ms), ("HTTP to result", through_ms)):
        p50, p99 = statistics.median(values), values[int(0.99 * len(values))]
        print(f"  {name:16} p50 {p50:6.2f} ms   p99 {p99:6.2f} ms   ({len(values)} jobs)")
    per_job = "   ".join(f"{name} {ms / (BLOCKS * BLOCK):.2f}" for name, ms in used.items())
    print(f"  CPU ms per job   {per_job}")
    added = statistics.median(through_ms) - statistics.median(direct_ms)
    print(f"  added at p50     {added:6.2f} ms   (allowed: {ALLOWED_MS} ms)")
    return 0 if added <= ALLOWED_MS else 1


def _block(call: Callable[[], object]) -> list[float]:
    """Milliseconds of each of the block's jobs but the first."""
    time.sleep(REST_S)
    return [1000 * seconds(call) for _ in range(BLOCK)][1:]


def _connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


BODY = json.dumps({"prompt": PROMPT, "max_tokens": 1, "seed": 1}).encode()
REQUEST = (
    b"POST /jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"prefer: wait=60\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


def _request(connection: socket.socket) -> None:
    """By hand: a client library takes its time too, and that is not the pipeline's."""
    connection.sendall(REQUEST)
    answer = b""
    while not answer.endswith(b"}"):
        received = connection.recv(65536)
        if not received:
            raise RuntimeError("the gateway hung up")
        answer += received
    if not answer.startswith(b"HTTP/1.1 200") or b'"state":"SUCCESS"' not in answer:
        raise RuntimeError(answer.decode())


def _run_directly(engine: Engine) -> None:
    ended = threading.Event()
    tokens = engine.model.tokenize(PROMPT)
    engine.submit(
        GenerationSequence(
            prepare=lambda: (tokens, [Sampler(engine.model, Sampling(), 1, tokens)]),
            max_tokens=1,
            stop=[],
            on_text=lambda text: None,
            on_end=lambda outcome: ended.set(),
        )
    )
    ended.wait()


if __name__ == "__main__":
    sys.exit(main())
