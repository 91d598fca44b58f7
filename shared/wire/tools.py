"""Tools that a model may call, and its calls, in the form of OpenAI's API."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$(?!\n)")]
ToolCallId = Annotated[str, Meta(min_length=1, max_length=256)]
Parameters = Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
"""The JSON schema of arguments, as it was sent: see `NamedSchema`."""


class Function(Struct, frozen=True, omit_defaults=True):
    """``parameters`` is the JSON schema of the arguments, an object; without it there are none."""

    name: ToolName
    description: str | None = None
    parameters: Parameters | UnsetType = UNSET
    strict: bool | None = None
    """Whether a schema that cannot be enforced is an error. Otherwise any arguments will do."""

    @property
    def schema(self) -> dict[str, Any]:
        """Raises: ValueError, RecursionError: it cannot be read, or is not an object."""
        if self.parameters is UNSET or bytes(self.parameters).strip() in (b"null", b"{}"):
            return {"type": "object", "properties": {}}
        return {"type": "object", **msgspec.json.decode(self.parameters, type=dict[str, Any])}

    @property
    def texts(self) -> list[str]:
        """Everything in it that reaches the prompt."""
        parameters = b"" if self.parameters is UNSET else bytes(self.parameters)
        return [self.name, self.description or "", parameters.decode("utf-8", "replace")]


class Tool(Struct, frozen=True):
    type: Literal["function"]
    function: Function


MAX_TOOLS = 128
Tools = Annotated[Sequence[Tool], Meta(max_length=MAX_TOOLS)]


class ChosenFunction(Struct, frozen=True):
    name: ToolName


class ChosenTool(Struct, frozen=True):
    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Literal["none", "auto", "required"] | ChosenTool
"""Whether the model may call tools, or must, or must call a certain one."""


class FunctionCall(Struct, frozen=True):
    """``arguments`` is a JSON object, as text."""

    name: ToolName
    arguments: str

    @property
    def decoded_arguments(self) -> dict[str, Any]:
        """Raises: ValueError, RecursionError: they are not a JSON object."""
        return msgspec.json.decode(self.arguments.strip() or "{}", type=dict[str, Any])


class ToolCall(Struct, frozen=True):
    id: ToolCallId
    function: FunctionCall
    type: Literal["function"] = "function"
