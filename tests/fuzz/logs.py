"""What no log may say, whatever was sent."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.parts import Node, Part

FORBIDDEN = (
    "Traceback",
    "request_crashed",
    "job_crashed",
    "internal_error",
    "never retrieved",
    "was never awaited",
)
LONGEST_TEXT = 2_000


class Logs:
    """Reads on where it stopped."""

    def __init__(self) -> None:
        self._read: dict[Path, int] = defaultdict(int)

    def faults(self, parts: list[Part]) -> Iterator[tuple[str, str]]:
        """``(kind, text)`` of each new line that no log should have; with what follows it, if it
        begins a traceback."""
        for part in parts:
            if isinstance(part, Node):
                continue  # it says of every client that it cannot read what that sent
            service = part.name.partition("-")[0]
            for log in list(part.logs):
                lines = self._new_lines(log)
                for at, line in enumerate(lines):
                    what = next((words for words in FORBIDDEN if words in line), None)
                    if what is not None:
                        text, error = _described(lines[at:])
                        yield f"{what} in a log of {service}: {error}", f"{part.name}: {text}"

    def _new_lines(self, log: Path) -> list[str]:
        with log.open("rb") as file:
            file.seek(self._read[log])
            data = file.read()
        whole = data.rpartition(b"\n")[0]
        self._read[log] += len(whole) + (1 if whole else 0)
        return whole.decode("utf-8", "replace").splitlines()


def _described(lines: list[str]) -> tuple[str, str]:
    """What is wrong with the first line, and the name of the error."""
    if lines[0].startswith("{"):
        names = re.findall(r'"exc_type": "([^"]*)"', lines[0])
        return lines[0][:LONGEST_TEXT], " ".join(names) or lines[0][:60]
    end = next((at for at, line in enumerate(lines[1:], 1) if not line.startswith(" ")), 0)
    return "\n".join(lines[: end + 1])[-LONGEST_TEXT:], re.sub(r"\d+", "N", lines[end])[:80]
