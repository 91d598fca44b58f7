"""Output for people: answers on stdout, messages about them on stderr."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec
from msgspec import UNSET
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cli.doctor.finding import Finding
from cli.models.catalogue import Catalogue, ListedModel
from shared.counts import counted
from shared.logs import drain_logs
from shared.printable import printable, printable_json
from shared.timestamps import milliseconds_between
from shared.wire.api import JobResult, JobStatus, ModelQueue
from shared.wire.inferers import ConcurrencyChange, InfererEntry
from shared.wire.listing import ListedJob
from shared.wire.requests import TEXT_TASKS
from shared.wire.results import FLOAT_BYTES
from shared.wire.subjects import PRIORITIES

WIDTH_WITHOUT_TERMINAL = 1000
"""Columns if stdout is not a terminal, so that programs get unbroken ids."""


class TextConsole(Console):
    """Prints text without markup, and escapes control characters on a terminal."""

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


out = TextConsole(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
err = TextConsole(stderr=True, soft_wrap=True)

PROGRESS_WIDTH = 12
"""So that the longest estimate fits into 80 columns."""
BAR_WIDTH = 10
COLOURS = {"SUCCESS": "green", "FAILURE": "red", "REVOKED": "yellow", "STARTED": "cyan"}


def print_json(value: object) -> None:
    sys.stdout.write(printable_json(msgspec.json.encode(value).decode("utf-8")) + "\n")
    sys.stdout.flush()


def print_tokens(text: str) -> None:
    """Print a part of an answer, unchanged except for control characters on a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def progress_line() -> Progress:
    """A line on stderr with a bar, removed in the end; nothing if stderr is not a terminal."""
    return Progress(
        SpinnerColumn(),
        BarColumn(PROGRESS_WIDTH),
        TextColumn("{task.description}", markup=False),
        console=err,
        transient=True,
        disable=not err.is_terminal,
        # Otherwise it captures stdout, and writes the answer to stderr.
        redirect_stdout=False,
        redirect_stderr=False,
    )


def print_text(text: str) -> None:
    """As `print_tokens`, with a newline at the end."""
    print_tokens(f"{text}\n")


