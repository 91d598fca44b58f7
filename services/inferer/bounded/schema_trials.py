"""Each schema is first compiled in a process that can be killed (`schema_trial.py`)."""

import json
import threading
from typing import Any

from services.inferer.bounded.process import BoundedProcess, BoundedProcesses, LimitExceeded
from shared.errors import ModelError

TRIAL_S = 10.0
"""How long a trial may take on a busy machine. The limits of its process are lower."""


class SchemaTrials:
    """May be used from several threads at once: each has a process to itself. The first process is
    started by the first schema."""

    def __init__(self) -> None:
        self._processes = BoundedProcesses(_start)

    def error(self, schema: Any, cancelled: threading.Event | None = None) -> str | None:
        """Why ``schema`` cannot be followed; None if it can.

        Raises:
            ModelError: no process could be started, or they are killed from outside.
            Cancelled: ``cancelled`` was set.
        """
        try:
            error: str | None = self._processes.request(
                json.dumps(schema), TRIAL_S, cancelled or threading.Event()
            )
        except LimitExceeded as exceeded:
            return f"it takes {exceeded} to compile; make it simpler"
        except (OSError, ValueError) as failure:
            raise ModelError(f"the process that tries schemas failed: {failure}") from failure
        return error

    def close(self) -> None:
        self._processes.close()


def _start() -> BoundedProcess:
    return BoundedProcess.start("services.inferer.bounded.schema_trial", None)
