"""Logs: one event a line; JSON unless a person is looking. Services log to stdout."""

import logging
import sys
from collections.abc import Sequence
from typing import TextIO

import structlog

from shared.printable import printable


def configure_logs(
    service: str, stream: TextIO | None = None, level: int = logging.INFO, **fields: str
) -> None:
    """Set up structlog for this process; every line carries ``service`` and ``fields``."""
    stream = stream or sys.stdout
    terminal = stream.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *(_for_people() if terminal else _for_programs()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, **fields)


def _for_people() -> Sequence[structlog.typing.Processor]:
    # Plain tracebacks: the others show local variables, and so prompts.
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    return structlog.processors.format_exc_info, _make_printable, plain


def _for_programs() -> Sequence[structlog.typing.Processor]:
    return structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()


def _make_printable(
    _: object, __: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Nothing that others have sent is obeyed by the terminal; what is not text is shown quoted."""
    return {
        name: printable(value) if isinstance(value, str) else value for name, value in event.items()
    }


def logger() -> structlog.typing.FilteringBoundLogger:
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return bound
