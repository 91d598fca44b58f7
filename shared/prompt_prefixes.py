"""Fingerprints of the prefixes of prompts: which inferer has computed a part of a prompt before."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from hashlib import blake2b

from shared.wire.requests import ModelRequest

SHORTEST = 400
"""Characters. Shorter prefixes are not worth a handover."""
BLOCK = 1000
"""Characters between two fingerprints of a prompt without messages."""
MOST = 32
"""Fingerprints of one prompt: those of its longest prefixes."""
REMEMBERED = 64
"""Fingerprints that an inferer remembers: about a kilobyte of its entry."""


def fingerprints(owner: str, request: ModelRequest) -> list[str]:
    """The fingerprints of a prompt's prefixes, the shortest first. Prompts of different owners have
    none in common, nor have those for different adapters."""
    whose = owner if request.adapter is None else f"{owner}\0{request.adapter}"
    digest, length = blake2b(whose.encode(), digest_size=8), 0
    found = []
    parts = _parts(request)
    for left, part in zip(range(len(parts), 0, -1), parts, strict=True):
        digest.update(part.encode() + b"\0")
        length += len(part)
        if length >= SHORTEST and left <= MOST:
            found.append(digest.copy().hexdigest())
    return found


def _parts(request: ModelRequest) -> list[str]:
    """The parts of a prompt. Prompts that begin alike have their first parts in common."""
    if request.messages is None:
        prompt = request.prompt or ""
        whole = len(prompt) // BLOCK * BLOCK
        return [prompt[start : start + BLOCK] for start in range(0, whole, BLOCK)]
    tools = ["\0".join(tool.function.texts) for tool in request.offered_tools]
    messages = [f"{message.role}:{''.join(message.texts)}" for message in request.messages]
    return tools + messages


class PromptPrefixes:
    """Fingerprints of the prompts that an inferer has computed recently."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, None] = OrderedDict()

    def add(self, found: Iterable[str]) -> bool:
        """Returns whether any of them is new."""
        are_new = False
        for fingerprint in found:
            are_new |= fingerprint not in self._known
            self._known[fingerprint] = None
            self._known.move_to_end(fingerprint)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return are_new

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)
