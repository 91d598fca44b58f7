"""What guessed tokens give: the speed of answers with speculation and without, in alternating
pairs. The engine with the real model, no queue. Three minutes.

    .venv/bin/python -m benchmarks.speculation
"""

import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.measuring import THREADS, arguments, describe_machine, spread
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.speculation import Speculation
from services.inferer.settings import InfererSettings
from shared.model_files import locate
from shared.wire.requests import ChatMessage, ModelRequest, Sampling

N_CTX, MAX_TOKENS, PAIRS = 2048, 160, 5
CACHE_BYTES = 1
"""Without a cache, no token is guessed from earlier answers. This one has no room for a state."""
TIME_LIMIT_S = 220.0
"""After it no further pair is begun."""

ORDERS = "\n".join(
    (
        "Order 4711: Maria Lindqvist, Harbour Street 12, Gothenburg, two lanterns, by invoice.",
        "Order 4712: Tomasz Kowalczyk, Mill Lane 3, Gdansk, one oak writing desk, by card.",
        "Order 4713: Aiko Tanaka, Cherry Avenue 88, Yokohama, five linen tablecloths, by card.",
        "Order 4714: Samuel Okafor, Palm Road 7, Lagos, a set of copper pans, not yet paid.",
        "Order 4715: Ingrid Haugen, Fjord View 21, Bergen, three wool blankets, by invoice.",
        "Order 4716: Pedro Alvarez, Calle Mayor 54, Sevilla, one guitar stand, in cash.",
    )
)
PASSAGE = (
    "The lighthouse at Skagen was built in 1858 and is forty-six metres high. For a hundred years "
    "its keeper climbed two hundred and ten steps each evening to light the lamp. In 1958 the lamp "
    "became electric, and the last keeper, Jens Mortensen, moved to a small house by the harbour, "
    "where he repaired clocks until he died in 1983. Today the tower is a museum of migrating "
    "birds, and eighty thousand people visit it each year."
)


FIRST_NAMES = ("Maria", "Tomasz", "Aiko", "Samuel", "Ingrid", "Pedro", "Leila", "Hugo")
LAST_NAMES = ("Lindqvist", "Kowalczyk", "Tanaka", "Okafor", "Haugen", "Alvarez", "Haddad", "Moreau")
STREETS = ("Harbour Street", "Mill Lane", "Cherry Avenue", "Palm Road", "Fjord View", "Calle Mayor")
CITIES = ("Gothenburg", "Gdansk", "Yokohama", "Lagos", "Bergen", "Sevilla", "Beirut", "Lyon")


class Task(NamedTuple):
    name: str
    prompt: str | Callable[[int], str]
    """A function gives each job another one. Only then all jobs have one owner, and tokens are
    guessed from earlier answers: those to the same prompt would be the same."""
    temperature: float = 0.8
    jobs: int = 1
    """At the same time."""
    rounds: int = 1
    """One after another."""
    max_tokens: int = MAX_TOKENS


def _story(number: int) -> str:
    """As `benchmarks.peers.servers` asks."""
    return f"{number}. Tell a story about item {number}."


def _orders(number: int) -> str:
    choose = random.Random(number)
    orders = "\n".join(
        f"Order {choose.randint(1000, 9999)}: {choose.choice(FIRST_NAMES)} "
        f"{choose.choice(LAST_NAMES)}, {choose.choice(STREETS)} {choose.randint(1, 99)}, "
        f"{choose.choice(CITIES)}, by card."
        for _ in range(6)
    )
    return f"{TO_JSON}\n\n{orders}"


EXTRACTION = f"List the name and the full address of every customer, one per line:\n\n{ORDERS}"
TO_JSON = "Turn these orders into JSON with number, name, street and city:"
STORY = "Write a story about a lighthouse keeper who finds a letter."
TASKS = (
    Task("extraction", EXTRACTION, 0),
    Task("JSON", f"{TO_JSON}\n\n{ORDERS}", 0),
    Task("summary", f"Summarize this text in two sentences:\n\n{PASSAGE}"),
    Task("free text", STORY),
    Task("free text", "What should I cook tonight?"),
    Task("similar stories", _story, 0, rounds=4, max_tokens=48),
    Task("similar JSON", _orders, 0),
    Task("2 extractions", EXTRACTION, 0, jobs=2),
    Task("2 free texts", STORY, jobs=2),
)


