"""Tries schemas, and checks answers, in processes that can be killed (`trial.py`)."""

import json
import threading
from typing import Any

import msgspec

from shared.bounded.process import BoundedProcess, BoundedProcesses, LimitExceeded
from shared.wire.requests import GrammarFormat, RegexFormat

MODULE = "shared.schemas.trial"


class SchemaTrials:
    """May be used from several threads at once: each has a process to itself. The first process is
    started by the first schema."""

    def __init__(self, trial_s: float) -> None:
        """A trial may take ``trial_s`` seconds. The CPU time of its process is limited, too."""
        self._trial_s = trial_s
        self._processes = BoundedProcesses(lambda: BoundedProcess.start(MODULE, None))

    def error(self, schema: Any, cancelled: threading.Event | None = None) -> str | None:
        """Why ``schema`` is refused, as a sentence; None if it can be enforced.

        Raises:
            OSError: no process could be started, or they are killed from outside.
            Cancelled: ``cancelled`` was set.
            LimitExceeded: it takes too much; the message is a sentence, too.
        """
        try:
            return self._request([schema], cancelled)
        except LimitExceeded as exceeded:
            raise LimitExceeded(
                f"the schema takes {exceeded} to compile; make it simpler"
            ) from None

    def language_error(
        self, form: GrammarFormat | RegexFormat, cancelled: threading.Event | None = None
    ) -> str | None:
        """Like `error`, for a grammar or a regular expression.

        Raises:
            OSError, Cancelled, LimitExceeded: as in `error`.
        """
        try:
            return self._request(msgspec.to_builtins(form), cancelled)
        except LimitExceeded as exceeded:
            raise LimitExceeded(f"takes {exceeded} to compile; make it simpler") from None

    def answer_error(self, schema: Any, answer: str) -> str | None:
        """Why ``answer`` is not valid under ``schema``; None if it is.

        Raises:
            OSError: as in `error`.
        """
        try:
            return self._request([schema, answer])
        except LimitExceeded as exceeded:
            return f"it takes {exceeded} to check it"

    def _request(
        self, body: list[Any] | dict[str, Any], cancelled: threading.Event | None = None
    ) -> str | None:
        cancelled = cancelled or threading.Event()
        try:
            error: str | None = self._processes.request(json.dumps(body), self._trial_s, cancelled)
        except ValueError as failure:
            raise OSError(f"the process that tries schemas failed: {failure}") from failure
        return error

    def close(self) -> None:
        self._processes.close()
