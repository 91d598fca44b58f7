"""The marks with which families of models separate the parts of an answer."""

from typing import Final

from shared.wire.answers import PLAIN, AnswerFormat
from shared.wire.requests import ModelRequest

THINK: Final = "think"
THINK_BRACKETS: Final = "think_brackets"
REASONING: Final = {THINK: ("<think>", "</think>"), THINK_BRACKETS: ("[THINK]", "[/THINK]")}
"""The marks around the reasoning that an answer begins with."""

HERMES: Final = "hermes"
"""``<tool_call>{"name": …, "arguments": {…}}</tool_call>``: Hermes, Qwen, SmolLM and others."""
LLAMA: Final = "llama"
"""The whole answer is ``{"name": …, "parameters": {…}}``: Llama 3."""
MISTRAL: Final = "mistral"
"""``[TOOL_CALLS][{"name": …, "arguments": {…}}]``"""
MISTRAL_ARGS: Final = "mistral_args"
"""``[TOOL_CALLS]name[ARGS]{…}``: later models of Mistral."""
HARMONY: Final = "harmony"
"""gpt-oss: channels for reasoning, calls and the rest."""

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_CALLS, ARGS = "[TOOL_CALLS]", "[ARGS]"
PYTHON_TAG = "<|python_tag|>"
START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"


def marks(format: AnswerFormat) -> list[str]:
    """The marks that separate the parts of an answer. Some may be control tokens of the model."""
    reasoning = {**REASONING, HARMONY: (START, CHANNEL, MESSAGE, END, CONSTRAIN)}
    tools = {
        HERMES: (TOOL_CALL, END_TOOL_CALL),
        LLAMA: (PYTHON_TAG,),
        MISTRAL: (TOOL_CALLS,),
        MISTRAL_ARGS: (TOOL_CALLS, ARGS),
    }
    return [*reasoning.get(format.reasoning, ()), *tools.get(format.tools, ())]


def format_of(request: ModelRequest, format: AnswerFormat) -> AnswerFormat:
    """How a model with ``format`` writes its answer to ``request``: no template, no marks; and no
    calls of tools that it does not know of."""
    if request.messages is None:
        return PLAIN
    return AnswerFormat(format.reasoning, format.tools if request.offered_tools else "")
