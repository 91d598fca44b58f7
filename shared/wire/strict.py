"""Messages, tools and formats as clients send them: a name that is not known is an error. Stored
requests, whose structs these are derived from, may contain names of other versions."""

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta

from shared.wire.requests import (
    ChatMessage,
    GrammarFormat,
    JsonObject,
    JsonSchema,
    NamedSchema,
    PlainText,
    RegexFormat,
    TextPart,
)
from shared.wire.tools import MAX_TOOLS, ChosenFunction, ChosenTool, Function, Tool


class StrictTextPart(TextPart, frozen=True, forbid_unknown_fields=True):
    pass


class StrictMessage(ChatMessage, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The last four are null in an answer that OpenAI's client has read, and that is sent back.
    Calls, too, are sent back, with whatever other servers added to them: they are not strict."""

    content: str | Sequence[StrictTextPart] | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


StrictMessages = Annotated[Sequence[StrictMessage], Meta(min_length=1)]


class StrictFunction(Function, frozen=True, forbid_unknown_fields=True):
    pass


class StrictTool(Tool, frozen=True, forbid_unknown_fields=True):
    function: StrictFunction


StrictTools = Annotated[Sequence[StrictTool], Meta(max_length=MAX_TOOLS)]


class StrictChosenFunction(ChosenFunction, frozen=True, forbid_unknown_fields=True):
    pass


class StrictChosenTool(ChosenTool, frozen=True, forbid_unknown_fields=True):
    function: StrictChosenFunction


StrictToolChoice = Literal["none", "auto", "required"] | StrictChosenTool


class StrictPlainText(PlainText, frozen=True, forbid_unknown_fields=True):
    pass


class StrictJsonObject(JsonObject, frozen=True, forbid_unknown_fields=True):
    pass


class StrictNamedSchema(NamedSchema, frozen=True, forbid_unknown_fields=True):
    pass


class StrictJsonSchema(JsonSchema, frozen=True, forbid_unknown_fields=True):
    json_schema: StrictNamedSchema


class StrictGrammar(GrammarFormat, frozen=True, forbid_unknown_fields=True):
    pass


class StrictRegex(RegexFormat, frozen=True, forbid_unknown_fields=True):
    pass


StrictFormat = StrictPlainText | StrictJsonObject | StrictJsonSchema | StrictGrammar | StrictRegex
