"""Tools and formats as clients send them: a name that is not known is an error. Stored requests,
whose structs these are derived from, may contain names of other versions."""

from typing import Annotated, Literal

from msgspec import Meta

from shared.wire.requests import (
    GrammarFormat,
    JsonObject,
    JsonSchema,
    NamedSchema,
    PlainText,
    RegexFormat,
)
from shared.wire.tools import MAX_TOOLS, ChosenFunction, ChosenTool, Function, Tool


class StrictFunction(Function, frozen=True, forbid_unknown_fields=True):
    pass


class StrictTool(Tool, frozen=True, forbid_unknown_fields=True):
    function: StrictFunction


StrictTools = Annotated[list[StrictTool], Meta(max_length=MAX_TOOLS)]


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
