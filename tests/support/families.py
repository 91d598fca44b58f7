"""Tiny models with control tokens and chat templates in the manner of common families."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import llama_cpp

from services.inferer.engine.model import Model
from shared.answers.marks import (
    HARMONY,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    THINK,
    THINK_BRACKETS,
)
from shared.model_files import locate
from shared.wire.answers import AnswerFormat
from tests.support.gguf_fields import read_fields
from tests.support.tiny_model import write_tiny_model

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
TEMPLATE = "tokenizer.chat_template"
FIRST_UNUSED = 3
"""Of the bundled model's control tokens, which come first in its vocabulary: those after it can be
renamed."""


class Family(NamedTuple):
    format: AnswerFormat
    template: str
    control: list[str]
    """Tokens that add nothing to a text."""
    shown: Sequence[str] = ()
    """Tokens that stand for themselves in a text."""
    to_the_point: Sequence[str] = ()
    """What ends reasoning, or leads to a call."""


CHATML_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HERMES_MESSAGES = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
IM = ["<|im_start|>", "<|im_end|>"]
CALL_MARKS = ["<tool_call>", "</tool_call>"]
THINK_MARKS = ["<think>", "</think>"]

FAMILIES = {
    # Its marks are tokens of their own, and it may think first.
    "qwen": Family(
        AnswerFormat(THINK, HERMES),
        HERMES_MESSAGES
        + CHATML_END
        + "{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}",
        IM,
        CALL_MARKS + THINK_MARKS,
    ),
    # Its marks are written in many tokens.
    "hermes": Family(AnswerFormat("", HERMES), HERMES_MESSAGES + CHATML_END, IM),
    # The prompt begins its reasoning, and the marks are control tokens.
    "thinker": Family(
        AnswerFormat(THINK, HERMES),
        HERMES_MESSAGES
        + "{# </think> #}"
        + CHATML_END.replace("assistant\n", "assistant\n<think>\n"),
        IM + CALL_MARKS + THINK_MARKS,
        to_the_point=["</think>"],
    ),
    "llama": Family(
        AnswerFormat("", LLAMA),
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if tools and loop.index0 == 0 %}Answer with "
        '{"name": …, "parameters": …}:\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}'
        "{% endif %}{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}"
        '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'
        "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
    ),
    "mistral": Family(
        AnswerFormat("", MISTRAL),
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
        "{% endif %}[INST] {{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content | tojson }}[/TOOL_RESULTS]"
        "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
        "{% if c.id | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
        '"id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>'
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
    ),
    "magistral": Family(
        AnswerFormat(THINK_BRACKETS, MISTRAL_ARGS),
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
        "{% endif %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
        "{% else %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
        "</s>{% endif %}{% endfor %}{# [THINK] reasoning [/THINK] #}",
        ["[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "[AVAILABLE_TOOLS]"],
        to_the_point=["[TOOL_CALLS]"],
    ),
    "gpt-oss": Family(
        AnswerFormat(HARMONY, HARMONY),
        "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
        "{% for m in messages %}{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}"
        "<|start|>assistant<|channel|>commentary to=functions.{{ c.name }} <|constrain|>json"
        "<|message|>{{ c.arguments | tojson }}<|call|>"
        "{% elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>"
        "commentary<|message|>{{ m.content | tojson }}<|end|>"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "<|start|>assistant",
        ["<|end|>", "<|call|>", "<|return|>"],
        ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"],
        ["<|end|>", "commentary", " to"],
    ),
    # No tools in its template, like the bundled model: they are explained in words.
    "smollm": Family(
        AnswerFormat("", HERMES),
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + CHATML_END,
        IM,
    ),
    # Neither tools nor a system's message, and a user and an assistant take turns.
    "gemma": Family(
        AnswerFormat("", HERMES),
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('take turns') }}{% endif %}"
        "<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "<start_of_turn>model\n",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    # It walks over the parts of a message.
    "typed": Family(
        AnswerFormat("", HERMES),
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}" + CHATML_END,
        IM,
    ),
}


def write_family(folder: Path, name: str, seed: int = 7) -> Path:
    """A tiny model of the family, in a file of its name."""
    family = FAMILIES[name]
    fields = read_fields(locate("smollm2"))
    vocabulary, types = list(fields[TOKENS].value), list(fields[TYPES].value)
    kinds: Iterable[tuple[Sequence[str], int]] = (
        (family.control, llama_cpp.LLAMA_TOKEN_TYPE_CONTROL),
        (family.shown, llama_cpp.LLAMA_TOKEN_TYPE_USER_DEFINED),
    )
    at = FIRST_UNUSED
    for texts, kind in kinds:
        for text in texts:
            if text not in vocabulary:
                vocabulary[at], types[at] = text, kind
                at += 1
    metadata = {TOKENS: vocabulary, TYPES: types, TEMPLATE: family.template}
    return write_tiny_model(folder / f"{name}.gguf", metadata=metadata, seed=seed)


def brevity(path: Path) -> dict[str, int]:
    """The ``logit_bias`` with which an answer of this model of a family ends wherever it may, and
    reasoning, too: it has random weights, and would go on."""
    model = Model(path, 0, chat=False)
    texts = ["<|im_end|>", *FAMILIES[path.stem].to_the_point]
    bias = {str(model.tokenize(text, add_special=False)[0]): 60 for text in texts}
    # The end of one call and the beginning of the next in one token.
    bias[str(model.tokenize("><", add_special=False)[0])] = -100
    model.close()
    return bias
