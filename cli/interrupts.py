"""Ctrl-C, SIGTERM, and a terminal that is closed: when they end a command."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGTERM, and a terminal that is closed, end the block as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = {name: signal.signal(name, interrupt) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """The first such signal ends the block only when it is done, the second at once.

    For requests whose answer must be known: a job that is submitted runs, whether or not its client
    has read its id.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    previous = {name: signal.signal(name, note) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
    if came:
        raise KeyboardInterrupt
