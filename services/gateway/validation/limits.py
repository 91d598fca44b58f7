"""Checks of a submission that need no inferer."""

from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from services.gateway.validation.inputs import check_inputs
from services.gateway.validation.schema_size import MAX_DEPTH, is_deeper
from services.gateway.validation.tools import check_template, check_tools
from shared.errors import InvalidRequest, PromptTooLong
from shared.token_ids import require_known, require_token_ids
from shared.wire.api import Submission
from shared.wire.inferers import GRAMMARS, PROMPT_TOKENS, ModelFacts
from shared.wire.requests import GrammarFormat, PlainText, RegexFormat, Task

MAX_METADATA_BYTES = 16 * 1024

ASKED_BY: dict[Task, str] = {
    "chat": "`messages`",
    "complete": "a `prompt`",
    "embed": "`input`",
    "rerank": "`query` and `documents`",
}
DOES: dict[Task, str] = {
    "chat": "answers `messages`",
    "complete": "continues a `prompt`",
    "embed": "computes embeddings of `input` and generates no text",
    "rerank": "ranks `documents` for a `query` and generates no text",
}

OF_EARLIER_VERSION = (
    "the inferers of this model are of an earlier version, which ignores it; upgrade them"
)

MAX_TOKENS_OF_CHOICES = 100_000
"""The most tokens of several answers in one result, about 0.5 MB of text."""

LOGPROB_BYTES = 60
"""The approximate size in a result of one token's log probability."""

MAX_LOGPROBS = 12_000
"""The most log probabilities in a result, which is one broker message of at most 1 MiB."""


def check_submission(submission: Submission, facts: ModelFacts | None) -> None:
    """Refuse a submission that cannot succeed on a model with these ``facts``; None if they are
    unknown. Takes milliseconds at most, whatever is in the submission.

    Raises:
        InvalidRequest, PromptTooLong.
    """
    check_metadata(submission.metadata)
    if facts is not None:
        _check_task(submission.task, facts)
    check_inputs(submission, facts)
    check_tools(submission)
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
            OF_EARLIER_VERSION,
        )
    is_grammar = isinstance(submission.response_format, GrammarFormat | RegexFormat)
    if is_grammar and GRAMMARS not in facts.accepts:
        _refuse(submission, ("response_format",), OF_EARLIER_VERSION)
    if submission.prompt_tokens is not None:
        if PROMPT_TOKENS not in facts.accepts:
            _refuse(submission, ("prompt_tokens",), OF_EARLIER_VERSION)
        require_known(submission.prompt_tokens, facts.vocabulary, "prompt_tokens")
        if len(submission.prompt_tokens) >= facts.n_ctx:
            raise PromptTooLong(
                f"prompt_tokens: {len(submission.prompt_tokens)} tokens leave no room for an "
                f"answer in the model's context of {facts.n_ctx}",
                "prompt_tokens",
            )
    if submission.n > facts.max_choices:
        _refuse(submission, ("n",), OF_EARLIER_VERSION)
    most_tokens = min(submission.max_tokens or facts.n_ctx, facts.n_ctx)
    _check_choices(submission, most_tokens)
    _check_logprobs(submission, most_tokens)
    if submission.max_tokens is not None and submission.max_tokens > facts.n_ctx:
        raise InvalidRequest(
            f"max_tokens: {submission.max_tokens} is more than the model's context of "
            f"{facts.n_ctx} tokens",
            "max_tokens",
        )
    check_template(submission, facts)
    _check_adapter(submission, facts)
    size = max(len(text.encode("utf-8")) for text in submission.prompt_texts)
    if facts.token_bytes and size > facts.n_ctx * facts.token_bytes:
        raise PromptTooLong(
            f"the prompt has {size} bytes and cannot fit into the model's context of "
            f"{facts.n_ctx} tokens",
            submission.prompt_field,
        )


