"""What the status of a waiting job costs, with many waiting and with few: two stacks side by side,
whose inferers take no job; blocks of requests for the job in the middle of the queue alternate
between them. The jobs are written to the queues as a gateway writes them.

    .venv/bin/python -m benchmarks.waiting
"""

import asyncio
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import httpx2
import nats

from benchmarks.measuring import alternated, arguments, describe_machine, running_stack, seconds
from shared.job_ids import new_job_id
from tests.support.processes import PATIENCE_S, Stack, eventually
from tests.support.tiny_model import write_tiny_model

FEW, MANY = 1_000, 100_000
BLOCKS, BLOCK, WARM_UP = 20, 10, 3
ALLOWED = 2.0
UNACKNOWLEDGED = 1_000
MEASURED = 5


def main() -> int:
    arguments(__doc__).parse_args()
    print(f"status of a waiting job: {describe_machine()}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stacks:
        path = write_tiny_model(Path(folder) / "tiny.gguf")
        read = []
        for count in (FEW, MANY):
            stack = stacks.enter_context(running_stack(path, "tiny"))
            client = stacks.enter_context(
                httpx2.Client(base_url=stack.url, timeout=PATIENCE_S, trust_env=False)
            )
            for _ in range(MEASURED):  # so that there is an estimate
                stack.wait_for_end(stack.submit(prompt="measure this", max_tokens=20))
            client.put("/concurrency", json={"concurrency": 0}).raise_for_status()
            job_id = asyncio.run(fill(stack, count))
            _wait_for_position(client, job_id)
            read.append((client, f"/status/{job_id}"))
        (few, few_path), (many, many_path) = read
        alternated(lambda: _block(few, few_path), lambda: _block(many, many_path), WARM_UP)
        blocks = alternated(lambda: _block(few, few_path), lambda: _block(many, many_path), BLOCKS)
    medians = []
    for count, values in zip((FEW, MANY), zip(*blocks, strict=True), strict=True):
        all_ms = sorted(value for block in values for value in block)
        medians.append(statistics.median(all_ms))
        p99 = all_ms[int(0.99 * len(all_ms))]
        print(f"  {count:7,} waiting   p50 {medians[-1]:6.2f} ms   p99 {p99:6.2f} ms")
    ratio = medians[1] / medians[0]
    print(f"  ratio            {ratio:6.2f}   (allowed: {ALLOWED})")
    return 0 if ratio <= ALLOWED else 1


async def fill(stack: Stack, count: int) -> str:
    """Queue ``count`` jobs. Returns the id of the one in the middle."""
    job_id = stack.submit(prompt="wait", max_tokens=1)
    client = await nats.connect(stack.nats.url)
    stream = client.jetstream(timeout=PATIENCE_S)
    subject = f"infer.requests.tiny.normal.public.{job_id}"
    stored = await stream.get_last_msg("REQUESTS", subject, direct=True)
    assert stored.data is not None
    middle = job_id
    for number in range(1, count):
        other = new_job_id()
        data = stored.data.replace(job_id.encode(), other.encode())
        await client.publish(subject.replace(job_id, other), data)
        if number == count // 2 - 1:
            middle = other
        if number % UNACKNOWLEDGED == 0:
            await client.flush()
    await client.flush()
    await client.close()
    return middle


def _wait_for_position(client: httpx2.Client, job_id: str) -> None:
    """Until the gateway has read the queue."""
    eventually(lambda: client.get(f"/status/{job_id}").json().get("position"), "a position")


def _block(client: httpx2.Client, path: str) -> list[float]:
    """Milliseconds of each request."""
    return [1000 * seconds(lambda: client.get(path).raise_for_status()) for _ in range(BLOCK)]


if __name__ == "__main__":
    sys.exit(main())
