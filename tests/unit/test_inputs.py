"""Inputs to embed and documents to rank: what a gateway refuses before an inferer sees them."""

from typing import Any

import msgspec
import pytest
from msgspec import Raw

from services.gateway.http.openai.inputs import EmbeddingsRequest
from services.gateway.validation.decode import decode_body
from services.gateway.validation.inputs import check_result_fits, result_bytes
from services.gateway.validation.limits import check_submission
from shared.errors import InvalidRequest, PromptTooLong
from shared.wire.api import JobResult, JobSubmission
from shared.wire.codecs import encode
from shared.wire.inferers import ModelFacts
from shared.wire.inputs import MAX_INPUTS, Document
from shared.wire.requests import InferenceRequest
from shared.wire.results import Completed, RankedDocument, Usage

TEXT = ModelFacts(512, ["chat", "complete"], 10, 100)
EMBED = ModelFacts(512, ["embed"], 10, 100, dimensions=384)
RANK = ModelFacts(512, ["rerank"], 10, 100)
COMMON: dict[str, Any] = {
    "id": "01968a3e-5c00-7abc-8def-0123456789ab",
    "model": "m" * 128,
    "attempt": 3,
    "queued_at": "2026-01-31T12:00:00.000000Z",
    "started_at": "2026-01-31T12:00:00.000000Z",
    "finished_at": "2026-01-31T12:00:00.000000Z",
    "text": "",
    "finish_reason": "stop",
    "usage": Usage(1, 0, 1),
    "metadata": Raw(b'{"k": "%b"}' % (b"x" * 5000)),
}


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_each_form_of_input_is_a_list_of_inputs(given: Any, inputs: Any) -> None:
    """On the wire there is one form, which the other end, and a dead letter, read as it is."""
    body = encode({"input": given})
    submission = decode_body(body, JobSubmission)
    assert (submission.task, submission.input) == ("embed", inputs)
    assert decode_body(encode({"input": inputs}), JobSubmission).input == inputs
    assert decode_body(body, EmbeddingsRequest).submissions()[0].input == inputs
    request = InferenceRequest(task="embed", input=inputs)
    assert msgspec.json.decode(encode(request), type=InferenceRequest).input == inputs


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            b'{"input":"a","prompt":"b"}',
            "exactly one of `messages`, `prompt`, `prompt_tokens`, `input` and `query`",
        ),
        (b'{"query":"a"}', "`query` and `documents` together"),
        (b'{"documents":["a"]}', "exactly one of"),
        (b'{"prompt":"a","documents":["a"]}', "together"),
        (b'{"prompt":"a","dimensions":5}', "`dimensions` applies only to `input`"),
        (b'{"prompt":"a","return_documents":true}', "`return_documents` applies only to"),
        (
            b'{"input":"a","response_format":{"type":"text"}}',
            "`response_format` applies only",
        ),
        (b'{"input":"a","cache_prompt":false}', "`cache_prompt` applies only to text"),
        (b'{"input":[[1],[true]]}', "whole number"),
        (b'{"input":[%b]}' % (b"[],[1]" + b",[1]" * 5000), "not be empty"),
        (b'{"input":{"a":1}}', "a string or an array"),
        (b'{"input":[2147483648]}', "at most 2147483647"),
        (b'{"input":["\\ud800"]}', "not JSON"),
    ],
)
def test_what_contradicts_itself_is_refused(body: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_body(body, JobSubmission)
    assert why in refused.value.message


@pytest.mark.parametrize(
    ("submission", "facts", "why"),
    [
        (
            JobSubmission(prompt="x"),
            EMBED,
            "model: this one computes .* takes a `prompt`",
        ),
        (JobSubmission(prompt="x"), RANK, "model: this one ranks"),
        (JobSubmission(input="x"), TEXT, "model: this one answers"),
        (JobSubmission(query="x", documents=["y"]), EMBED, "model: this one computes"),
        (JobSubmission(input="x" * 5121), EMBED, r"input\[0\]: 5121 bytes cannot fit"),
        (JobSubmission(input=[[1], [1] * 513]), EMBED, r"input\[1\]: 513 tokens are more than"),
        (JobSubmission(input=[100]), EMBED, r"input\[0\]: 100 is not a token"),
        (JobSubmission(query="x" * 5121, documents=["y"]), RANK, "query: 5121 bytes"),
        (
            JobSubmission(query="x", documents=["y", Document("y" * 5121)]),
            RANK,
            r"documents\[1\]: 5121 bytes",
        ),
        (JobSubmission(input="x", dimensions=383), EMBED, r"dimensions: 383 .* \(it has 384\)"),
        (JobSubmission(input="x", dimensions=384), None, "no inferer has said how many"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    submission: JobSubmission, facts: ModelFacts | None, why: str
) -> None:
    """With the name of the field."""
    with pytest.raises((InvalidRequest, PromptTooLong), match=why) as refused:
        check_submission(submission, facts)
    assert refused.value.param


@pytest.mark.parametrize(
    "submission",
    [
        JobSubmission(input="x", dimensions=384),
        JobSubmission(input=[[99] * 512]),
        JobSubmission(input=["x" * 5120] * MAX_INPUTS),
    ],
    ids=["dimensions", "tokens", "texts"],
)
def test_what_fits_is_accepted(submission: JobSubmission) -> None:
    """As it is if nothing is known of the model yet, but for dimensions."""
    check_submission(submission, EMBED)
    if submission.dimensions is None:
        check_submission(submission, None)


def test_results_are_not_larger_than_was_expected() -> None:
    """Those that are accepted can be stored. What is refused says how many would fit."""
    metadata = COMMON["metadata"]
    many = JobSubmission(input=["x"] * 500, metadata=metadata)
    embeddings = [b"\0" * 4 * EMBED.dimensions] * 500
    stored = encode(Completed(**COMMON, task="embed", embeddings=embeddings))
    expected = result_bytes(many, EMBED)
    assert len(stored) <= expected <= len(stored) + 5000
    check_result_fits(many, EMBED, expected)
    with pytest.raises(InvalidRequest, match=r"500 embeddings of 384 .* send at most 499 at once"):
        check_result_fits(many, EMBED, expected - 1)

    texts: list[str | Document] = ['"\n\0' * 50] * 500
    ranked = JobSubmission(query="x", documents=texts, return_documents=True, metadata=metadata)
    ranking = [
        RankedDocument(2047, -1.2345678901234567e-300, Document(str(text))) for text in texts
    ]
    stored = encode(Completed(**COMMON, task="rerank", ranking=ranking))
    expected = result_bytes(ranked, RANK)
    assert len(stored) <= expected <= len(stored) + 20_000
    with pytest.raises(InvalidRequest, match=r"documents: the ranking of 500 .* lower top_n"):
        check_result_fits(ranked, RANK, expected - 1)
    best = JobSubmission(query="x", documents=texts, return_documents=True, top_n=1)
    check_result_fits(best, RANK, 10_000)
    assert result_bytes(JobSubmission(prompt="x"), TEXT) == 0
    check_result_fits(JobSubmission(input=["x"] * MAX_INPUTS), None, 1000)


def test_the_size_of_work_counts_what_goes_through_the_model() -> None:
    """The query does with each document; tokens count like text."""
    embed = InferenceRequest(task="embed", input=["ä", [1, 2]]).work(512)
    assert (embed.prompt_bytes, embed.max_tokens, embed.task) == (2 + 8, 1, "embed")
    rank = InferenceRequest(task="rerank", query="abc", documents=["d", "ef"]).work(512)
    assert (rank.prompt_bytes, rank.max_tokens, rank.task) == (2 * 3 + 3, 1, "rerank")


def test_a_result_shows_what_it_has() -> None:
    """And no empty text."""
    shown = encode(JobResult.of(Completed(**COMMON, task="embed", embeddings=[b"\0\0\0\0"])))
    assert msgspec.json.decode(shown).keys() == {"usage", "embeddings"}
    shown = encode(JobResult.of(Completed(**COMMON, task="rerank", ranking=[RankedDocument(0, 1)])))
    assert msgspec.json.decode(shown)["ranking"] == [{"index": 0, "relevance_score": 1}]
