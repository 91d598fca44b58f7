"""Checks of a submission that need no inferer."""

from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from shared.errors import InvalidRequest, PromptTooLong
from shared.token_ids import require_token_ids
from shared.wire.api import JobSubmission
from shared.wire.codecs import encode
from shared.wire.inferers import ModelFacts
from shared.wire.requests import JsonObject, JsonSchema, NamedSchema

MAX_DEPTH = 64
"""Levels of nesting that every part of Sluice can decode."""

MAX_METADATA_BYTES = 16 * 1024

MAX_SCHEMA_BYTES = 32 * 1024
"""The time to compile a schema to a grammar can grow with the square of its size."""

MAX_WHITESPACE_FACTOR = 8
"""How many times larger a schema may be with its white space."""

LOGPROB_BYTES = 60
"""Of one token in a result, about."""

MAX_LOGPROBS = 12_000
"""In a result, which is one message of the broker, of at most 1 MiB."""


def check_submission(submission: JobSubmission, facts: ModelFacts | None) -> None:
    """Refuse a submission that cannot succeed on a model with these ``facts``; None if they are
    unknown. Takes milliseconds at most, whatever is in the submission.

    Raises:
        InvalidRequest, PromptTooLong.
    """
    check_metadata(submission.metadata)
    _check_end(submission, facts)
    if submission.top_logprobs and not submission.logprobs:
        raise InvalidRequest("top_logprobs: needs `logprobs`", "top_logprobs")
    if facts is None:
        return
    if facts.vocabulary:
        require_token_ids(submission, facts.vocabulary)
    else:
        # An inferer without a vocabulary in its entry is of a version that would ignore them.
        _refuse(
            submission,
            ("logit_bias", "min_tokens", "ignore_eos", "stop_token_ids", "logprobs"),
            "the inferers of this model are of an earlier version, which ignores it; upgrade them",
        )
    _check_logprobs(submission, facts.n_ctx)
    if submission.max_tokens is not None and submission.max_tokens > facts.n_ctx:
        raise InvalidRequest(
            f"max_tokens: {submission.max_tokens} is more than the model's context of "
            f"{facts.n_ctx} tokens",
            "max_tokens",
        )
    if submission.task == "chat" and "chat" not in facts.tasks:
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


def _check_end(submission: JobSubmission, facts: ModelFacts | None) -> None:
    """Raises: InvalidRequest: options of where the answer ends contradict each other."""
    n_ctx = None if facts is None else facts.n_ctx
    bounds = {"max_tokens": submission.max_tokens, "the model's context": n_ctx}
    for name, bound in bounds.items():
        if bound is not None and submission.min_tokens > bound:
            raise InvalidRequest(
                f"min_tokens: {submission.min_tokens} is more than {name}, {bound}", "min_tokens"
            )
    if isinstance(submission.response_format, JsonSchema | JsonObject):
        _refuse(
            submission,
            ("ignore_eos", "min_tokens", "stop_token_ids"),
            "not possible with response_format, which decides where the answer ends",
        )


def _refuse(submission: JobSubmission, options: tuple[str, ...], why: str) -> None:
    """Raises: InvalidRequest: one of ``options`` is set."""
    for name in options:
        if getattr(submission, name):
            raise InvalidRequest(f"{name}: {why}", name)


def logprob_bytes(submission: JobSubmission) -> int:
    """What the log probabilities of the answer may add to its result, about."""
    if not submission.logprobs:
        return 0
    most = (submission.max_tokens or MAX_LOGPROBS) * (1 + submission.top_logprobs)
    return LOGPROB_BYTES * min(most, MAX_LOGPROBS)


def _check_logprobs(submission: JobSubmission, n_ctx: int) -> None:
    """Raises: InvalidRequest: the result could not be stored."""
    if not submission.logprobs:
        return
    each = 1 + submission.top_logprobs
    if min(submission.max_tokens or n_ctx, n_ctx) * each > MAX_LOGPROBS:
        raise InvalidRequest(
            f"logprobs: with top_logprobs {submission.top_logprobs} an answer has at most "
            f"{MAX_LOGPROBS // each} tokens; set max_tokens",
            "logprobs",
        )


def check_metadata(metadata: Raw | UnsetType) -> None:
    """Raises: InvalidRequest: it is not an object, is too large or nested too deeply."""
    if metadata is UNSET:
        return
    if len(metadata) > MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"metadata: {len(metadata)} bytes exceed the limit of {MAX_METADATA_BYTES}; keep large "
            "data elsewhere and send a reference to it",
            "metadata",
        )
    try:
        value = msgspec.json.decode(metadata, type=dict[str, Any] | None)
    except msgspec.ValidationError:
        raise InvalidRequest("metadata must be an object", "metadata") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"metadata: cannot be read: {error}", "metadata") from None
    if _is_deeper(value, MAX_DEPTH):
        raise InvalidRequest(f"metadata: nested more than {MAX_DEPTH} levels deep", "metadata")


def read_schema(named: NamedSchema) -> dict[str, Any]:
    """The decoded schema.

    Raises:
        InvalidRequest: it is not an object, is too large or nested too deeply.
    """
    too_large = InvalidRequest(
        f"response_format: the schema has more than {MAX_SCHEMA_BYTES} bytes", "response_format"
    )
    if len(named.source) > MAX_WHITESPACE_FACTOR * MAX_SCHEMA_BYTES:
        raise too_large
    try:
        schema = named.schema
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"response_format: the schema cannot be read: {error}", "response_format"
        ) from None
    if _is_deeper(schema, MAX_DEPTH):
        raise InvalidRequest(
            f"response_format: the schema is nested more than {MAX_DEPTH} levels deep",
            "response_format",
        )
    if len(encode(schema)) > MAX_SCHEMA_BYTES:
        raise too_large
    return schema


def _is_deeper(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_is_deeper(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_is_deeper(item, levels - 1) for item in value)
    return False
