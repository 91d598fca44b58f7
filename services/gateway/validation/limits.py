"""What a gateway can say of a request before an inferer sees it."""

from typing import Any

import msgspec
from jsonschema_rs import Draft202012Validator, FancyRegexOptions, ValidationError
from msgspec import UNSET, Raw, UnsetType

from shared.errors import InvalidRequest, PromptTooLong
from shared.wire.api import JobSubmission
from shared.wire.codecs import encode
from shared.wire.inferers import ModelFacts
from shared.wire.requests import JsonSchema, NamedSchema

DEEPEST = 64
"""Levels of nesting that every part of Sluice can read back."""

LARGEST_METADATA_BYTES = 16 * 1024

LARGEST_SCHEMA_BYTES = 32 * 1024
"""Time to make a grammar of a schema can grow with the square of its size."""

LARGEST_INDENTATION = 8
"""How many times as large a schema may be with its white space."""

PATTERNS = FancyRegexOptions(size_limit=1024 * 1024)
"""Bytes of a compiled ``pattern``; they bound the time to compile it, too."""

LONGEST_REASON = 200
"""Characters; a reason quotes the part of the schema that is wrong."""

_META_SCHEMA = Draft202012Validator(
    {"$ref": "https://json-schema.org/draft/2020-12/schema"}, offline=True
)


def check(submission: JobSubmission, facts: ModelFacts | None) -> None:
    """Refuse what can be known to fail before an inferer sees it. Takes milliseconds at most,
    whatever is in the submission.

    Raises:
        InvalidRequest, PromptTooLong.
    """
    check_metadata(submission.metadata)
    if isinstance(submission.response_format, JsonSchema):
        check_schema(submission.response_format.json_schema)
    if facts is None:
        return
    if submission.max_tokens is not None and submission.max_tokens > facts.n_ctx:
        raise InvalidRequest(
            f"max_tokens: {submission.max_tokens} is more than the model's context of "
            f"{facts.n_ctx} tokens",
            "max_tokens",
        )
    if submission.messages is not None and not facts.chat:
        raise InvalidRequest(
            "this model has no chat template; send `prompt` instead of `messages`", "messages"
        )
    texts = [submission.prompt or ""] + [message.text for message in submission.messages or []]
    size = max(len(text.encode("utf-8")) for text in texts)
    if facts.token_bytes and size > facts.n_ctx * facts.token_bytes:
        raise PromptTooLong(
            f"the prompt has {size} bytes and cannot fit into the model's context of "
            f"{facts.n_ctx} tokens",
            "prompt" if submission.prompt is not None else "messages",
        )


def check_metadata(metadata: Raw | UnsetType) -> None:
    """Raises: InvalidRequest: it is not an object, or too large."""
    if metadata is UNSET:
        return
    if len(metadata) > LARGEST_METADATA_BYTES:
        raise InvalidRequest(
            f"metadata: has {len(metadata)} bytes, more than {LARGEST_METADATA_BYTES}; keep large "
            "data elsewhere and send a reference to it",
            "metadata",
        )
    try:
        value = msgspec.json.decode(metadata, type=dict[str, Any] | None)
    except msgspec.ValidationError:
        raise InvalidRequest("metadata must be an object", "metadata") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"metadata: cannot be read: {error}", "metadata") from None
    if _is_deeper(value, DEEPEST):
        raise InvalidRequest(f"metadata: nested more than {DEEPEST} levels deep", "metadata")


def check_schema(named: NamedSchema) -> None:
    """Raises: InvalidRequest: it is not a schema, or too large."""
    too_large = InvalidRequest(
        f"response_format: the schema has more than {LARGEST_SCHEMA_BYTES} bytes", "response_format"
    )
    if len(named.source) > LARGEST_INDENTATION * LARGEST_SCHEMA_BYTES:
        raise too_large
    try:
        schema = named.schema
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"response_format: the schema cannot be read: {error}", "response_format"
        ) from None
    if _is_deeper(schema, DEEPEST):
        raise InvalidRequest(
            f"response_format: the schema is nested more than {DEEPEST} levels deep",
            "response_format",
        )
    if len(encode(schema)) > LARGEST_SCHEMA_BYTES:
        raise too_large
    try:
        _META_SCHEMA.validate(schema)
        # To compile it shows what is wrong with its patterns and references.
        Draft202012Validator(schema, offline=True, pattern_options=PATTERNS)
    except ValidationError as error:
        reason = error.message
        if len(reason) > LONGEST_REASON:
            reason = reason[:LONGEST_REASON] + "…"
        raise InvalidRequest(
            f"response_format: not a valid JSON schema: {reason}", "response_format"
        ) from None


def _is_deeper(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_is_deeper(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_is_deeper(item, levels - 1) for item in value)
    return False
