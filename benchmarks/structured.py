"""What a schema costs: the speed of answers under schemas relative to free ones, in alternating
pairs. The engine with the real model, no queue. A minute or two for each model.

    .venv/bin/python -m benchmarks.structured [--model M] [--pairs N] [--threads N] [--speculation]

One thread is measured in CPU time, and so also on a busy machine; more threads need an idle one.
"""

import json
import statistics
import sys
import time
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

from msgspec import Raw

from benchmarks.measuring import THREADS, alternated, arguments, describe_machine, spread
from services.inferer.engine.constraint import constraint
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.speculation import Speculation
from services.inferer.settings import InfererSettings
from shared.model_files import locate
from shared.wire.requests import JsonSchema, ModelRequest, NamedSchema

N_CTX, MAX_TOKENS, PAIRS = 1024, 32, 25
PROMPT = "A list of the people in the village, with all that is known of them, in detail: "

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "job": {"enum": ["baker", "teacher", "farmer", "doctor", "retired"]},
        "born": {"type": "string", "format": "date"},
        "hobbies": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "job", "born", "hobbies"],
}


class Task(NamedTuple):
    name: str
    schema: dict[str, Any]


TASKS = (
    Task("records", {"type": "array", "items": RECORD, "minItems": 50}),
    Task("numbers", {"type": "array", "items": {"type": "number"}, "minItems": 200}),
    Task("one string", {"type": "string", "minLength": 2000}),
    Task("any object", {"type": "object", "minProperties": 1}),
)


class Subject:
    """An engine, which generates one answer at a time."""

    def __init__(self, model: Model, threads: int, speculation: Speculation | None) -> None:
        self._model = model
        self._prompt = model.tokenize(PROMPT)
        self._clock = time.process_time if threads == 1 else time.perf_counter
        self._seed = 0
        n_batch = InfererSettings().n_batch
        self._engine = Engine(
            model, slots=1, n_ctx=N_CTX, n_batch=n_batch, threads=threads, speculation=speculation
        )

    def run(self, schema: dict[str, Any] | None) -> float:
        """Tokens per second of the answer, without its prompt."""
        source = Raw(json.dumps(schema).encode())
        form = None if schema is None else JsonSchema(NamedSchema(source))
        options = ModelRequest(prompt="x", response_format=form)
        self._seed += 1
        seed = self._seed
        times: list[float] = []
        ended: SimpleQueue[Generation | Exception] = SimpleQueue()
        self._engine.submit(
            GenerationSequence(
                prepare=lambda: (
                    self._prompt,
                    [
                        Sampler(
                            self._model,
                            options,
                            seed,
                            self._prompt,
                            constraint(self._model, options),
                        )
                    ],
                ),
                max_tokens=MAX_TOKENS,
                stop=[],
                on_text=lambda _: times.append(self._clock()),
                on_end=ended.put,
            )
        )
        outcome = ended.get()
        if isinstance(outcome, Exception):
            raise outcome
        return (len(times) - 1) / (times[-1] - times[0])

    def close(self) -> None:
        self._engine.close()


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--speculation", action="store_true", help="guess tokens, as inferers do")
    options = parser.parse_args()
    print(f"structured: {describe_machine()}, {options.model}, {options.threads} thread(s)")
    model = Model(locate(options.model), gpu_layers=0, chat=False)
    speculation = Speculation() if options.speculation else None
    subject = Subject(model, options.threads, speculation)
    subject.run(None)
    for task in TASKS:
        subject.run(task.schema)
        pairs = alternated(
            partial(subject.run, None), partial(subject.run, task.schema), options.pairs
        )
        free, under = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratios = [structured / plain for plain, structured in pairs]
        print(f"  {task.name:11} {under:6.1f} tokens/s, free {free:6.1f}, ratio {spread(ratios)}")
    subject.close()
    model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
