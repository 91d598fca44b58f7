"""What `sluice bench` measures: the same work with several slots, and in two processes."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from msgspec import Struct

from cli.bench.process import NotMeasured, SpeedTest
from cli.exit_status import EXIT_USAGE, CommandError
from cli.up.scale import split_cpus
from shared.counts import counted
from shared.cpus import own_cpus, usable_cpus
from shared.errors import ModelError, OutOfMemory
from shared.speed_test import Done, Failed, Jobs, Ready, Subject

SLOTS = (1, 2, 4, 8)
PROMPT_TOKENS = 512
"""Of all jobs of a setting together; fewer where the model is slow."""
LEAST_PROMPT_TOKENS = 32
ANSWER_TOKENS = 65
"""Of each job. The first is not counted, as it comes with the prompt."""
SHORT_PROMPT_TOKENS = 16
"""Before an answer that is measured."""
WARM_UP = Jobs(prompt_tokens=32, answer_tokens=2, limit_s=60)
MOST_BYTES_CONVERTED = 2 * 1024**3
"""A larger model is not converted to Q4_0, which would take minutes."""
TOO_LARGE_TO_CONVERT = Failed(
    ModelError.code, "converting the model, which has more than 2 GiB, would take minutes"
)
HALVES, SHARED, AS_Q4_0 = "2 processes, half of the CPUs each", "2 processes, same CPUs", "as Q4_0"


class Setting(Struct, frozen=True):
    """One way to run jobs: a process for each of ``cpus``, the CPUs it may use (None: all)."""

    name: str
    subject: Subject
    cpus: list[list[int]] | list[None]

    @property
    def jobs(self) -> int:
        """At once."""
        return self.subject.slots * len(self.cpus)


class Row(Struct, frozen=True, kw_only=True):
    """How fast a setting is, in medians of its rounds; the speeds are null if it was not
    measured."""

    setting: str
    jobs: int
    """At once; each process has as many slots as its share of them."""
    processes: int
    threads: int | None = None
    """Of each process."""
    rounds: int = 0
    prompt_tokens_per_s: float | None = None
    tokens_per_s: float | None = None
    """Of all answers together."""
    tokens_per_s_each: float | None = None
    tokens_per_s_range: tuple[float, float] | None = None
    """The slowest and the fastest round."""
    not_measured: str | None = None
    """The reason."""


class Measured(Struct, frozen=True):
    """All rows, and what was measured."""

    ready: Ready
    """Of the first process."""
    prompt_tokens: int
    """Of all jobs of a setting together."""
    rows: list[Row]


class _Round(Struct, frozen=True):
    """Tokens per second of all processes together."""

    prompt: float
    answer: float


def settings() -> list[Setting]:
    """All that can be measured here; the first has one slot."""
    found = [Setting(counted(slots, "slot"), Subject(slots), [None]) for slots in SLOTS]
    cpus = own_cpus()[: usable_cpus()]
    if len(cpus) > 1:
        found.append(Setting(HALVES, Subject(1), split_cpus(cpus, 2)))
    found.append(Setting(SHARED, Subject(1), [None, None]))
    found.append(Setting(AS_Q4_0, Subject(1, as_q4_0=True), [None]))
    return found


class Measurement:
    """Measures settings one after the other, each in processes of its own, so that it finds the
    memory free."""

    def __init__(self, model: Path, seconds: float) -> None:
        self._model = model
        self._settings = settings()
        self._share_s = seconds / len(self._settings)
        self._prompt_tokens = 0
        """Decided by the first setting."""

    def run(self, on_setting: Callable[[str, int, int], None]) -> Measured:
        """Measure everything. ``on_setting`` gets the name of each setting before it is measured,
        its number and how many there are.

        Raises:
            CommandError: the model cannot be measured, or a process died.
        """
        rows: list[Row] = []
        first: Ready | None = None
        for number, setting in enumerate(self._settings, start=1):
            if first is not None and not _applies(setting, first):
                continue
            on_setting(setting.name, number, len(self._settings))
            try:
                ready, row = self._measure(setting)
                first = first or ready
            except NotMeasured as error:
                may_fail = error.code == OutOfMemory.code or setting.subject.as_q4_0
                if first is None or not may_fail:
                    raise CommandError(str(error), EXIT_USAGE) from None
                row = _unmeasured(setting, str(error))
            rows.append(row)
        assert first is not None
        return Measured(first, self._prompt_tokens, rows)

    def _measure(self, setting: Setting) -> tuple[Ready, Row]:
        """Raises: NotMeasured, CommandError."""
        if setting.subject.as_q4_0 and self._model.stat().st_size > MOST_BYTES_CONVERTED:
            raise NotMeasured(TOO_LARGE_TO_CONVERT)
        with ExitStack() as stack:
            processes = [
                stack.enter_context(SpeedTest(setting.name, self._model, setting.subject, cpus))
                for cpus in setting.cpus
            ]
            ready, *_ = [process.ready() for process in processes]
            ends_at = time.monotonic() + self._share_s
            _run(processes, WARM_UP)
            warm = _rates(_run(processes, WARM_UP)).prompt
            if not self._prompt_tokens:
                affordable = round(warm * self._share_s / 4)
                self._prompt_tokens = max(LEAST_PROMPT_TOKENS, min(PROMPT_TOKENS, affordable))
            rounds: list[_Round] = []
            round_s = 0.0
            while not rounds or time.monotonic() + round_s < ends_at:
                started = time.monotonic()
                rounds.append(self._round(processes, setting.jobs))
                round_s = time.monotonic() - started
        answers = [one.answer for one in rounds]
        return ready, Row(
            setting=setting.name,
            jobs=setting.jobs,
            processes=len(processes),
            threads=ready.threads,
            rounds=len(rounds),
            prompt_tokens_per_s=median(one.prompt for one in rounds),
            tokens_per_s=median(answers),
            tokens_per_s_each=median(answers) / setting.jobs,
            tokens_per_s_range=(min(answers), max(answers)),
        )

    def _round(self, processes: list[SpeedTest], jobs: int) -> _Round:
        limit_s = self._share_s / 2
        each = max(1, self._prompt_tokens // jobs)
        prompt = _rates(_run(processes, Jobs(each, 1, limit_s))).prompt
        answer = _rates(_run(processes, Jobs(SHORT_PROMPT_TOKENS, ANSWER_TOKENS, limit_s))).answer
        return _Round(prompt, answer)


def _applies(setting: Setting, first: Ready) -> bool:
    """Whether to measure it with the model of ``first``. A GPU is not divided among processes, and
    other quantizations are fast there."""
    if first.gpu_layers:
        return setting.cpus == [None] and not setting.subject.as_q4_0
    return not (setting.subject.as_q4_0 and first.quantization == "Q4_0")


def _run(processes: list[SpeedTest], jobs: Jobs) -> list[Done]:
    """``jobs`` in all processes at the same time."""
    for process in processes:
        process.start(jobs)
    return [process.done() for process in processes]


def _rates(done: list[Done]) -> _Round:
    """All tokens, divided by the time until the last of them."""
    prompt_s = max(one.prompt_s for one in done)
    answer_s = max(one.answer_s for one in done)
    answer_tokens = sum(one.answer_tokens for one in done)
    return _Round(
        prompt=sum(one.prompt_tokens for one in done) / prompt_s,
        answer=answer_tokens / answer_s if answer_tokens else 0.0,
    )


def _unmeasured(setting: Setting, reason: str) -> Row:
    return Row(
        setting=setting.name,
        jobs=setting.jobs,
        processes=len(setting.cpus),
        not_measured=reason,
    )
