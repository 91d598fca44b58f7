"""The items of an input, as clients send them. A name that is not known is an error."""

from typing import Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from shared.wire.tools import ToolCallId, ToolName

Unused = Raw | UnsetType
"""What has no effect: clients send back what they got."""


class InputText(
    Struct, frozen=True, tag_field="type", tag="input_text", forbid_unknown_fields=True
):
    text: str
    prompt_cache_breakpoint: Unused = UNSET


class OutputText(
    Struct, frozen=True, tag_field="type", tag="output_text", forbid_unknown_fields=True
):
    text: str
    annotations: Unused = UNSET
    logprobs: Unused = UNSET


class Refusal(Struct, frozen=True, tag_field="type", tag="refusal", forbid_unknown_fields=True):
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ReasoningText(Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    type: str | None = None


class AnyItem(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Unused = UNSET
    """Known from the `_Head`."""
    id: Unused = UNSET
    status: Unused = UNSET


class MessageItem(AnyItem, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]


class AnswerItem(AnyItem, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message of the role `assistant`."""

    role: Literal["assistant"]
    content: str | list[OutputText | Refusal | InputText]
    phase: Unused = UNSET


class CallPart(AnyItem, frozen=True, kw_only=True, forbid_unknown_fields=True):
    call_id: ToolCallId
    caller: Unused = UNSET
    namespace: Unused = UNSET
    created_by: Unused = UNSET


class CallItem(CallPart, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: ToolName
    arguments: str
    is_async: Unused = msgspec.field(name="async", default=UNSET)


class CallOutputItem(CallPart, frozen=True, kw_only=True, forbid_unknown_fields=True):
    output: str | list[InputText | OutputText]
    name: Unused = UNSET


class ReasoningItem(AnyItem, frozen=True, kw_only=True, forbid_unknown_fields=True):
    summary: list[ReasoningText] = []
    content: list[ReasoningText] | None = None
    encrypted_content: Unused = UNSET