def clamped(submission: Submission, facts: ModelFacts | None) -> Submission:
    """``submission`` with ``max_tokens`` limited to the model's context, as in other servers with
    OpenAI's API."""
    wanted = submission.max_tokens
    if facts is None or wanted is None or wanted <= facts.n_ctx:
        return submission
    return msgspec.structs.replace(submission, max_tokens=facts.n_ctx)


def _check_task(task: Task, facts: ModelFacts) -> None:
    """Raises: InvalidRequest: the model cannot do it."""
    if task in facts.tasks:
        return
    if task == "chat" and "complete" in facts.tasks:
        raise InvalidRequest(
            "this model has no chat template; send `prompt` instead of `messages`", "messages"
        )
    does = " and ".join(DOES[one] for one in facts.tasks)
    raise InvalidRequest(f"model: this one {does}; choose one that takes {ASKED_BY[task]}", "model")


def _check_adapter(submission: Submission, facts: ModelFacts) -> None:
    """Raises: InvalidRequest: not every inferer of the model has it."""
    if submission.adapter is not None and submission.adapter not in facts.adapters:
        known = ", ".join(facts.adapters) or "none"
        raise InvalidRequest(
            f"adapter: this model has no adapter {submission.adapter}; it has: {known}", "adapter"
        )


def _check_end(submission: Submission, facts: ModelFacts | None) -> None:
    """Raises: InvalidRequest: options of where the answer ends contradict each other."""
    n_ctx = None if facts is None else facts.n_ctx
    bounds = {"max_tokens": submission.max_tokens, "the model's context": n_ctx}
    for name, bound in bounds.items():
        if bound is not None and submission.min_tokens > bound:
            raise InvalidRequest(
                f"min_tokens: {submission.min_tokens} is more than {name}, {bound}", "min_tokens"
            )
    deciding = ["tools"] if submission.offered_tools else []
    if not isinstance(submission.response_format, PlainText | None):
        deciding.append("response_format")
    if deciding:
        _refuse(
            submission,
            ("ignore_eos", "min_tokens", "stop_token_ids"),
            f"cannot be combined with {deciding[-1]}, which determines where the answer ends",
        )


def _refuse(submission: Submission, options: tuple[str, ...], why: str) -> None:
    """Raises: InvalidRequest: one of ``options`` is set."""
    for name in options:
        if getattr(submission, name):
            raise InvalidRequest(f"{name}: {why}", name)


def logprob_bytes(submission: Submission) -> int:
    """What the log probabilities of the answer may add to its result, about."""
    if not submission.logprobs:
        return 0
    most = (submission.max_tokens or MAX_LOGPROBS) * (1 + submission.top_logprobs) * submission.n
    return LOGPROB_BYTES * min(most, MAX_LOGPROBS)


def _check_choices(submission: Submission, most_tokens: int) -> None:
    """Raises: InvalidRequest: several answers of ``most_tokens`` could not be stored."""
    if submission.n > 1 and submission.n * most_tokens > MAX_TOKENS_OF_CHOICES:
        raise InvalidRequest(
            f"n: {submission.n} answers of up to {most_tokens} tokens do not fit into one result; "
            f"set max_tokens to {MAX_TOKENS_OF_CHOICES // submission.n} or less",
            "n",
        )


def _check_logprobs(submission: Submission, most_tokens: int) -> None:
    """Raises: InvalidRequest: the result could not be stored."""
    if not submission.logprobs:
        return
    each = (1 + submission.top_logprobs) * submission.n
    if most_tokens * each > MAX_LOGPROBS:
        several = f" and n {submission.n}" if submission.n > 1 else ""
        raise InvalidRequest(
            f"logprobs: with top_logprobs {submission.top_logprobs}{several} an answer has at most "
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
    if is_deeper(value, MAX_DEPTH):
        raise InvalidRequest(f"metadata: nested more than {MAX_DEPTH} levels deep", "metadata")
