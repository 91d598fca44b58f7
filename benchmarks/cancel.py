"""Cancel: the time from sending `DELETE /jobs/<id>` until the inferer runs the next job, for which
the compute thread must have released the first one; in the middle of an answer, and anywhere in a
prompt of some thousand tokens. The real model, all processes on this machine with one clock.

    .venv/bin/python -m benchmarks.cancel
"""

import sys
import time
from statistics import median

from benchmarks.measuring import arguments, describe_machine, running_stack, seconds
from shared.model_files import locate
from shared.timestamps import milliseconds_between, timestamp
from tests.support.processes import Stack

ROUNDS, ALLOWED_MS = 25, 100.0
N_CTX, WORDS = 8192, 5000
PROMPT = "lighthouse " * WORDS
NEXT = {"prompt": "hi", "max_tokens": 1}


def main() -> int:
    arguments(__doc__).parse_args()
    print(f"cancel: {describe_machine()}")
    with running_stack(locate("smollm2"), "smollm2", INFERER_N_CTX=str(N_CTX)) as stack:
        warm_up = stack.wait_for_end(stack.submit(prompt=PROMPT, max_tokens=64))
        prompt_tokens = warm_up["result"]["usage"]["prompt_tokens"]
        prompt_s = warm_up["timings"]["prompt_ms"] / 1000
        within = [(number + 0.5) / ROUNDS for number in range(ROUNDS)]
        prompt_part = 0.8  # the next ones may be faster than the first
        slowest = max(
            _report(
                f"a prompt of {prompt_tokens} tokens ({prompt_s:.1f} s)",
                [_cancel(stack, prompt_part * part * prompt_s, in_prompt=True) for part in within],
            ),
            _report(
                "an answer",
                [_cancel(stack, 0.2 + part / 2, in_prompt=False) for part in within],
            ),
        )
    print(f"  slowest {slowest:.0f} ms   (allowed: {ALLOWED_MS:.0f} ms)")
    return 0 if slowest <= ALLOWED_MS else 1


def _report(what: str, rounds: list[tuple[float, float] | None]) -> float:
    """The longest time until the next job ran."""
    measured = [figures for figures in rounds if figures is not None]
    cancelled = sorted(cancelled_ms for cancelled_ms, _ in measured)
    free = sorted(next_ms for _, next_ms in measured)
    print(f"  in the middle of {what}, {len(cancelled)} times:")
    for name, values in (("answered", cancelled), ("next job runs", free)):
        print(f"    {name:14} p50 {median(values):5.1f} ms   max {values[-1]:5.1f} ms")
    return free[-1]


def _cancel(stack: Stack, after_s: float, *, in_prompt: bool) -> tuple[float, float] | None:
    """Milliseconds from the cancel of a job that has run for ``after_s`` to its answer, and to the
    start of the next job; None if it was no longer, or not yet, where it should be."""
    # One has a prompt that takes long to compute, the other a long answer.
    body = {"prompt": PROMPT} if in_prompt else {"prompt": "Once upon a time", "max_tokens": 4000}
    job_id = stack.submit(**body)
    began = time.monotonic()
    stack.wait_for_state(job_id, "STARTED")
    next_id = stack.submit(**NEXT)
    time.sleep(max(0.0, began + after_s - time.monotonic()))
    sent_at = timestamp()
    told_ms = 1000 * seconds(lambda: stack.http.delete(f"/jobs/{job_id}").raise_for_status())
    started_at = str(stack.wait_for_end(next_id)["started_at"])
    with stack.http.stream("GET", f"/jobs/{job_id}/events") as events:
        generated = "event: tokens" in list(events.iter_lines())
    if generated == in_prompt:
        return None
    return told_ms, milliseconds_between(sent_at, started_at)


if __name__ == "__main__":
    sys.exit(main())
