"""A model's chat template, rendered in processes of its own (`template_renderer.py`)."""

import json
import threading
from typing import Any

from services.inferer.bounded.process import BoundedProcess, BoundedProcesses, TookTooMuch
from shared.errors import InvalidRequest, ModelError

RENDER_S = 10.0
"""What a conversation may take. A usual one takes a millisecond."""
FIELD = "messages"


class ChatTemplate:
    """May be used from several threads at once: each use has a process to itself."""

    def __init__(
        self, template: str, bos_token: str, eos_token: str, render_s: float = RENDER_S
    ) -> None:
        """Start a first process with ``template``; a conversation may take ``render_s`` seconds.

        Raises:
            OSError: it could not be started.
            ValueError: it is not a template.
        """
        self._greeting = {"template": template, "bos_token": bos_token, "eos_token": eos_token}
        self._render_s = render_s
        self._renderers = BoundedProcesses(self._started)
        self._renderers.keep_one_ready()

    def render(self, messages: list[dict[str, Any]], cancelled: threading.Event) -> str:
        """The prompt; a process that takes too long, or is no longer needed, is killed.

        Raises:
            InvalidRequest: the template refuses the messages, or takes too much time or memory.
            ModelError: no process could be started, or they are killed from outside.
            Cancelled: ``cancelled`` was set meanwhile.
        """
        try:
            answer = self._renderers.ask(json.dumps(messages), self._render_s, cancelled)
        except TookTooMuch as error:
            raise InvalidRequest(
                f"the model's chat template takes {error} for these messages", FIELD
            ) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"the chat template's process failed: {error}") from error
        if "refused" in answer:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {answer['refused']}", FIELD
            )
        return str(answer["prompt"])

    def close(self) -> None:
        self._renderers.close()

    def _started(self) -> BoundedProcess:
        return BoundedProcess.started("services.inferer.bounded.template_renderer", self._greeting)
