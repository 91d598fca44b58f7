"""A long prompt beside an answer that is generated: how much each slows the other down. The engine
with the real model and two slots, no queue. The speed of the answer is compared for the same
tokens: later ones take longer.

    .venv/bin/python -m benchmarks.long_prompt [--tokens 7000] [--batching on] [--rounds N]
"""

import statistics
import sys
import time
from itertools import pairwise
from typing import NamedTuple, get_args

from benchmarks.measuring import THREADS, arguments, describe_machine
from services.inferer.engine.engine import Engine
from services.inferer.engine.model import Model
from services.inferer.engine.speed_test import TEXT, TimedJob
from services.inferer.settings import Batching, InfererSettings
from shared.model_files import locate

N_CTX, STREAM_TOKENS = 8192, 100


class Round(NamedTuple):
    prompt_alone_s: float
    prompt_s: float
    answer_alone: float
    """Tokens per second."""
    answer: float
    gaps_s: list[float]
    """Between two tokens of the answer, beside the prompt."""


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=1500, help="of the prompt")
    parser.add_argument("--batching", choices=get_args(Batching), default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"a prompt of {options.tokens} tokens beside an answer: {describe_machine()}")
    model = Model(locate("smollm2"), gpu_layers=-1)
    engine = Engine(
        model,
        slots=2,
        n_ctx=N_CTX,
        n_batch=InfererSettings().n_batch,
        threads=THREADS,
        batching=options.batching,
    )
    prompt = model.tokenize(TEXT * 1000)[: options.tokens]
    short = model.tokenize("Once upon a time")
    TimedJob(engine, short, STREAM_TOKENS).wait()
    rounds = [_measure(engine, prompt, short) for _ in range(options.rounds)]
    engine.close()
    model.close()
    for number, one in enumerate(rounds, 1):
        median_s, p99_s = statistics.median(one.gaps_s), one.gaps_s[int(0.99 * len(one.gaps_s))]
        print(
            f"  {number}: prompt alone {one.prompt_alone_s:.1f} s, beside {one.prompt_s:.1f} s; "
            f"answer alone {one.answer_alone:.0f} tokens/s, beside {one.answer:.0f}; between two "
            f"tokens {1000 * median_s:.0f} ms, 99 % {1000 * p99_s:.0f} ms"
        )
    times = statistics.median(one.prompt_s / one.prompt_alone_s for one in rounds)
    speed = statistics.median(one.answer / one.answer_alone for one in rounds)
    print(f"  the prompt takes {times:.2f} times as long, the answer has {speed:.2f} of its speed")
    return 0


def _measure(engine: Engine, prompt: list[int], short: list[int]) -> Round:
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
    return Round(
        prompt_alone_s,
        prompt_s,
        _speed(alone.at[first:]),
        _speed(beside),
        sorted(later - earlier for earlier, later in pairwise(beside)),
    )


def _speed(at: list[float]) -> float:
    return (len(at) - 1) / (at[-1] - at[0])


if __name__ == "__main__":
    sys.exit(main())
