"""What a response of OpenAI's Responses API says of itself beyond the job that it is."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from shared.wire.fields import Count, JobId

Label = Annotated[str, Meta(max_length=256)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ResponseForm(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Travels in the request, and from there in the result. The rest of what a response shows
    (its input, tools, format and options) is the job's request itself."""

    has_instructions: bool = False
    """Whether the first message is the `instructions`."""
    history: Count = 0
    """How many messages come before the input: the instructions, and those of the responses
    before."""
    previous: JobId | None = None
    """The job of `previous_response_id`."""
    background: bool = False
    store: bool = True
    """False: it cannot be read again."""
    effort: ReasoningEffort | None = None
    summary: Literal["auto"] | None = None
    max_tool_calls: Count | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
