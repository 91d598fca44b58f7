"""``make demo``: two prompts at once on a real broker, with one inferer and a real model.

Exit status 0 only if both were answered, one after the other.
"""

import asyncio
import signal
import sys
import sysconfig
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import msgspec
from rich.text import Text

from cli.output import out, timings_line
from shared.process.parent_death import die_with_parent
from shared.wire.api import JobAccepted, JobStatus, QueueReport

PROMPTS = ("Why is the sky blue? Answer in two sentences.", "Write a haiku about a river.")
COLOURS = ("cyan", "magenta")
MAX_TOKENS = 80
START_TIMEOUT_S = 120
ADVICE = (
    "A restart would most likely fail again. If llama.cpp was compiled for another CPU, or by a "
    "compiler with a bug, compile it again: rm -rf .venv && make .venv. If memory ran out, "
    "close other programs. `sluice up` shows the inferer's log, `sluice doctor` finds causes."
)


class InfererDied(Exception):
    """The message has the cause of death and what the inferer was doing."""


async def main() -> int:
    with tempfile.TemporaryDirectory(prefix="sluice-demo-") as data:
        out.print("Starting NATS, a gateway and one inferer …")
        log = Path(data) / "up.log"
        async with _stack(Path(data), log) as url:
            if url is None:
                out.print(Text(f"The stack did not start:\n{log.read_text()}", "red"))
                return 1
            async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
                jobs = await asyncio.gather(*(_submit(http, prompt) for prompt in PROMPTS))
                out.print(f"Submitted {len(jobs)} prompts at the same moment.\n")
                await _show_queue(http)
                shown = [
                    asyncio.create_task(_show(http, job, prompt, colour))
                    for job, prompt, colour in zip(jobs, PROMPTS, COLOURS, strict=True)
                ]
                try:
                    statuses = await asyncio.gather(*shown)
                except InfererDied as error:
                    for task in shown:
                        task.cancel()
                    out.print(Text(f"\n\n{error}\n{ADVICE}\nThe demo failed.", "red"))
                    return 1
    return _report(statuses)


@asynccontextmanager
async def _stack(data: Path, log: Path) -> AsyncIterator[str | None]:
    """Run `sluice up` on free ports. Yields its URL, or None if it did not start."""
    command = [str(Path(sysconfig.get_path("scripts")) / "sluice"), "up"]
    options = ["--port", "0", "--nats-port", "0", "--data", str(data)]
    with log.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            *options,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            preexec_fn=die_with_parent(signal.SIGTERM),
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            ready = (await process.stdout.readline()).decode().split()
        yield ready[1] if ready else None
    except TimeoutError:
        yield None
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _submit(http: httpx2.AsyncClient, prompt: str) -> JobAccepted:
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0.7,
        "seed": 7,
    }
    answer = await http.post("/jobs", json=body)
    answer.raise_for_status()
    return msgspec.json.decode(answer.content, type=JobAccepted)


async def _show(http: httpx2.AsyncClient, job: JobAccepted, prompt: str, colour: str) -> JobStatus:
    """Print a job's tokens as they arrive. Two of these may run: the jobs never run at once."""
    async with http.sse(job.events_url) as source:
        async for event in source:
            if event.event == "started":
                # The end of the other job's answer may not have arrived yet.
                out.print(Text(f"\n▶ {prompt}", f"bold {colour}"))
            elif event.event == "attempt_failed":
                failure = msgspec.json.decode(event.data)
                if failure.get("code") == "worker_lost":
                    raise InfererDied(f"The inferer died: {failure['message']}.")
            elif event.event == "tokens":
                out.print(Text(msgspec.json.decode(event.data)["text"], colour), end="")
            elif event.event == "result":
                out.print("\n")
                await _show_queue(http)
                return msgspec.json.decode(event.data, type=JobStatus)
    raise RuntimeError(f"the events of {job.id} ended without a result")


async def _show_queue(http: httpx2.AsyncClient) -> None:
    queue = msgspec.json.decode((await http.get("/queue")).content, type=QueueReport)
    for model in queue.models:
        line = f"queue of {model.model}: {model.in_flight} running, {model.waiting} waiting"
        out.print(Text(line, "dim"))


def _report(statuses: list[JobStatus]) -> int:
    first, second = sorted(statuses, key=lambda status: status.started_at or "")
    for status, name in ((first, "first"), (second, "second")):
        if status.result is None:
            out.print(Text(f"{name}: {status.state}: {status.error}", "red"))
            continue
        out.print(Text(f"{name}: {timings_line(status)}", "bold"))
        out.print(Text((status.result.text or "").strip()), "")
    in_turn = (
        first.finished_at is not None
        and second.started_at is not None
        and first.finished_at <= second.started_at
    )
    if in_turn:
        out.print(
            f"The first ended at {first.finished_at},\n"
            f"the second began at {second.started_at}: one at a time."
        )
    answered = all(status.state == "SUCCESS" and status.result for status in statuses)
    if not answered or not in_turn:
        out.print(Text("The demo failed.", "red"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
