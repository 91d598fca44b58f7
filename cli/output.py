"""What a person reads: answers on stdout, everything about them on stderr."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from msgspec import UNSET
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cli.doctor.finding import Finding
from shared.logs import drain_logs
from shared.printable import printable, printable_json
from shared.wire.api import JobStatus, ModelQueue
from shared.wire.inferers import ConcurrencyChange, InfererEntry, RunningJob
from shared.wire.subjects import CLASSES

WIDE = 1000
"""Columns where nobody looks: a program that reads a table wants the ids whole."""


class TextConsole(Console):
    """Shows text as it is: nothing in it is markup, and a terminal obeys nothing in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or not self.is_terminal:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


out = TextConsole(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
err = TextConsole(stderr=True, soft_wrap=True)

COLOURS = {"SUCCESS": "green", "FAILURE": "red", "REVOKED": "yellow", "STARTED": "cyan"}


def print_json(value: object) -> None:
    sys.stdout.write(printable_json(msgspec.json.encode(value).decode("utf-8")) + "\n")
    sys.stdout.flush()


def print_tokens(text: str) -> None:
    """Part of an answer, as it comes: byte for byte, except on a terminal, which would obey it."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_text(text: str) -> None:
    """As `print_tokens`, a line or several."""
    print_tokens(f"{text}\n")


def complain(text: str) -> None:
    """A line on stderr, after all that was logged."""
    drain_logs()
    print(printable(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def discard_output() -> None:
    """Stop writing to a stdout whose reader is gone, including what is left in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown(text: str, style: str = "") -> Text:
    """Text of others, in a table or alone: on a terminal without anything that it would obey."""
    return Text(printable(text) if out.is_terminal else text, style)


def print_status(status: JobStatus) -> None:
    table = Table.grid(padding=(0, 2))
    rows: list[tuple[str, str | None]] = [
        ("id", status.id),
        ("retry of", status.retry_of or None),
        ("model", status.model),
        ("priority", status.priority),
        ("attempts", str(status.attempts)),
        ("inferer", status.inferer),
        ("queued at", status.queued_at),
        ("started at", status.started_at),
        ("finished at", status.finished_at),
    ]
    table.add_row("state", shown(status.state, COLOURS.get(status.state, "")))
    for name, value in rows:
        if value is not None:
            table.add_row(name, shown(value))
    if status.error is not None:
        table.add_row("error", shown(f"{status.error.code}: {status.error.message}"))
    if status.timings is not None:
        table.add_row("timings", shown(timings_line(status)))
    if (outlook := outlook_line(status)) is not None:
        table.add_row("outlook", shown(outlook))
    out.print(table)
    if status.result is not None:
        print_text(status.result.text)


def timings_line(status: JobStatus) -> str:
    """``waited 0.1 s, first token after 0.3 s, 64 tokens at 80.1 tokens/s``, and whether the answer
    was cut off."""
    if status.timings is None:
        return ""
    parts = [f"waited {status.timings.queued_ms / 1000:.2f} s"]
    if status.timings.first_token_ms is not None:
        parts.append(f"first token after {status.timings.first_token_ms / 1000:.2f} s")
    if status.result is not None:
        parts.append(f"{status.result.usage.completion_tokens} tokens")
    if status.timings.tokens_per_s is not None:
        parts[-1] += f" at {status.timings.tokens_per_s:.1f} tokens/s"
    if status.result is not None and status.result.finish_reason == "length":
        parts.append("cut off (--max-tokens, or the context is full)")
    return ", ".join(parts)


def outlook_line(status: JobStatus) -> str | None:
    """``3 before it, done in about 12 s (90 %: 20 s)``; None when nothing is known."""
    parts = []
    if status.position is not UNSET:
        parts.append(
            "next to be served" if status.position == 0 else f"{status.position} before it"
        )
    if status.progress is not UNSET:
        parts.append(
            f"{status.progress.completion_tokens} of at most {status.progress.max_tokens} tokens"
        )
    if status.eta is not UNSET:
        parts.append(f"done in about {status.eta.p50_s:.0f} s (90 %: {status.eta.p90_s:.0f} s)")
    return ", ".join(parts) or None


def print_queue(models: list[ModelQueue]) -> None:
    out.print(queue_table(models))


def queue_table(models: list[ModelQueue]) -> RenderableType:
    if not models:
        return "no model is served yet: start an inferer"
    table = Table("model", box=None, pad_edge=False)
    for heading in ("waiting", "in flight", "limit", "inferers", "oldest waits"):
        table.add_column(heading, justify="right")
    table.add_column("waiting by class")
    for model in models:
        numbers = (model.waiting, model.in_flight, model.limit, model.inferers)
        oldest = _or_dash(model.oldest_s, "{:.1f} s")
        table.add_row(shown(model.model), *map(str, numbers), oldest, _by_class(model))
    return table


def _by_class(queue: ModelQueue) -> str:
    """``1 high, 3 low``."""
    held = [(queue.classes[name].waiting, name) for name in CLASSES if name in queue.classes]
    return ", ".join(f"{waiting} {name}" for waiting, name in held if waiting) or "-"


def print_inferers(inferers: list[InfererEntry]) -> None:
    out.print(inferers_table(inferers))


def inferers_table(inferers: list[InfererEntry], *, jobs: bool = True) -> RenderableType:
    """One line for each; ``jobs``: with those that it runs."""
    if not inferers:
        return (
            "no inferer is live: start one with sluice up, or python -m services.inferer; under "
            "`sluice up --min 0` the next job does"
        )
    columns: dict[str, Callable[[InfererEntry], str]] = {
        "inferer": lambda entry: entry.id,
        "model": lambda entry: entry.model,
        "host": lambda entry: entry.host,
        "state": lambda entry: entry.state if entry.slots else f"{entry.state}, closed",
        "slots": lambda entry: str(entry.slots),
        "threads": lambda entry: str(entry.threads),
        "CPUs": lambda entry: _cpu_list(entry.cpus),
        "tokens/s": lambda entry: _or_dash(entry.tokens_per_s, "{:.1f}"),
    }
    if any(entry.overlaps for entry in inferers):
        columns["shares CPUs with"] = lambda entry: ", ".join(entry.overlaps) or "-"
    if jobs:
        columns["runs"] = lambda entry: ", ".join(map(_progress, entry.jobs)) or "-"
    table = Table(box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, overflow="fold", no_wrap=heading == "inferer")
    for entry in inferers:
        table.add_row(*(shown(cell(entry)) for cell in columns.values()))
    return table


def _cpu_list(numbers: list[int]) -> str:
    """``0-3,6``, as the kernel and taskset write it."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges)


def _progress(job: RunningJob) -> str:
    return f"{job.id} ({job.completion_tokens} of {job.max_tokens} tokens)"


def _or_dash(number: float | None, form: str) -> str:
    return "-" if number is None else form.format(number)


def print_changes(changes: list[ConcurrencyChange]) -> None:
    for change in changes:
        if change.refused is None:
            out.print(shown(f"{change.inferer}: {change.before} → {change.concurrency}"))
        else:
            out.print(shown(f"{change.inferer}: stays at {change.before}: {change.refused}", "red"))


VERDICTS = {"ok": ("ok   ", "green"), "look": ("look ", "yellow"), "wrong": ("WRONG", "red")}


def print_findings(findings: list[Finding]) -> None:
    for finding in findings:
        out.print(Text(*VERDICTS[finding.verdict]), shown(f"{finding.about}: {finding.found}"))
        if finding.advice is not None:
            out.print(shown(f"      → {finding.advice}"))


def discard_stdout() -> None:
    """From now on nothing is written there, nor tried at exit, which would change the status."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
