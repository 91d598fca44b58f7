"""The code blocks of a page, and whether a command showed what the page shows.

Below a command in a `console` block stand lines of its output, in their order. Numbers, times, ids
and the width of columns may differ; ``…`` stands for lines that are left out, and at the end of a
line for the rest of it.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from tests.support.processes import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
]
LEFT_OUT = "…"
BLOCK = re.compile(r"^```(console|sh|bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
VARIABLE = re.compile(
    r"[0-9a-f]{8}-[0-9a-f-]{27}"  # an id of a job
    r"|\b[A-Za-z0-9]{22}\b"  # of a service
    r"|\d{4}-\d\d-\d\dT[\d:.]+Z?"
    r"|never|(?<![A-Za-z])\d[\d.,:]*(?:\s?(?:[KMG]i)?B\b|[µmn]?s\b)?"
)


class Command(Struct, frozen=True):
    """A program in Python, or a command with the output that the page shows."""

    page: str
    language: str
    text: str
    shown: list[str] = []

    def has(self, part: str) -> bool:
        return part in "\n".join([self.text, *self.shown])


def commands_of(page: Path) -> Iterator[Command]:
    """In their order. Every line of a `sh` or `bash` block is a command; in a `console` block
    those after ``$``, with the lines that continue them."""
    name = str(page.relative_to(ROOT))
    for language, text in BLOCK.findall(page.read_text()):
        if language == "python":
            yield Command(name, language, text)
            continue
        lines = iter(text.splitlines())
        found: list[Command] = []
        for line in lines:
            if language == "console" and not line.startswith("$ "):
                assert found, f"{name}: output without a command: {line}"
                found[-1].shown.append(line)
                continue
            command = line.removeprefix("$ ") if language == "console" else line
            while not _is_complete(command):
                command += "\n" + next(lines)
            found.append(Command(name, language, command, []))
        yield from found


def _is_complete(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:  # a quotation that goes on in the next line
        return False
    return not command.endswith("\\")


def shows(output: str, shown: list[str]) -> bool:
    """Whether all lines of ``shown`` are in ``output``, in this order."""
    lines = iter([_comparable(line) for line in ESCAPE.sub("", output).splitlines()])
    wanted = [_comparable(line) for line in shown if line != LEFT_OUT]
    return all(any(_is_like(line, one) for line in lines) for one in wanted)


def _is_like(line: str, wanted: str) -> bool:
    if wanted.endswith(LEFT_OUT):
        return line.startswith(wanted.removesuffix(LEFT_OUT).rstrip())
    return line == wanted


def _comparable(line: str) -> str:
    line = VARIABLE.sub("0", line)
    return re.sub(r"─+", "─", " ".join(line.split()))
