"""Logs: one event per line, as JSON unless the stream is a terminal. Services log to stdout.

Logging neither raises nor blocks, even if the stream fails (`LogWriter`).
"""

import atexit
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, Processor

from shared.log_writer import LogWriter
from shared.printable import printable

DRAIN_S = 1.0
"""How long an exiting process waits for its last lines."""

_writers: list[LogWriter] = []


def configure_logs(
    service: str,
    stream: TextIO | None = None,
    level: int = logging.INFO,
    renderer: Processor | None = None,
    **fields: str,
) -> None:
    """Set up structlog for this process. Every event has ``service`` and ``fields``. ``renderer``
    turns events into lines; by default they are JSON, or for people if ``stream`` is a terminal."""
    stream = stream or sys.stdout
    if renderer is not None:
        rendering_processors: Sequence[Processor] = (_exceptions_as_fields, renderer)
    elif stream is not None and stream.isatty():
        rendering_processors = _console_processors()
    else:
        rendering_processors = _json_processors()

    def add_fields(_: object, __: str, event: EventDict) -> EventDict:
        return {"service": service, **fields, **event}

    processors: list[Processor] = [
        add_fields,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        *rendering_processors,
    ]
    wrapper = structlog.make_filtering_bound_logger(level)
    rendering = structlog.wrap_logger(
        structlog.ReturnLogger(), processors=processors, wrapper_class=wrapper
    )

    def dropped_line(lines: int) -> str:
        return str(rendering.error("log_lines_dropped", lines=lines))

    writer = LogWriter(_descriptor(stream), dropped_line)
    _writers.append(writer)
    structlog.configure(
        processors=processors,
        wrapper_class=wrapper,
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, writer)),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        level=max(level, logging.WARNING), handlers=[_StandardLogging()], force=True
    )
    atexit.register(drain_logs)


def logger() -> structlog.typing.FilteringBoundLogger:
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return bound


def write_raw_lines(lines: str) -> None:
    """Write complete lines of another process to the log, unchanged."""
    for writer in _writers[-1:]:
        writer.write(lines)


def drain_logs() -> None:
    """Wait until all lines are written, for a second at most. To be called before the process ends
    without running exit handlers, and before other output that must come after the log."""
    for writer in _writers:
        writer.drain(DRAIN_S)


# Neither form of traceback shows local variables, which hold prompts and answers.
_exceptions_as_fields = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


def _console_processors() -> Sequence[Processor]:
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    return structlog.processors.format_exc_info, _make_printable, plain


def _json_processors() -> Sequence[Processor]:
    return _exceptions_as_fields, structlog.processors.JSONRenderer()


def _make_printable(_: object, __: str, event: EventDict) -> EventDict:
    """Escape control characters in strings from outside, for the terminal."""
    return {
        name: printable(value) if isinstance(value, str) else value for name, value in event.items()
    }


def _descriptor(stream: TextIO | None) -> int:
    """The descriptor of ``stream``; /dev/null if the process was started without one, since another
    file may have its number."""
    return os.open(os.devnull, os.O_WRONLY) if stream is None else stream.fileno()


class _StandardLogging(logging.Handler):
    """Converts log records of asyncio, uvicorn and nats-py to structlog events."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        logger().log(record.levelno, "library_message", **fields)
