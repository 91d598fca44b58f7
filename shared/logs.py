"""Logs: one event a line; JSON unless a person is looking. Services log to stdout.

Logging neither raises nor blocks, whatever becomes of the stream (`LogWriter`).
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
"""What a process that ends waits for its last lines to be written."""

_writers: list[LogWriter] = []


def configure_logs(
    service: str, stream: TextIO | None = None, level: int = logging.INFO, **fields: str
) -> None:
    """Set up structlog for this process; every line carries ``service`` and ``fields``."""
    stream = stream or sys.stdout
    is_terminal = stream is not None and stream.isatty()

    def add_fields(_: object, __: str, event: EventDict) -> EventDict:
        return {"service": service, **fields, **event}

    processors: list[Processor] = [
        add_fields,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        *(_for_people() if is_terminal else _for_programs()),
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
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[_FromLibraries()], force=True)
    atexit.register(drain_logs)


def logger() -> structlog.typing.FilteringBoundLogger:
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return bound


def pass_on_lines(lines: str) -> None:
    """Write whole lines of another process among our own, as they are."""
    for writer in _writers[-1:]:
        writer.write(lines)


def drain_logs() -> None:
    """Wait until what was logged is written, for a second at most: before the process ends in a
    way that runs no exit handlers, and before a line that is to stand after it."""
    for writer in _writers:
        writer.drain(DRAIN_S)


# Neither form of traceback shows local variables, which hold prompts and answers.
_traceback_as_fields = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


def _for_people() -> Sequence[Processor]:
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    return structlog.processors.format_exc_info, _make_printable, plain


def _for_programs() -> Sequence[Processor]:
    return _traceback_as_fields, structlog.processors.JSONRenderer()


def _make_printable(_: object, __: str, event: EventDict) -> EventDict:
    """Nothing that others have sent is obeyed by the terminal; what is not text is shown quoted."""
    return {
        name: printable(value) if isinstance(value, str) else value for name, value in event.items()
    }


def _descriptor(stream: TextIO | None) -> int:
    """That of ``stream``, or of a file that takes everything if the process was started without:
    another file may have got its number."""
    return os.open(os.devnull, os.O_WRONLY) if stream is None else stream.fileno()


class _FromLibraries(logging.Handler):
    """What asyncio, uvicorn and nats-py log becomes lines like ours."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        logger().log(record.levelno, "library_message", **fields)
