"""The header ``Sluice-Nearest``: which inferer should get a job, if it is free."""

import re
from typing import NamedTuple

from shared.wire.subjects import is_token

_PRIORITY = re.compile("[0-9]")


class NearestInferer(NamedTuple):
    """The inferer that has computed the longest prefix of a job's prompt."""

    id: str
    priority: int
    """Its `INFERER_PRIORITY`. Inferers with a smaller number never hand a job over to it."""
    fingerprint: str
    """That of the prefix."""

    def header(self) -> str:
        return f"{self.id} {self.priority} {self.fingerprint}"

    @classmethod
    def read(cls, header: str) -> "NearestInferer | None":
        """Returns None if the header is empty or invalid."""
        match header.split(" "):
            case [id, priority, fingerprint] if is_token(id) and _PRIORITY.fullmatch(priority):
                return cls(id, int(priority), fingerprint)
        return None
