"""Each schema is compiled first in a process that can be killed (`schema_trial.py`)."""

import json
import threading
from typing import Any

from services.inferer.bounded.process import BoundedProcess, BoundedProcesses, TookTooMuch
from shared.errors import ModelError

TRIAL_S = 10.0
"""How long a trial may take on a machine that is busy. Its process ends itself after less work."""


class SchemaTrials:
    """May be used from several threads at once: each use has a process to itself. The first one is
    started when there is a schema."""

    def __init__(self) -> None:
        self._processes = BoundedProcesses(_started)

    def why_not(self, schema: Any, cancelled: threading.Event | None = None) -> str | None:
        """Why ``schema`` cannot be followed; None if it can.

        Raises:
            ModelError: no process could be started, or they are killed from outside.
            Cancelled: ``cancelled`` was set meanwhile.
        """
        try:
            why: str | None = self._processes.ask(
                json.dumps(schema), TRIAL_S, cancelled or threading.Event()
            )
        except TookTooMuch as error:
            return f"it takes {error} to compile; make it simpler"
        except (OSError, ValueError) as error:
            raise ModelError(f"the process that tries schemas failed: {error}") from error
        return why

    def close(self) -> None:
        self._processes.close()


def _started() -> BoundedProcess:
    return BoundedProcess.started("services.inferer.bounded.schema_trial", None)
