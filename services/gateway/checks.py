"""What a gateway can say of a request before an inferer sees it."""

import asyncio
from typing import Any

from jsonschema import Draft202012Validator, SchemaError

from shared.errors import InvalidRequest, PromptTooLong
from shared.messages import JobSubmission, JsonSchema, ModelFacts, encode

DEEPEST = 64
"""Levels of nesting that every part of Sluice can read back."""

LARGEST_SCHEMA_BYTES = 32 * 1024
"""Time to check a schema, and to make a grammar of it, can grow with the square of its size."""


async def check(submission: JobSubmission, facts: ModelFacts | None) -> None:
    """Refuse what can be known to fail before an inferer sees it.

    Raises:
        InvalidRequest, PromptTooLong.
    """
    if _is_deeper(submission.metadata, DEEPEST):
        raise InvalidRequest(f"metadata: nested more than {DEEPEST} levels deep", "metadata")
    if isinstance(submission.response_format, JsonSchema):
        schema = submission.response_format.json_schema.schema
        if _is_deeper(schema, DEEPEST):
            raise InvalidRequest(
                f"response_format: the schema is nested more than {DEEPEST} levels deep",
                "response_format",
            )
        if len(encode(schema)) > LARGEST_SCHEMA_BYTES:
            raise InvalidRequest(
                f"response_format: the schema has more than {LARGEST_SCHEMA_BYTES} bytes",
                "response_format",
            )
        # Some schemas take a validator long.
        await asyncio.to_thread(_check_schema, schema)
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


def _check_schema(schema: dict[str, Any]) -> None:
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise InvalidRequest(
            f"response_format: not a valid JSON schema: {error.message}", "response_format"
        ) from None


def _is_deeper(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_is_deeper(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_is_deeper(item, levels - 1) for item in value)
    return False
