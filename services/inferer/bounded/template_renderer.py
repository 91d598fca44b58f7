"""``python -m services.inferer.bounded.template_renderer``: renders a chat template for an inferer.

The template is the model's and the messages are the caller's: together they may loop for hours or
fill the memory. Here they are in a process that its inferer can kill, with bounds of its own.

The first question is the template, answered with null or with what is wrong with it; then come the
messages of one conversation after another, each answered with `{"prompt": …}` or
`{"refused": …}`.
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

from services.inferer.bounded.answering import answer, bound_memory, questions, read

MEMORY_BYTES = 2**30
CPU_S = 10
"""For one conversation."""


class Generation(Extension):
    """Hugging Face's ``{% generation %}`` marks what a model has said; a prompt shows no marks."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def load(template: str, bos_token: str, eos_token: str) -> Callable[[list[dict[str, Any]]], str]:
    """The function that makes a prompt of messages, with what templates of Hugging Face expect.

    Raises:
        jinja2.TemplateError: it is not a template.
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


def _refuse(why: str) -> None:
    raise jinja2.TemplateError(why)


def main() -> None:
    bound_memory(MEMORY_BYTES)
    try:
        render = load(**read())
    except jinja2.TemplateError as error:
        answer(str(error))
        return
    answer(None)
    for question in questions(CPU_S):
        try:
            answer({"prompt": render(json.loads(question))})
        except MemoryError:
            answer({"refused": f"it takes more than {MEMORY_BYTES // 2**20} MiB of memory"})
        except Exception as error:  # a template may stumble over anything
            answer({"refused": f"{error}"[:1000] or type(error).__name__})


if __name__ == "__main__":
    main()
