"""On a GPU, beside llama.cpp's server, over HTTP with OpenAI's API: a model of random weights, each
server once with one slot and once with four, Sluice also with `auto`. All run at the same time and
are measured in turn:

- A prompt of some 2,000 tokens that no cache knows: tokens per second until the first token.
- An answer to a short prompt: the time to its first token, and tokens per second after it.
- 4 clients with prompts of some 500 tokens: tokens per second of all, and time to the first token.
- The second turn of a conversation with a history of some 1,500 tokens, right after the first, and
  a third after other conversations have had all slots.

    .venv/bin/python -m benchmarks.peers.gpu --model FILE [--rounds N] [--to FILE.json]

It needs llama.cpp compiled for the GPU (docs/how-to/gpu.md), and its server compiled with the same
flags: ``CMAKE_ARGS=-DGGML_CUDA=ON benchmarks/peers/build_llama_server.sh``.
`benchmarks.random_model` writes the model; any other one with a chat template will do as well.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from statistics import median

import msgspec
from msgspec import Struct

from benchmarks.measuring import arguments, describe_machine, in_turn, running_stack
from benchmarks.peers.chat import Answer, Message, ask
from benchmarks.peers.environment import LLAMA_SERVER, N_CTX, http_server, llama_server, require
from benchmarks.prompt_cache import HISTORY

ROUNDS = 3
SLOTS = 4
N_BATCH = 512
SENTENCE = "The tide comes in twice a day. "
LONG, MIDDLE = 250, 62
"""Sentences of a prompt, of 8 tokens each."""
ANSWER_TOKENS, TURN_TOKENS = 128, 8
OPTIONS = {"temperature": 0.8, "ignore_eos": True}
"""Of all requests. Random weights and no temperature soon lead to a loop, which Sluice's
speculation would guess."""
LLAMA, SLUICE = "llama.cpp's server", "Sluice"

Figures = dict[str, float]


class Subject:
    """A server, with the questions that it has not had yet: all get the same in the same order."""

    def __init__(self, url: str, slots: int) -> None:
        self.url, self.slots = url, slots
        self._numbers = count()

    def ask(self, sentences: int, max_tokens: int) -> Answer:
        """The answer to a new question of so many ``sentences``."""
        return self.answer([self.question(SENTENCE * sentences)], max_tokens)

    def answer(self, messages: list[Message], max_tokens: int) -> Answer:
        return ask(self.url, messages, max_tokens, seed=next(self._numbers), **OPTIONS)

    def question(self, text: str = "") -> Message:
        number = next(self._numbers)
        return {"role": "user", "content": f"{number}. Tell a story about item {number}. {text}"}


class Result(Struct):
    """What one measurement gave: for each subject and figure, one value a round."""

    model: str
    measurement: str
    gpu: list[str]
    memory_mib: int
    """Of the GPU, taken by everything that ran."""
    figures: dict[str, dict[str, list[float]]]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"{ROUNDS} by default")
    parser.add_argument("--to", type=Path, help="file for the results, which are added to it")
    options = parser.parse_args()
    require(LLAMA_SERVER)
    print(f"gpu: {describe_machine()}, {', '.join(gpus())}", flush=True)
    with _subjects(options.model) as subjects:
        parallel = {name: subject for name, subject in subjects.items() if subject.slots > 1}
        for name, measure, measured in (
            ("warm-up", _clients, subjects),
            ("a prompt", _prompt, subjects),
            ("an answer", _answer, subjects),
            ("4 clients", _clients, parallel),
            ("turns", _turns, parallel),
        ):
            rounds = 1 if name == "warm-up" else options.rounds
            figures = _rounds(measure, measured, rounds)
            result = Result(options.model.stem, name, gpus(), memory_mib(), figures)
            _print(result)
            if options.to:
                with options.to.open("ab") as file:
                    file.write(msgspec.json.encode(result) + b"\n")
    return 0


@contextmanager
def _subjects(model: Path) -> Iterator[dict[str, Subject]]:
    """All of them running."""
    settings = {
        "INFERER_N_CTX": str(N_CTX),
        "INFERER_N_BATCH": str(N_BATCH),
        "INFERER_CACHE_MB": "512",
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sluice-bench-")))
        subjects = {}
        for slots in (1, SLOTS):
            command = [*llama_server(model, slots), "--n-gpu-layers", "999"]
            url = stack.enter_context(http_server(command, folder / f"{slots}.log"))
            subjects[f"{LLAMA}, {slots}"] = Subject(url, slots)
        for slots, concurrency in ((1, "1"), (SLOTS, str(SLOTS)), (SLOTS, "auto")):
            stacked = running_stack(
                model, "smollm2", 1, **settings, INFERER_CONCURRENCY=concurrency
            )
            started = stack.enter_context(stacked)
            subjects[f"{SLUICE}, {concurrency}"] = Subject(started.url, slots)
        yield subjects


def _rounds(
    measure: Callable[[Subject], Figures], subjects: Mapping[str, Subject], rounds: int
) -> dict[str, dict[str, list[float]]]:
    measures = {name: lambda one=subject: measure(one) for name, subject in subjects.items()}
    return {
        name: {figure: [one[figure] for one in found] for figure in found[0]}
        for name, found in in_turn(measures, rounds).items()
    }


def _prompt(subject: Subject) -> Figures:
    answer = subject.ask(LONG, 1)
    tokens = (answer.prompt_tokens or 0) - (answer.cached_tokens or 0)
    return {
        "prompt tokens/s": tokens / answer.first_token_s,
        "first token ms": 1000 * answer.first_token_s,
        "tokens computed": tokens,
    }


def _answer(subject: Subject) -> Figures:
    answer = subject.ask(1, ANSWER_TOKENS)
    return {
        "answer tokens/s": (answer.tokens - 1) / (answer.total_s - answer.first_token_s),
        "first token ms": 1000 * answer.first_token_s,
        "tokens": answer.tokens,
    }


def _clients(subject: Subject) -> Figures:
    with ThreadPoolExecutor(SLOTS) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda _: subject.ask(MIDDLE, ANSWER_TOKENS), range(SLOTS)))
        took = time.perf_counter() - started
    return {
        "tokens/s of all": sum(answer.tokens for answer in answers) / took,
        "first token ms": median(1000 * answer.first_token_s for answer in answers),
        "seconds": took,
    }


def _turns(subject: Subject) -> Figures:
    conversation = [subject.question(HISTORY)]

    def turn() -> Answer:
        answer = subject.answer(conversation, TURN_TOKENS)
        conversation.append({"role": "assistant", "content": answer.text})
        conversation.append(subject.question())
        return answer

    first, second = turn(), turn()
    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(lambda _: subject.ask(MIDDLE, TURN_TOKENS), range(SLOTS)))
    third = turn()
    found: Figures = {}
    for name, answer in (("first", first), ("right after", second), ("later", third)):
        found[f"{name}: first token ms"] = 1000 * answer.first_token_s
        found[f"{name}: cached"] = answer.cached_tokens or 0
    return found


def gpus() -> list[str]:
    """The names of NVIDIA's."""
    return _nvidia_smi("name")


def memory_mib() -> int:
    """Of NVIDIA's GPUs, taken by all processes."""
    return sum(map(int, _nvidia_smi("memory.used")))


def _nvidia_smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.check_output(command, text=True).splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def _print(result: Result) -> None:
    print(f"\n{result.model}, {result.measurement} (GPU memory {result.memory_mib} MiB)")
    for subject, figures in result.figures.items():
        parts = (f"{name} {median(values):,.0f}" for name, values in figures.items())
        print(f"  {subject:24} {'   '.join(parts)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
