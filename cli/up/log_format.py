"""Renders the logs of `sluice up` for people: short lines about starts and problems."""

import json
import re
import sys
from typing import Any, Literal

from structlog.typing import EventDict

from shared.printable import printable

LogFormat = Literal["auto", "plain", "json"]

BROKER_LINE = re.compile(r"\[\d+\] \S+ \S+ \[(?P<level>[A-Z]{3})\] (?P<text>.*)")
"""A log line of nats-server: process, date, time, level, text."""

BROKER_PROBLEMS = {"WRN": "warning", "ERR": "error", "FTL": "error"}
PROBLEMS = ("warning", "error", "critical")


def is_plain(log_format: LogFormat) -> bool:
    """Whether logs are for a person: on request, and by default if stderr is a terminal."""
    return log_format == "plain" or (log_format == "auto" and sys.stderr.isatty())


def render_event(_: object, __: str, event: EventDict) -> str:
    """A structlog processor for the events of `sluice up` itself."""
    return printable(_render(event.pop("child", "up"), dict(event)))


def render_output(part: str, line: str) -> str | None:
    """A line of output of the child ``part``; None to omit it. Of log lines only problems are
    shown, other lines always."""
    if match := BROKER_LINE.match(line):
        level = BROKER_PROBLEMS.get(match["level"])
        return level and printable(f"{part}: {level}: {match['text']}")
    event = _parse(line)
    if event is None:
        return printable(f"{part}: {line}")
    return printable(_render(part, event)) if event.get("level") in PROBLEMS else None


def _parse(line: str) -> dict[str, Any] | None:
    """The log event in ``line``; None if it is not one."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _render(part: str, event: dict[str, Any]) -> str:
    name, level = event.pop("event"), event.pop("level", "info")
    for field in ("service", "timestamp", "inferer"):
        event.pop(field, None)
    if name == "child_started":
        return f"{part}: started (process {event['pid']})"
    if name == "waiting_for_jobs":
        return (
            f"{part}: waiting for running jobs, up to {event['up_to_s']:g} s; "
            "Ctrl-C again ends everything at once"
        )
    if name == "child_died":
        last_output = f" ({event['last_output']})" if event["last_output"] else ""
        return (
            f"{part}: ended with {event['cause']}{last_output}; "
            f"restarting in {event['pause_s']:g} s"
        )
    details = ", ".join(f"{field}={_brief(value)}" for field, value in event.items())
    severity = f"{level}: " if level in PROBLEMS else ""
    return f"{part}: {severity}{name.replace('_', ' ')}" + (f" ({details})" if details else "")


def _brief(value: Any) -> str:
    """A value of an event in one line; of an exception, its last type and text."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return ": ".join(str(value[-1].get(name)) for name in ("exc_type", "exc_value"))
    return str(value)
