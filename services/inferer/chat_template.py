"""A model's chat template, rendered in processes of its own (`template_renderer.py`)."""

import json
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from shared.errors import InvalidRequest, ModelError

RENDER_S = 10.0
"""How long a conversation may take. A usual one takes a millisecond."""
START_S = 60.0
"""How long a process may take to start on a machine that is busy."""
POLL_S = 0.05
LONGEST_PROMPT_BYTES = 64 * 2**20
FIELD = "messages"


class Cancelled(Exception):
    """Nobody needs the prompt any more."""


class ChatTemplate:
    """May be used from several threads at once: each use has a process to itself."""

    def __init__(self, template: str, bos_token: str, eos_token: str) -> None:
        """Start a first process with ``template``.

        Raises:
            ValueError: it is not a template.
        """
        self._start = json.dumps(
            {"template": template, "bos_token": bos_token, "eos_token": eos_token}
        )
        self._idle = [_Renderer(self._start)]

    def render(self, messages: list[dict[str, Any]], cancelled: threading.Event) -> str:
        """The prompt; a process that takes too long, or is no longer needed, is killed.

        Raises:
            InvalidRequest: the template refuses the messages, or takes too much time or memory.
            ModelError: no process could be started.
            Cancelled: ``cancelled`` was set meanwhile.
        """
        renderer = self._take()
        try:
            answer = renderer.ask(json.dumps(messages), RENDER_S, cancelled)
        except BaseException:
            renderer.kill()
            raise
        self._idle.append(renderer)
        if "refused" in answer:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {answer['refused']}", FIELD
            )
        return str(answer["prompt"])

    def close(self) -> None:
        while self._idle:
            self._idle.pop().kill()

    def _take(self) -> "_Renderer":
        while True:
            try:
                renderer = self._idle.pop()
            except IndexError:  # also where another thread was faster
                return self._another()
            if renderer.is_alive:
                return renderer
            renderer.kill()  # somebody else did, to make room perhaps: these messages did not

    def _another(self) -> "_Renderer":
        try:
            return _Renderer(self._start)
        except (OSError, ValueError) as error:
            raise ModelError(f"the chat template's process did not start: {error}") from error


class _Renderer:
    """One process; it ends when its stdin is closed, so also when the inferer is gone."""

    def __init__(self, start: str) -> None:
        """Raises: ValueError: not a template; OSError: it could not be started."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.inferer.template_renderer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for us, and we end it
        )
        try:
            why = self.ask(start, START_S, threading.Event())
        except BaseException as error:
            self.kill()
            if isinstance(error, InvalidRequest):
                raise ValueError(str(error)) from error
            raise
        if why is not None:
            self.kill()
            raise ValueError(why)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: str, within_s: float, cancelled: threading.Event) -> Any:
        """The answer to ``line``.

        Raises: InvalidRequest: none within the bounds; Cancelled.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        give_up_at = time.monotonic() + within_s
        unsent = memoryview(line.encode() + b"\n")
        received = bytearray()
        out, into = self._process.stdout.fileno(), self._process.stdin.fileno()
        os.set_blocking(into, False)
        while not received.endswith(b"\n"):
            if cancelled.is_set():
                raise Cancelled
            if time.monotonic() > give_up_at:
                raise _too_much(f"more than {within_s:.0f} s")
            if len(received) > LONGEST_PROMPT_BYTES:
                raise _too_much(f"more than {LONGEST_PROMPT_BYTES // 2**20} MiB of prompt")
            readable, writable, _ = select.select([out], [into] if unsent else [], [], POLL_S)
            try:
                if writable:
                    unsent = unsent[os.write(into, unsent) :]
            except BlockingIOError:
                pass
            except BrokenPipeError:
                raise _too_much("too much time or memory") from None
            if readable:
                more = os.read(out, 2**16)
                if not more:
                    raise _too_much("too much time or memory")
                received += more
        return json.loads(received)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _too_much(what: str) -> InvalidRequest:
    return InvalidRequest(f"the model's chat template takes {what} for these messages", FIELD)
