"""``python -m services.inferer.bounded.template_renderer``: renders a chat template.

The template comes with the model and the messages from the client: together they may loop for hours
or fill the memory. Here they run in a process with limits, which its inferer can kill.

The first request is the template; the response is null or an error. Each further request has the
`messages` of a conversation, the `tools` and the `options` of the template; the response is
`{"prompt": …}` or `{"refused": …}`. A request of null asks for the names of the template's options;
the response is a list.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Name, Node, Template, Test
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


Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]], str]


def load(template: str, bos_token: str, eos_token: str) -> tuple[Render, list[str]]:
    """The function from messages, tools and options to a prompt, with what templates of Hugging
    Face expect; and the names of the template's options.

    Raises:
        jinja2.TemplateError: the template is not valid.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    loaded = environment.from_string(template)

    def render(
        messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> str:
        variables = {
            **options,
            "messages": messages,
            "bos_token": bos_token,
            "eos_token": eos_token,
            "add_generation_prompt": True,
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "tools": tools,
            "tool_choice": None,
            "functions": None,
            "function_call": None,
        }
        return loaded.render(variables)

    return render, _options(environment.parse(template))


def _options(template: Template) -> list[str]:
    """The variables that a template reads and never sets, or tests for before it sets them."""
    asked = {
        test.node.name
        for test in template.find_all(Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, Name)
    }
    own = {name.name for name in template.find_all(Name) if name.ctx in ("store", "param")}
    read = jinja2.meta.find_undeclared_variables(template)
    return sorted((read & asked) | (read - own))


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def main() -> None:
    limit_memory(MEMORY_BYTES)
    try:
        render, options = load(**read_request())
    except jinja2.TemplateError as error:
        respond(str(error))
        return
    respond(None)
    for request in requests(CPU_S):
        try:
            asked = json.loads(request)
            if asked is None:
                respond(options)
            else:
                respond({"prompt": render(asked["messages"], asked["tools"], asked["options"])})
        except MemoryError:
            respond({"refused": f"it takes more than {MEMORY_BYTES // 2**20} MiB of memory"})
        except Exception as error:  # a template may raise anything
            respond({"refused": f"{error}"[:1000] or type(error).__name__})


if __name__ == "__main__":
    main()
