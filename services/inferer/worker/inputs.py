"""One job with inputs to embed or documents to rank through the engine."""

import threading

from services.inferer.crash.flight_recorder import Entry, Phase
from services.inferer.engine.embedding_engine import EmbeddingEngine, EmbeddingRun, Pooled
from services.inferer.engine.inputs import Tokens, tokens_to_embed, tokens_to_rank
from services.inferer.worker.delivery import Job
from services.inferer.worker.engine_outcome import EngineOutcome
from shared.errors import InvalidRequest
from shared.wire.inputs import Document
from shared.wire.requests import InferenceRequest
from shared.wire.results import FLOAT_BYTES, RankedDocument


async def compute_inputs(
    engine: EmbeddingEngine, job: Job, entry: Entry, largest_result: int
) -> Pooled:
    """What the model makes of the job's inputs. ``entry`` is where it writes down what it is doing;
    ``largest_result`` is how many bytes a result may have.

    Raises:
        Interrupted: see ``job.interruption``.
        InvalidRequest, PromptTooLong: the model cannot take this request.
        ModelError: llama.cpp failed.
    """
    request, cancelled = job.request, threading.Event()
    # A gateway that knows the model has checked it.
    size = FLOAT_BYTES * engine.model.dimensions * len(request.input or ())
    if size * 4 // 3 > largest_result:
        raise InvalidRequest(
            "input: the embeddings do not fit into one result; send fewer inputs per request",
            "input",
        )

    def prepare() -> list[Tokens]:
        entry.enter(Phase.TOKENIZING)
        if request.input is not None:
            return tokens_to_embed(engine.model, request.input, engine.n_ctx, cancelled)
        query, documents = request.query or "", request.documents or []
        return tokens_to_rank(engine.model, query, documents, engine.n_ctx, cancelled)

    outcome = EngineOutcome[Pooled]()
    run = EmbeddingRun(prepare, outcome.set, entry.enter)
    engine.submit(run)

    def abort() -> None:
        engine.abort(run)
        cancelled.set()

    await outcome.wait(job, abort)
    return outcome.value


def embeddings(pooled: Pooled) -> list[bytes]:
    return [output.astype("<f4").tobytes() for output in pooled.outputs]


def ranking(request: InferenceRequest, pooled: Pooled) -> list[RankedDocument]:
    """The documents, the best first; of equal ones, in the order of the request."""
    scores = [float(output[0]) for output in pooled.outputs]
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
    if not request.return_documents:
        return [RankedDocument(index, scores[index]) for index in best]
    texts = request.documents or []
    return [RankedDocument(index, scores[index], Document(texts[index])) for index in best]
