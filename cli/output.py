"""What a person reads: answers on stdout, everything about them on stderr."""

import sys
from collections.abc import Callable

import msgspec
from msgspec import UNSET
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from cli.doctor.finding import Finding
from shared.messages import ConcurrencyChange, InfererEntry, JobStatus, ModelQueue, RunningJob
from shared.subjects import CLASSES

WIDE = 1000
"""Columns where nobody looks: a program that reads a table wants the ids whole."""

out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, soft_wrap=True, highlight=False)

COLOURS = {"SUCCESS": "green", "FAILURE": "red", "REVOKED": "yellow", "STARTED": "cyan"}


def print_json(value: object) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode("utf-8") + "\n")
    sys.stdout.flush()


def print_tokens(text: str) -> None:
    """Part of an answer, as it comes; not interpreted in any way."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_status(status: JobStatus) -> None:
    table = Table.grid(padding=(0, 2))
    rows: list[tuple[str, str | None]] = [
        ("id", status.id),
        ("retry of", status.retry_of or None),
        ("model", status.model),
        ("attempts", str(status.attempts)),
        ("inferer", status.inferer),
        ("queued at", status.queued_at),
        ("started at", status.started_at),
        ("finished at", status.finished_at),
    ]
    table.add_row("state", Text(status.state, COLOURS.get(status.state, "")))
    for name, value in rows:
        if value is not None:
            table.add_row(name, Text(value))
    if status.error is not None:
        table.add_row("error", Text(f"{status.error.code}: {status.error.message}"))
    if status.timings is not None:
        table.add_row("timings", Text(timings_line(status)))
    if (outlook := outlook_line(status)) is not None:
        table.add_row("outlook", Text(outlook))
    out.print(table)
    if status.result is not None:
        out.print(Text(status.result.text))


def timings_line(status: JobStatus) -> str:
    """``waited 0.1 s, first token after 0.3 s, 64 tokens at 80.1 tokens/s``."""
    if status.timings is None:
        return ""
    parts = [f"waited {status.timings.queued_ms / 1000:.2f} s"]
    if status.timings.first_token_ms is not None:
        parts.append(f"first token after {status.timings.first_token_ms / 1000:.2f} s")
    if status.result is not None:
        parts.append(f"{status.result.usage.completion_tokens} tokens")
    if status.timings.tokens_per_s is not None:
        parts[-1] += f" at {status.timings.tokens_per_s:.1f} tokens/s"
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
        table.add_row(model.model, *map(str, numbers), oldest, _by_class(model))
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
        table.add_row(*(Text(cell(entry)) for cell in columns.values()))
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
            out.print(Text(f"{change.inferer}: {change.before} → {change.concurrency}"))
        else:
            out.print(Text(f"{change.inferer}: stays at {change.before}: {change.refused}", "red"))


VERDICTS = {"ok": ("ok   ", "green"), "look": ("look ", "yellow"), "wrong": ("WRONG", "red")}


def print_findings(findings: list[Finding]) -> None:
    for finding in findings:
        out.print(Text.assemble(VERDICTS[finding.verdict], f" {finding.about}: {finding.found}"))
        if finding.advice is not None:
            out.print(Text(f"      → {finding.advice}"))
