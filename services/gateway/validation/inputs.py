"""Checks of inputs to embed, and of documents to rank."""

from heapq import nlargest

from shared.errors import InvalidRequest, PromptTooLong
from shared.token_ids import require_known
from shared.wire.api import Submission
from shared.wire.codecs import encode
from shared.wire.inferers import ModelFacts
from shared.wire.inputs import utf8_bytes
from shared.wire.results import FLOAT_BYTES

RESULT_BYTES = 4096
"""Of a result, everything but what is asked for and the metadata."""
RANKED_BYTES = 80
"""Of a ranked document without its text, about."""


def check_inputs(submission: Submission, facts: ModelFacts | None) -> None:
    """Refuse inputs or documents that a model with these ``facts`` cannot take; None if they are
    unknown.

    Raises:
        InvalidRequest, PromptTooLong.
    """
    _check_dimensions(submission, facts)
    if facts is None:
        return
    for number, one in enumerate(submission.input or []):
        assert not isinstance(one, int)  # an input of tokens is a list of them
        param = f"input[{number}]"
        if isinstance(one, str):
            _require_room(utf8_bytes(one), param, facts)
            continue
        if facts.vocabulary:
            require_known(one, facts.vocabulary, param)
        if len(one) > facts.n_ctx:
            raise PromptTooLong(
                f"{param}: {len(one)} tokens are more than the model's context of {facts.n_ctx}",
                param,
            )
    if submission.query is not None:
        _require_room(utf8_bytes(submission.query), "query", facts)
    for number, document in enumerate(submission.texts):
        _require_room(utf8_bytes(document), f"documents[{number}]", facts)


def _require_room(size: int, param: str, facts: ModelFacts) -> None:
    """Raises: PromptTooLong: a text of ``size`` bytes has more tokens than the context."""
    if facts.token_bytes and size > facts.n_ctx * facts.token_bytes:
        raise PromptTooLong(
            f"{param}: {size} bytes cannot fit into the model's context of {facts.n_ctx} tokens; "
            "divide it",
            param,
        )


def _check_dimensions(submission: Submission, facts: ModelFacts | None) -> None:
    """No GGUF says whether its embeddings may be shortened, as those of some models may
    (Matryoshka).

    Raises:
        InvalidRequest: other dimensions than the model's are asked for.
    """
    wanted = submission.dimensions
    if wanted is None or (facts is not None and wanted == facts.dimensions):
        return
    has = f"it has {facts.dimensions}" if facts is not None else "no inferer has said how many"
    raise InvalidRequest(
        f"dimensions: {wanted} is not possible: nothing says whether embeddings of this model may "
        f"be shortened ({has}); leave it out, and shorten and normalize them yourself if they may",
        "dimensions",
    )


def result_bytes(submission: Submission, facts: ModelFacts | None) -> int:
    """What the result of inputs or documents will take, about; 0 for a text."""
    if submission.task == "embed":
        dimensions = facts.dimensions if facts is not None else 0
        return _base(submission) + len(submission.input or ()) * _embedding_bytes(dimensions)
    if submission.task == "rerank":
        texts = submission.texts
        ranked = min(len(texts), submission.top_n or len(texts))
        size = _base(submission) + RANKED_BYTES * ranked
        if submission.return_documents:
            size += sum(nlargest(ranked, (len(encode(text)) for text in texts)))
        return size
    return 0


def check_result_fits(submission: Submission, facts: ModelFacts | None, largest: int) -> None:
    """Check that the result can be stored in a message of ``largest`` bytes.

    Raises:
        InvalidRequest: it cannot.
    """
    if facts is None or result_bytes(submission, facts) <= largest:
        return
    if submission.input is None:
        raise InvalidRequest(
            f"documents: the ranking of {len(submission.texts)} does not fit into one result; set "
            "a lower top_n, or leave out return_documents and find them by their index",
            "documents",
        )
    most = (largest - _base(submission)) // _embedding_bytes(facts.dimensions)
    raise InvalidRequest(
        f"input: {len(submission.input)} embeddings of {facts.dimensions} dimensions do not fit "
        f"into one result; send at most {max(most, 0)} at once",
        "input",
    )


def _base(submission: Submission) -> int:
    return RESULT_BYTES + len(submission.metadata or b"")


def _embedding_bytes(dimensions: int) -> int:
    """In JSON, as base64, with quotes and a comma."""
    return (dimensions * FLOAT_BYTES + 2) // 3 * 4 + 3