class Counting(Speculation):
    """The real policy; counts what it decides."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = self.drafts = 0

    def observe(self, sequences: int, drafts: int, seconds: float) -> None:
        super().observe(sequences, drafts, seconds)
        self.steps += 1
        self.drafts += drafts


class Subject:
    """An engine with speculation, or without."""

    def __init__(self, model: Model, speculation: Speculation | None) -> None:
        self._model = model
        self.engine = Engine(
            model,
            slots=2,
            n_ctx=N_CTX,
            n_batch=InfererSettings().n_batch,
            threads=THREADS,
            cache_bytes=CACHE_BYTES,
            speculation=speculation,
        )
        self._seed = 0

    def run(self, task: Task) -> float:
        """Tokens per second of the answers, without their prompts."""
        tokens, took_ms = 0, 0.0
        for _ in range(task.rounds):
            runs = [self._start(task) for _ in range(task.jobs)]
            generations = [run.wait() for run in runs]
            tokens += sum(generation.completion_tokens for generation in generations)
            took_ms += max(generation.generation_ms for generation in generations)
        return tokens / took_ms * 1000

    def _start(self, task: Task) -> "_Run":
        self._seed += 1
        text, owner = task.prompt, f"{task.name} {self._seed}"
        if not isinstance(text, str):
            text, owner = text(self._seed), task.name
        request = ModelRequest(messages=[ChatMessage("user", text)])
        prompt = self._model.tokenize_prompt(self._model.chat_prompt(request).prompt)
        return _Run(self.engine, prompt, task, self._seed, owner)


class _Run:
    def __init__(
        self, engine: Engine, prompt: list[int], task: Task, seed: int, owner: str
    ) -> None:
        self._ended = threading.Event()
        self._outcome: Generation | Exception | None = None
        options = Sampling(temperature=task.temperature)
        sequence = GenerationSequence(
            prepare=lambda: (prompt, [Sampler(engine.model, options, seed, prompt)]),
            max_tokens=task.max_tokens,
            stop=[],
            on_text=lambda _: None,
            on_end=self._end,
        )
        sequence.owner = owner
        engine.submit(sequence)

    def _end(self, outcome: Generation | Exception) -> None:
        self._outcome = outcome
        self._ended.set()

    def wait(self) -> Generation:
        self._ended.wait()
        assert isinstance(self._outcome, Generation), self._outcome
        return self._outcome


def main() -> int:
    arguments(__doc__).parse_args()
    print(f"answer tokens/s without and with speculation: {describe_machine()}")
    give_up_at = time.monotonic() + TIME_LIMIT_S
    model = Model(locate("smollm2"), gpu_layers=-1)
    counting = Counting()
    subjects = (Subject(model, None), Subject(model, counting))
    for subject in subjects:
        subject.run(TASKS[0])
    for task in TASKS:
        steps, drafts = counting.steps, counting.drafts
        pairs = [_pair(subjects, task, number) for number in range(PAIRS) if _is_before(give_up_at)]
        if len(pairs) < 2:
            print(f"  {task.name:15} not in time")
            continue
        without, with_drafts = (statistics.median(values) for values in zip(*pairs, strict=True))
        per_step = (counting.drafts - drafts) / (counting.steps - steps)
        print(
            f"  {task.name:15} {without:6.1f} {with_drafts:6.1f}   ratio "
            f"{spread([right / left for left, right in pairs])}   {per_step:.2f} drafts per step"
        )
    for subject in subjects:
        subject.engine.close()
    model.close()
    return 0


def _pair(subjects: tuple[Subject, Subject], task: Task, number: int) -> tuple[float, float]:
    """Tokens per second of both; every other time the second one goes first."""
    without, with_drafts = subjects
    if number % 2:
        second = with_drafts.run(task)
        return without.run(task), second
    return without.run(task), with_drafts.run(task)


def _is_before(end: float) -> bool:
    return time.monotonic() < end


if __name__ == "__main__":
    sys.exit(main())
