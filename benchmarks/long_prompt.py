"""A prompt of 1,500 tokens beside an answer that is generated: how much each slows the other down.
The engine with the real model and two slots, no queue. The speed of the answer is compared for the
same tokens: later ones take longer.

    .venv/bin/python -m benchmarks.long_prompt
"""

import statistics
import sys
import time
from itertools import pairwise

from benchmarks.measuring import THREADS, describe_machine
from services.inferer.engine.engine import Engine
from services.inferer.engine.model import Model
from services.inferer.engine.speed_test import TEXT, TimedJob
from services.inferer.settings import InfererSettings
from shared.model_files import locate

N_CTX, PROMPT_TOKENS, STREAM_TOKENS = 4096, 1500, 100


def main() -> int:
    print(f"a long prompt beside an answer: {describe_machine()}")
    model = Model(locate("smollm2"), gpu_layers=-1)
    engine = Engine(model, slots=2, n_ctx=N_CTX, n_batch=InfererSettings().n_batch, threads=THREADS)
    prompt = model.tokenize(TEXT * 1000)[:PROMPT_TOKENS]
    short = model.tokenize("Once upon a time")
    TimedJob(engine, short, STREAM_TOKENS).wait()
    prompt_alone_s = TimedJob(engine, prompt, 1).wait()
    stream = TimedJob(engine, short, N_CTX - 100)
    while len(stream.at) < STREAM_TOKENS:
        time.sleep(0.01)
    prompt_run = TimedJob(engine, prompt, 1)
    prompt_s = prompt_run.wait()
    engine.abort(stream.sequence)
    stream.wait()
    first = sum(at < prompt_run.started for at in stream.at)
    beside = [at for at in stream.at[first:] if at <= prompt_run.at[-1]]
    alone = TimedJob(engine, short, first + len(beside))
    alone.wait()
    engine.close()
    model.close()
    speed_alone, speed_beside = _speed(alone.at[first:]), _speed(beside)
    gaps = sorted(later - earlier for earlier, later in pairwise(beside))
    print(f"  answer   alone {speed_alone:6.1f} tokens/s   beside {speed_beside:6.1f} tokens/s")
    print(f"           {speed_beside / speed_alone:.2f} of its speed")
    median_ms, p99_ms = 1000 * statistics.median(gaps), 1000 * gaps[int(0.99 * len(gaps))]
    print(f"           between two tokens: median {median_ms:.0f} ms, 99 % {p99_ms:.0f} ms")
    print(f"  prompt   alone {prompt_alone_s:6.1f} s          beside {prompt_s:6.1f} s")
    print(f"           {prompt_s / prompt_alone_s:.2f} times its time")
    return 0


def _speed(at: list[float]) -> float:
    return (len(at) - 1) / (at[-1] - at[0])


if __name__ == "__main__":
    sys.exit(main())
