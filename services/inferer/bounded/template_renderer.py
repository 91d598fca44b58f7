"""``python -m services.inferer.bounded.template_renderer``: renders a chat template.

The template comes with the model and the messages from the client: together they may loop for hours
or fill the memory. Here they run in a process with limits, which its inferer can kill.

The first request is the template; the response is null or an error. Each further request is the
messages of a conversation; the response is `{"prompt": …}` or `{"refused": …}`.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.bounded.server import limit_memory, read_request, requests, respond

MEMORY_BYTES = 2**30
CPU_S = 10
"""For one conversation."""


class Generation(Extension):
    """Hugging Face's ``{% generation %}`` marks the model's own messages; a prompt has no marks."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def load(template: str, bos_token: str, eos_token: str) -> Callable[[list[dict[str, Any]]], str]:
    """The function from messages to a prompt, with what templates of Hugging Face expect.

    Raises:
        jinja2.TemplateError: the template is not valid.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    loaded = environment.from_string(template)

    def render(messages: list[dict[str, Any]]) -> str:
        return loaded.render(
            messages=messages,
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=True,
            raise_exception=_refuse,
            strftime_now=lambda form: datetime.now().strftime(form),
            tools=None,
            tool_choice=None,
            functions=None,
            function_call=None,
        )

    return render


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def main() -> None:
    limit_memory(MEMORY_BYTES)
    try:
        render = load(**read_request())
    except jinja2.TemplateError as error:
        respond(str(error))
        return
    respond(None)
    for request in requests(CPU_S):
        try:
            respond({"prompt": render(json.loads(request))})
        except MemoryError:
            respond({"refused": f"it takes more than {MEMORY_BYTES // 2**20} MiB of memory"})
        except Exception as error:  # a template may raise anything
            respond({"refused": f"{error}"[:1000] or type(error).__name__})


if __name__ == "__main__":
    main()
