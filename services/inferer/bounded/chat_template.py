"""A model's chat template, rendered in processes of its own (`template_renderer.py`)."""

import json
import threading
from typing import Any

from shared.bounded.process import BoundedProcess, BoundedProcesses, LimitExceeded
from shared.errors import InvalidRequest, ModelError

RENDER_S = 10.0
"""How long a conversation may take. It typically takes a millisecond."""
FIELD = "messages"


class ChatTemplate:
    """May be used from several threads at once: each has a process to itself."""

    def __init__(
        self, template: str, bos_token: str, eos_token: str, render_s: float = RENDER_S
    ) -> None:
        """Start a process with ``template``; a conversation may take ``render_s`` seconds.

        Raises:
            OSError: the process could not be started.
            ValueError: the template is not valid.
        """
        self._setup = {"template": template, "bos_token": bos_token, "eos_token": eos_token}
        self._render_s = render_s
        self._renderers = BoundedProcesses(self._start)
        self._renderers.start_one()

    def render(
        self,
        messages: list[dict[str, Any]],
        cancelled: threading.Event,
        *,
        tools: list[dict[str, Any]] | None = None,
        options: dict[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. ``options`` are further variables of the template.

        Raises:
            InvalidRequest: the template refuses the messages, or exceeds a limit.
            ModelError: no process could be started, or they are killed from outside.
            Cancelled: ``cancelled`` was set.
        """
        request = {"messages": messages, "tools": tools, "options": options or {}}
        response = self._request(request, cancelled)
        if "refused" in response:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {response['refused']}", FIELD
            )
        return str(response["prompt"])

    def options(self) -> list[str]:
        """The names of the options that the template has, and of what it gets anyway.

        Raises:
            InvalidRequest, ModelError: as `render`.
        """
        return list(self._request(None, threading.Event()))

    def close(self) -> None:
        self._renderers.close()

    def _request(self, request: dict[str, Any] | None, cancelled: threading.Event) -> Any:
        try:
            return self._renderers.request(json.dumps(request), self._render_s, cancelled)
        except LimitExceeded as error:
            raise InvalidRequest(
                f"the model's chat template takes {error} for this conversation; send less", FIELD
            ) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"the chat template's process failed: {error}") from error

    def _start(self) -> BoundedProcess:
        return BoundedProcess.start("services.inferer.bounded.template_renderer", self._setup)
