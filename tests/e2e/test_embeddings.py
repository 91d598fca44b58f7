"""Embeddings and rankings through the queue: HTTP, NATS and the command line, with tiny models."""

import base64
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import gguf
import nats
import numpy
import openai
import pytest
from nats.aio.client import Client

from tests.support.pooled import Vector, embedded, scored, tokenize
from tests.support.pooled_models import CONTEXT, WIDTH, write_bert
from tests.support.processes import (
    PATIENCE_S,
    Stack,
    clean_environment,
    cpu_ticks,
    eventually,
    scripts,
)

TOLERANCE = 1e-4
TEXTS = [f"{'word ' * (number % 9)}number {number}" for number in range(64)]
QUERY = "what is a panda?"
CHECKED_TICKS = 50
"""Hundredths of a second."""
LONG: dict[str, Any] = {"model": "embedder", "input": [[7] * CONTEXT] * 2000}
"""Seconds of work, never waited for."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "embedder": write_bert(folder / "embedder.gguf", gguf.PoolingType.MEAN),
        "ranker": write_bert(folder / "ranker.gguf", gguf.PoolingType.RANK),
    }


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path], tiny_model: Path
) -> Iterator[Stack]:
    """A model of each kind."""
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        stack.start_gateway()
        for path in (*files.values(), tiny_model):
            stack.start_inferer(path)
        for path in (*files.values(), tiny_model):
            stack.wait_until_served(path.stem)
        yield stack


@pytest.fixture(scope="module")
def client(served: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
async def nats_client(served: Stack) -> AsyncIterator[Client]:
    connection = await nats.connect(served.nats.url)
    yield connection
    await connection.close()


@pytest.fixture(scope="module")
def expected(files: dict[str, Path]) -> list[Vector]:
    """The embeddings of `TEXTS`, by plain calls of llama.cpp."""
    path = files["embedder"]
    return embedded(path, [tokenize(path, text) for text in TEXTS], "mean")


@pytest.fixture(scope="module")
def scores(files: dict[str, Path]) -> list[float]:
    """The scores of `TEXTS` for `QUERY`, likewise."""
    path = files["ranker"]
    query, *documents = (tokenize(path, text, special=False) for text in (QUERY, *TEXTS))
    return scored(path, [query + document for document in documents])


def is_near(found: Any, wanted: Any) -> bool:
    return bool(abs(numpy.asarray(found) - numpy.asarray(wanted)).max() < TOLERANCE)


def decoded(embedding: str) -> Vector:
    return numpy.frombuffer(base64.b64decode(embedding), "<f4").astype(float)


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("form", [None, "float", "base64"])
def test_the_openai_client_gets_embeddings(
    client: openai.OpenAI, expected: list[Vector], count: int, form: Any
) -> None:
    """Those that llama.cpp computes of each text alone. The client asks for base64 by itself."""
    options = {} if form is None else {"encoding_format": form}
    answer = client.embeddings.create(model="embedder", input=TEXTS[:count], user="u", **options)
    assert (answer.object, answer.model) == ("list", "embedder")
    assert [one.index for one in answer.data] == list(range(count))
    for one, wanted in zip(answer.data, expected, strict=False):
        found: Any = one.embedding
        assert is_near(decoded(found) if form == "base64" else found, wanted)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens >= count


def test_tokens_are_taken_as_they_are(
    client: openai.OpenAI, files: dict[str, Path], expected: list[Vector]
) -> None:
    """One list of them is one input, a list of lists several; `dimensions` may be what they are."""
    tokens = [tokenize(files["embedder"], text) for text in TEXTS[:2]]
    several = client.embeddings.create(model="embedder", input=tokens, dimensions=WIDTH)
    assert [is_near(one.embedding, expected[one.index]) for one in several.data] == [True, True]
    (one,) = client.embeddings.create(model="embedder", input=tokens[1]).data
    assert is_near(one.embedding, expected[1])


@pytest.mark.parametrize(
    ("body", "param", "why"),
    [
        ({"input": []}, "input", "not be empty"),
        ({"input": ""}, "input", "not be empty"),
        ({"input": ["a", ""]}, "input", "not be empty"),
        ({"input": [[]]}, "input", "not be empty"),
        ({"input": ["a", 1]}, None, "not a mixture"),
        ({"input": ["a"] * 2049}, None, "2049 items, more than 2048"),
        ({"input": [-1]}, "input", "at least 0"),
        ({"input": [49152]}, "input[0]", "49152 is not a token of this model"),
        ({"input": [[1], [1] * 513]}, "input[1]", "513 tokens are more than"),
        ({"input": "a", "dimensions": 16}, "dimensions", "16 is not possible"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64 or float"),
        ({"input": "a", "model": "tiny"}, "model", "this one answers `messages` and"),
        ({"input": "a", "model": "ranker"}, "model", "this one ranks `documents`"),
        ({}, "input", "input is missing"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_embedded_is_refused_before_the_queue(
    served: Stack, body: dict[str, Any], param: str | None, why: str
) -> None:
    """With a reason that names the field."""
    answer = served.http.post("/v1/embeddings", json={"model": "embedder", **body})
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert (error["param"] or "").startswith(param or "")
    assert why in error["message"]


def test_an_input_that_is_too_long_is_not_cut(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"input\[1\]: \d+ tokens are more than"):
        client.embeddings.create(model="embedder", input=["a", "word " * 600])


@pytest.mark.parametrize("model", ["embedder", "ranker"])
def test_a_model_that_generates_no_text_is_not_asked_for_any(served: Stack, model: str) -> None:
    """400, on each way in, before the queue."""
    conversation = [{"role": "user", "content": "hi"}]
    chats = {"model": model, "messages": conversation}
    prompts = {"model": model, "prompt": "hi", "max_tokens": 5}
    for path, body, wanted in (
        ("/v1/chat/completions", chats, "`messages`"),
        ("/v1/chat/completions", {**chats, "stream": True}, "`messages`"),
        ("/v1/completions", prompts, "a `prompt`"),
        ("/jobs", chats, "`messages`"),
        ("/jobs", prompts, "a `prompt`"),
    ):
        answer = served.http.post(path, json=body)
        error = answer.json().get("error", answer.json())
        assert (answer.status_code, error["param"]) == (400, "model")
        assert f"generates no text; choose one that takes {wanted}" in answer.text


@pytest.mark.parametrize("top_n", [None, 3, 100])
def test_documents_are_ranked(served: Stack, scores: list[float], top_n: int | None) -> None:
    """By the scores that llama.cpp computes of each alone, the best first."""
    body = {"model": "ranker", "query": QUERY, "documents": TEXTS, "return_documents": True}
    answer = served.http.post("/v1/rerank", json={**body, "top_n": top_n})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    best = sorted(scores, reverse=True)[:top_n]
    assert is_near([one["relevance_score"] for one in results], best)
    assert is_near([scores[one["index"]] for one in results], best)
    assert [one["document"]["text"] for one in results] == [TEXTS[one["index"]] for one in results]
    assert answer.json()["usage"]["total_tokens"] > 64
    assert answer.json()["model"] == "ranker"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": "q", "documents": ["a", ""]}, "documents"),
        ({"query": "q", "documents": ["a", {}]}, "documents[1].text"),
        ({"query": "q", "documents": ["a", {"title": "b"}]}, "documents[1].title"),
        ({"query": "q", "documents": [5]}, "documents[0]"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ({"query": "q", "documents": ["a"], "model": "embedder"}, "model"),
        ({"query": "q", "documents": ["a", "word " * 600]}, "documents[1]"),
        ({"documents": ["a"]}, "query"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_ranked_is_refused(served: Stack, body: dict[str, Any], param: str) -> None:
    answer = served.http.post("/v1/rerank", json={"model": "ranker", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_a_job_with_inputs_is_a_job_like_any_other(served: Stack, expected: list[Vector]) -> None:
    """Its result is in its status, its events and for its key; options of text are refused."""
    body = {"model": "embedder", "input": TEXTS[:2], "metadata": {"k": 1}}
    key = {"idempotency-key": "a key for inputs"}
    ids = {served.http.post("/jobs", json=body, headers=key).json()["id"] for _ in range(2)}
    (job_id,) = ids
    status = served.wait_for_end(job_id)
    assert (status["state"], status["metadata"]) == ("SUCCESS", {"k": 1})
    assert status["result"].keys() == {"usage", "embeddings"}
    assert is_near([decoded(one) for one in status["result"]["embeddings"]], expected[:2])
    assert status["timings"]["prompt_ms"] > 0
    events = served.http.get(f"/jobs/{job_id}/events").text
    assert [line for line in events.splitlines() if line.startswith("event:")] == [
        "event: queued",
        "event: started",
        "event: result",
    ]
    other = served.http.post("/jobs", json={**body, "input": TEXTS[:1]}, headers=key)
    assert other.status_code == 422
    for option in ({"temperature": 0}, {"max_tokens": 5}, {"top_n": 1}, {"seed": 1}):
        refused = served.http.post("/jobs", json={**body, **option})
        assert refused.status_code == 400
        assert f"`{next(iter(option))}` applies only to " in refused.json()["detail"]


def test_speed_and_estimate_are_known_before_the_first_job(served: Stack) -> None:
    """From the self-test; no speed of answers is made up."""
    entries = served.http.get("/inferers").json()["inferers"]
    (entry,) = (one for one in entries if one["model"] == "embedder")
    assert (entry["tasks"], entry["dimensions"]) == (["embed"], WIDTH)
    assert entry["prompt_tokens_per_s"] > 0
    assert entry["tokens_per_s"] is None
    first, second = served.submit(**LONG), served.submit(**LONG)

    def estimate() -> dict[str, float] | None:
        return served.status(second).get("eta")

    assert eventually(estimate, "an estimate")["p50_s"] > 0
    running = served.wait_for_state(first, "STARTED")
    assert "progress" not in running  # of an answer, which has none
    for job_id in (second, first):
        assert served.http.delete(f"/jobs/{job_id}").status_code == 200


def test_a_cancel_and_a_deadline_end_a_job_in_the_middle(served: Stack) -> None:
    """And the next job runs."""
    cancelled = served.submit(**LONG)
    served.wait_for_state(cancelled, "STARTED")
    assert served.http.delete(f"/jobs/{cancelled}").json()["state"] == "REVOKED"
    late = served.wait_for_end(served.submit(**LONG, timeout_s=1))
    assert (late["state"], late["error"]["code"]) == ("FAILURE", "timed_out")
    after = served.wait_for_end(served.submit(model="embedder", input="x"))
    assert after["state"] == "SUCCESS"


async def test_over_nats(nats_client: Client, expected: list[Vector], scores: list[float]) -> None:
    """The inferer replies with the stored result."""

    async def request(subject: str, body: dict[str, Any]) -> Any:
        reply = await nats_client.request(subject, json.dumps(body).encode(), PATIENCE_S)
        error = (reply.headers or {}).get("Nats-Service-Error")
        return error or json.loads(reply.data)

    result = await request("infer.embed", {"model": "embedder", "input": TEXTS})
    assert (result["outcome"], result["task"]) == ("completed", "embed")
    assert is_near([decoded(one) for one in result["embeddings"]], expected)
    body = {"model": "ranker", "query": QUERY, "documents": TEXTS, "top_n": 2}
    result = await request("infer.rerank", body)
    best = sorted(scores, reverse=True)[:2]
    assert is_near([one["relevance_score"] for one in result["ranking"]], best)
    assert "document" not in result["ranking"][0]

    submitted = await request("infer.submit", {"model": "embedder", "input": "x"})
    assert submitted["state"] == "PENDING"
    for subject, wrong, why in (
        ("infer.embed", {"model": "embedder", "prompt": "x"}, "infer.embed takes `input`"),
        ("infer.rerank", {"model": "ranker", "input": "x"}, "takes `query` and `documents`"),
        ("infer.chat", {"model": "embedder", "input": "x"}, "infer.chat takes `messages`"),
        ("infer.complete", {"model": "embedder", "prompt": "x"}, "generates no text"),
        (
            "infer.embed",
            {"model": "embedder", "input": "x", "stream": True},
            "`stream` applies only",
        ),
        ("infer.embed", {"model": "embedder", "input": ["x", 1]}, "not a mixture"),
    ):
        assert why in await request(subject, wrong)


def test_the_command_line_shows_what_there_is(served: Stack) -> None:
    """Not a page of base64."""

    def shown(job_id: str) -> str:
        served.wait_for_end(job_id)
        return sluice("status", job_id, "--url", served.url)

    embed = shown(served.submit(model="embedder", input=TEXTS[:3]))
    assert f"3 embeddings of {WIDTH} dimensions" in embed
    assert "tokens read" in embed
    ranked = {"query": QUERY, "documents": ["a text", "another"], "return_documents": True}
    assert "another" in shown(served.submit(model="ranker", **ranked))


def test_the_command_line_reads_a_result_of_any_size(served: Stack) -> None:
    """More than 1 MiB in one event, which an HTTP client need not accept by default."""
    long = "x" + " " * 4000  # one token
    ranked = {"query": QUERY, "documents": [long] * 300, "return_documents": True}
    job_id = served.submit(model="ranker", **ranked)
    followed = sluice("follow", job_id, "--json", "--url", served.url)
    assert len(followed) > 2**20
    assert json.loads(followed) == served.status(job_id)


def sluice(*arguments: str) -> str:
    """What the command prints."""
    ended = subprocess.run(
        [scripts() / "sluice", *arguments],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_crash_says_that_it_was_computing_inputs(tmp_path: Path, files: dict[str, Path]) -> None:
    """As for a job that generates text. Its dead letter can be sent again."""
    limit = {"INFERER_MAX_ATTEMPTS": "1"}
    with Stack(tmp_path / "stack") as stack:
        stack.start_gateway()
        inferer = stack.start_inferer(files["embedder"], **limit)
        stack.wait_until_served("embedder")
        job_id = stack.submit(**LONG)
        stack.wait_for_state(job_id, "STARTED")
        pid = inferer.popen.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        # Checking its tokens takes a tenth of a second of CPU time, computing it many times that.
        idle = cpu_ticks(int(child))
        eventually(lambda: cpu_ticks(int(child)) > idle + CHECKED_TICKS, "it computes")
        os.kill(int(child), signal.SIGSEGV)
        inferer.popen.wait(PATIENCE_S)
        stack.inferers.remove(inferer)
        stack.start_inferer(files["embedder"], **limit)
        ended = stack.wait_for_end(job_id)
        assert ended["error"]["code"] == "worker_lost"
        assert "computing its inputs" in ended["error"]["message"]
        again = stack.http.post(f"/dead/{job_id}/retry")
        assert again.status_code == 202, again.text
        assert stack.http.delete(f"/jobs/{again.json()['id']}").status_code == 200
