"""The properties of a response of OpenAI's Responses API that other jobs do not have."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from shared.wire.fields import Count, JobId

Label = Annotated[str, Meta(max_length=256)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ResponseForm(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Is part of the request, and is copied from there to the result. The other properties of a
    response (its input, tools, format and options) are those of the job's request."""

    has_instructions: bool = False
    """Whether the first message is the `instructions`."""
    history: Count = 0
    """How many messages precede the input: the instructions, and those of earlier responses."""
    previous: JobId | None = None
    """The job of `previous_response_id`."""
    background: bool = False
    store: bool = True
    """Whether the response can be read again."""
    effort: ReasoningEffort | None = None
    summary: Literal["auto"] | None = None
    max_tool_calls: Count | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
