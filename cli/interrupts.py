"""How Ctrl-C, SIGTERM and SIGHUP (the terminal was closed) end a command."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block like Ctrl-C, with KeyboardInterrupt."""

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
    """The first signal takes effect after the block, a second one at once.

    For requests whose response is needed: a submitted job runs even if its id was not read.
    """
    received: list[int] = []

    def remember(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    previous = {name: signal.signal(name, remember) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
    if received:
        raise KeyboardInterrupt