def print_error(text: str) -> None:
    """Print a line on stderr, after all log lines."""
    drain_logs()
    print(printable(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def safe_text(text: str, style: str = "") -> Text:
    """Untrusted text, with control characters escaped if stdout is a terminal."""
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
    table.add_row("state", safe_text(status.state, COLOURS.get(status.state, "")))
    for name, value in rows:
        if value is not None:
            table.add_row(name, safe_text(value))
    if status.error is not None:
        table.add_row("error", safe_text(error_line(status.error.code, status.error.message)))
    if status.last_error is not UNSET:
        last_error = error_line(status.last_error.code, status.last_error.message)
        table.add_row("last error", safe_text(last_error))
    if status.timings is not None:
        table.add_row("timings", safe_text(timings_line(status)))
    if status.blocked_reason is not UNSET:
        table.add_row("blocked", safe_text(status.blocked_reason))
    elif (estimate := estimate_line(status)) is not None:
        table.add_row("estimate", safe_text(estimate))
    out.print(table)
    if status.result is not None:
        print_result(status.result)


def error_line(code: str | None, message: str | None) -> str:
    """``timed_out: the deadline passed …``; a message that begins with the code stands alone."""
    if code and message and message.startswith(code):
        return message
    return ": ".join(part for part in (code, message) if part)


def print_result(result: JobResult) -> None:
    """The text, or several with their numbers; of embeddings, how many there are; of documents,
    their scores."""
    if result.embeddings:
        dimensions = len(result.embeddings[0]) // FLOAT_BYTES
        embeddings = counted(len(result.embeddings), "embedding")
        out.print(f"{embeddings} of {dimensions} dimensions: see --json")
    elif result.ranking:
        table = Table("document", "score", box=None, pad_edge=False)
        for one in result.ranking:
            text = f" {one.document.text}" if one.document else ""
            table.add_row(safe_text(f"{one.index}{text}"), f"{one.relevance_score:.4f}")
        out.print(table)
    elif result.choices:
        for number, choice in enumerate(result.choices, 1):
            out.print(f"answer {number}:", style="dim")
            print_text(choice.text)
    else:
        print_text(result.text or "")


def timings_line(status: JobStatus) -> str:
    """``waited 0.1 s, first token after 0.3 s, 64 tokens at 80.1 tokens/s``, and a note if the
    answer, or the first of several, was cut off."""
    if status.timings is None:
        return ""
    parts = [f"waited {status.timings.queued_ms / 1000:.2f} s"]
    if status.timings.first_token_ms is not None:
        parts.append(f"first token after {status.timings.first_token_ms / 1000:.2f} s")
    if status.result is not None:
        usage = status.result.usage
        is_text = status.result.text is not UNSET
        parts.append(
            counted(usage.completion_tokens, "token")
            if is_text
            else f"{counted(usage.prompt_tokens, 'token')} read in "
            f"{status.timings.prompt_ms / 1000:.2f} s"
        )
    if status.timings.tokens_per_s is not None:
        parts[-1] += f" at {status.timings.tokens_per_s:.1f} tokens/s"
    if status.result is not None and status.result.finish_reason == "length":
        parts.append("cut off (--max-tokens, or the context is full)")
    return ", ".join(parts)


def estimate_line(job: JobStatus | ListedJob) -> str | None:
    """``3 ahead of it, done in about 12 s (90 %: 20 s)``; None if nothing is known."""
    parts = []
    if job.position is not UNSET:
        parts.append("next to run" if job.position == 0 else f"{job.position} ahead of it")
    if isinstance(job, JobStatus) and job.progress is not UNSET:
        if job.progress.prompt_tokens_left:
            parts.append(f"{counted(job.progress.prompt_tokens_left, 'token')} of the prompt left")
        else:
            parts.append(
                f"{job.progress.completion_tokens} of at most "
                f"{counted(job.progress.max_tokens, 'token')}"
            )
    if job.eta is not UNSET:
        parts.append(f"done in about {job.eta.p50_s:.0f} s (90 %: {job.eta.p90_s:.0f} s)")
    return ", ".join(parts) or None


def print_queue(models: list[ModelQueue]) -> None:
    out.print(queue_table(models))


def queue_table(models: list[ModelQueue]) -> RenderableType:
    if not models:
        return "no model is known yet: start an inferer"
    table = Table("model", box=None, pad_edge=False)
    for heading in ("waiting", "in flight", "slots", "inferers", "oldest waits"):
        table.add_column(heading, justify="right")
    table.add_column("waiting by priority")
    for model in models:
        numbers = (model.waiting, model.in_flight, model.slots, model.inferers)
        oldest = _or_dash(model.oldest_s, "{:.1f} s")
        cells = (*(_or_dash(number, "{}") for number in numbers), oldest, _by_priority(model))
        table.add_row(safe_text(model.model), *cells)
    return table


def _by_priority(queue: ModelQueue) -> str:
    """``1 high, 3 low``."""
    held = [(queue.classes[name].waiting, name) for name in PRIORITIES if name in queue.classes]
    return ", ".join(f"{waiting} {name}" for waiting, name in held if waiting) or "-"


def print_inferers(inferers: list[InfererEntry], now: str) -> None:
    """The inferers, and below them their jobs; ``now`` is the broker's time."""
    out.print(inferers_table(inferers))
    if any(entry.jobs for entry in inferers):
        out.print()
        out.print(jobs_table(inferers, now))


def inferers_table(inferers: list[InfererEntry]) -> RenderableType:
    """One line per inferer."""
    if not inferers:
        return (
            "no inferer is live: start one with sluice up or python -m services.inferer "
            "(with `sluice up --min 0` the next job starts one)"
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
    table = Table(box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, overflow="fold", no_wrap=heading == "inferer")
    for entry in inferers:
        table.add_row(*(safe_text(cell(entry)) for cell in columns.values()))
    return table


def _cpu_list(numbers: list[int]) -> str:
    """``0-3,6``, the format of taskset."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges)


def jobs_table(inferers: list[InfererEntry], now: str) -> RenderableType:
    """One line per running job; ``now`` is the broker's time. Fits into 80 columns."""
    running = [(entry, job) for entry in inferers for job in entry.jobs]
    if not running:
        return "no running jobs"
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("job", no_wrap=True)
    table.add_column("inferer", overflow="fold", min_width=9)
    table.add_column("attempt", justify="right", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column()  # the bar, the first column to shrink
    table.add_column("tokens", no_wrap=True)
    for entry, job in sorted(running, key=lambda one: one[1].started_at):
        seconds = milliseconds_between(job.started_at, now) / 1000
        progress: tuple[RenderableType, str] = ("", "-")
        if job.work is None or job.work.task in TEXT_TASKS:
            bar = ProgressBar(job.max_tokens, job.completion_tokens, width=BAR_WIDTH)
            progress = bar, f"{job.completion_tokens}/{job.max_tokens}"
        cells = (safe_text(entry.id), str(job.attempt), f"{seconds:.1f} s", *progress)
        table.add_row(safe_text(job.id), *cells)
    return table


def _or_dash(number: float | None, form: str) -> str:
    return "-" if number is None else form.format(number)


def print_changes(changes: list[ConcurrencyChange]) -> None:
    for change in changes:
        if change.refused is None:
            out.print(safe_text(f"{change.inferer}: {change.before} → {change.concurrency}"))
        else:
            out.print(
                safe_text(f"{change.inferer}: still {change.before}: {change.refused}", "red")
            )


def print_models(catalogue: Catalogue) -> None:
    """One line per model, and below them where they were searched."""
    columns: dict[str, Callable[[ListedModel], str]] = {
        "model": lambda model: model.name,
        "size": lambda model: _size(model.size_bytes),
        "quantization": lambda model: model.quantization or "-",
        "context": lambda model: "-" if model.n_ctx is None else str(model.n_ctx),
        "chat": lambda model: "yes" if model.chat else "no",
    }
    table = Table(box=None, pad_edge=False)
    for heading in columns:
        align: Literal["left", "right"] = "right" if heading in ("size", "context") else "left"
        table.add_column(heading, justify=align, overflow="fold")
    for model in catalogue.models:
        if model.problem is None:
            table.add_row(*(safe_text(cell(model)) for cell in columns.values()))
        else:
            size = _size(model.size_bytes)
            table.add_row(safe_text(model.name), size, safe_text(model.problem, "red"))
    out.print(table if catalogue.models else "no models found")
    out.print(safe_text(f"searched: bundled models, {', '.join(catalogue.searched)}", "dim"))


def _size(size_bytes: int) -> str:
    """``94.6 MB``, ``4.9 GB``."""
    if size_bytes < 1e9:
        return f"{size_bytes / 1e6:.1f} MB"
    return f"{size_bytes / 1e9:.1f} GB"


SEVERITIES = {
    "ok": ("ok     ", "green"),
    "warning": ("warning", "yellow"),
    "error": ("ERROR  ", "red"),
}


def print_findings(findings: list[Finding]) -> None:
    for finding in findings:
        out.print(
            Text(*SEVERITIES[finding.severity]), safe_text(f"{finding.about}: {finding.found}")
        )
        if finding.advice is not None:
            out.print(safe_text(f"        → {finding.advice}"))


def discard_stdout() -> None:
    """Redirect stdout to /dev/null, so that flushing at exit does not fail as well."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
