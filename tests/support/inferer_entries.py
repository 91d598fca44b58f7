"""What an inferer reports about itself, for tests that need no inferer."""

from typing import Any

from shared.timestamps import timestamp
from shared.wire.inferers import InfererEntry


def inferer_entry(**fields: Any) -> InfererEntry:
    """One with a single slot and no job, unless ``fields`` say otherwise."""
    known: dict[str, Any] = {
        "id": "i",
        "model": "m",
        "slots": 1,
        "host": "h",
        "threads": 1,
        "n_ctx": 4096,
        "tasks": ["chat", "complete"],
        "started_at": timestamp(),
        "version": "1",
    }
    return InfererEntry(**known | fields)
