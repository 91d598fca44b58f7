"""What a person reads: answers on stdout, everything about them on stderr."""

import sys

import msgspec
from msgspec import UNSET
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.doctor import Finding
from shared.messages import ConcurrencyChange, InfererEntry, JobStatus, ModelQueue

out = Console(soft_wrap=True, highlight=False)
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
    if not models:
        out.print("no model is served yet: start an inferer")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "waiting", "in flight", "limit", "inferers", "oldest waits"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model in models:
        oldest = "-" if model.oldest_s is None else f"{model.oldest_s:.1f} s"
        numbers = (model.waiting, model.in_flight, model.limit, model.inferers)
        table.add_row(model.model, *map(str, numbers), oldest)
    out.print(table)


def print_inferers(inferers: list[InfererEntry]) -> None:
    if not inferers:
        out.print("no inferer is live: start one with sluice up, or python -m services.inferer")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("inferer", "model", "host", "state", "slots", "threads", "CPUs", "tokens/s"):
        table.add_column(heading)
    table.add_column("runs")
    for entry in inferers:
        speed = "-" if entry.tokens_per_s is None else f"{entry.tokens_per_s:.1f}"
        runs = ", ".join(
            f"{job.id} ({job.completion_tokens} of {job.max_tokens} tokens)" for job in entry.jobs
        )
        cells = (entry.slots, entry.threads, ",".join(map(str, entry.cpus)), speed, runs or "-")
        table.add_row(entry.id, entry.model, entry.host, entry.state, *map(str, cells))
    out.print(table)


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
