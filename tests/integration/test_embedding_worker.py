"""Jobs with inputs in a worker on a real broker, and jobs that its model does not do."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy
import pytest

from services.inferer.engine.embedding_engine import EmbeddingEngine
from services.inferer.engine.engine import Engine
from services.inferer.engine.model import Model
from shared.broker.connection import Broker, connected
from shared.broker.consumers import ensure_consumers
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.wire.requests import InferenceRequest
from shared.wire.results import Cancelled, Completed, Failed
from tests.support.pooled_models import CONTEXT, WIDTH, write_bert
from tests.support.processes import NatsServer
from tests.support.workers import ended, put, states, until, working

EMBED = InferenceRequest(task="embed", input=["a text", [5, 6, 7]])
LONG = InferenceRequest(task="embed", input=[[7] * CONTEXT] * 1000)
RANK = InferenceRequest(task="rerank", query="q", documents=["a", "b"])
PROMPT = InferenceRequest(task="complete", prompt="hi", max_tokens=3)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = write_bert(tmp_path_factory.mktemp("models") / "bert.gguf", gguf.PoolingType.MEAN)
    loaded = Model(path, 0)
    yield loaded
    loaded.close()


@pytest.fixture
def engine(embedder: Model) -> Iterator[EmbeddingEngine]:
    created = EmbeddingEngine(embedder, slots=1, n_ctx=CONTEXT, n_batch=128, threads=1)
    yield created
    created.close()


async def test_a_job_gets_its_embeddings(queue: Broker, engine: EmbeddingEngine) -> None:
    """One for each input, of length 1, in 32-bit floats; the usage counts what was read."""
    async with working(queue, engine) as (worker, _):
        result = await ended(queue, await put(queue, EMBED))
        assert worker.speed.prompt is not None
        assert worker.speed.answer is None
    assert isinstance(result, Completed)
    assert (result.task, result.text, result.logprobs) == ("embed", "", None)
    found = [numpy.frombuffer(one, "<f4") for one in result.embeddings or ()]
    assert [len(one) for one in found] == [WIDTH, WIDTH]
    assert numpy.allclose([numpy.linalg.norm(one) for one in found], 1)
    assert result.usage.completion_tokens == 0
    assert result.usage.prompt_tokens == result.usage.total_tokens > 3
    assert result.timings is not None
    assert (result.timings.first_token_ms, result.timings.tokens_per_s) == (None, None)


@pytest.mark.parametrize("request_", [PROMPT, RANK], ids=["prompt", "rank"])
async def test_an_embedding_model_does_nothing_else(
    queue: Broker, engine: EmbeddingEngine, request_: InferenceRequest
) -> None:
    """A gateway that knows the model has refused it; one that does not may accept it."""
    async with working(queue, engine):
        result = await ended(queue, await put(queue, request_))
    assert isinstance(result, Failed)
    assert (result.code, result.attempt) == ("invalid_request", 1)
    assert f"does not support the task `{request_.task}`, only `embed`" in result.message


async def test_a_text_model_computes_no_embeddings(queue: Broker, model: Model) -> None:
    text = Engine(model, slots=1, n_ctx=512, n_batch=128, threads=1)
    async with working(queue, text):
        result = await ended(queue, await put(queue, EMBED))
    text.close()
    assert isinstance(result, Failed)
    assert "`embed`, only `chat` and `complete`" in result.message


async def test_jobs_in_several_slots_take_turns(queue: Broker, engine: EmbeddingEngine) -> None:
    """A short job does not wait for a long one; slots that open take no memory."""
    await ensure_consumers(queue, Topology().ack_wait_s, "tiny", limit=4, facts=None)
    async with working(queue, engine) as (worker, _):
        await worker.set_slots(2)
        long = await put(queue, LONG)
        await until(lambda: states(queue, long), "started")
        assert isinstance(await ended(queue, await put(queue, EMBED)), Completed)

        async def only_the_long_one_runs() -> bool:
            return len(worker.running) == 1

        await until(only_the_long_one_runs, "the short one has left its slot")
        worker._jobs[long].interrupt("cancelled")
        assert isinstance(await ended(queue, long), Cancelled)
    assert engine.slots == 2
    assert engine.slowdowns(2) == [1, 2]


async def test_auto_concurrency_leaves_one_slot(queue: Broker, engine: EmbeddingEngine) -> None:
    """Jobs that take turns end soonest one after the other."""
    await ensure_consumers(queue, Topology().ack_wait_s, "tiny", limit=4, facts=None)
    async with working(queue, engine, concurrency="auto") as (worker, _):
        jobs = [await put(queue, EMBED) for _ in range(4)]
        for job_id in jobs:
            assert isinstance(await ended(queue, job_id), Completed)
        assert (worker.slots, engine.slots) == (1, 1)


async def test_embeddings_that_fit_into_no_result_are_not_computed(
    tmp_path: Path, engine: EmbeddingEngine
) -> None:
    """The reason names the field; no second attempt is made."""
    configuration = tmp_path / "nats.conf"
    configuration.write_text("max_payload: 64KB\njetstream: enabled\n")
    many = InferenceRequest(task="embed", input=["a"] * 500)
    with NatsServer(tmp_path / "nats", configuration) as server:
        async with connected(BrokerSettings(server.url), "own") as broker:
            await ensure_topology(broker, Topology(), ["tiny"])
            async with working(broker, engine):
                result = await ended(broker, await put(broker, many))
    assert isinstance(result, Failed)
    assert (result.code, result.attempt) == ("invalid_request", 1)
    assert "do not fit into one result" in result.message


async def test_a_worker_that_stops_requeues_what_it_computes(
    queue: Broker, engine: EmbeddingEngine
) -> None:
    """In the middle of a batch, as it does with text."""
    async with working(queue, engine, grace_s=0) as (_, stopping):
        job_id = await put(queue, LONG)
        await until(lambda: states(queue, job_id), "started")
        stopping.set()
        async with asyncio.timeout(30):
            while len(await states(queue, job_id)) < 2:
                await asyncio.sleep(0.01)
    assert [state for state, *_ in await states(queue, job_id)] == ["started", "returned"]
