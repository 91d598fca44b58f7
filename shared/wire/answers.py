"""How a model writes its answers."""

from typing import Annotated

from msgspec import Meta, Struct

FormatName = Annotated[str, Meta(max_length=32)]


class AnswerFormat(Struct, frozen=True, omit_defaults=True):
    """How reasoning and tool calls are marked in the text of a model's answers
    (`shared/answers`). Empty where there are none; a name that this version does not know counts
    as empty."""

    reasoning: FormatName = ""
    tools: FormatName = ""


PLAIN = AnswerFormat()
"""Nothing is marked: all of the text is for the user."""
