"""The bodies of /v1/embeddings, as in OpenAI's API, and of /v1/rerank, as in the APIs of Jina,
Cohere and others, and their conversion from and to Sluice's."""

from base64 import b64encode
from typing import Annotated, Any, ClassVar, Literal

import numpy
from msgspec import UNSET, Meta, Struct, UnsetType

from services.gateway.http.openai.generation import AnyPriority, priority_of
from services.gateway.http.openai.parameters import EMBEDDINGS, RERANK, Body, OtherParameters
from services.gateway.jobs.accepted import AcceptedJob
from shared.wire.api import Submission, TimeoutS
from shared.wire.fields import Metadata
from shared.wire.inputs import AnyDocuments, AnyInput, Text, TopN, inputs_of
from shared.wire.results import Completed, RankedDocument

EncodingFormat = Literal["float", "base64"]


class InputsRequest(Body, frozen=True, kw_only=True):
    """The parameters of both routes."""

    model: str | None = None
    metadata: Metadata | UnsetType = UNSET
    timeout_s: TimeoutS | None = None
    priority: AnyPriority | None = None
    """`high`, `normal` or `low`, or a number as in vLLM: below 0 is high, 0 normal, above 0 low."""

    @property
    def wants_stream(self) -> bool:
        return False

    def _options(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "metadata": self.metadata,
            "timeout_s": self.timeout_s,
            "priority": "normal" if self.priority is None else priority_of(self.priority),
        }


class EmbeddingsRequest(InputsRequest, frozen=True, kw_only=True):
    others: ClassVar[OtherParameters] = EMBEDDINGS

    input: AnyInput
    encoding_format: EncodingFormat | None = None
    """`float`, or `base64` of little-endian 32-bit floats."""
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None

    def __post_init__(self) -> None:
        inputs_of(self.input)  # an invalid input is an error in the body

    def submissions(self) -> list[Submission]:
        return [Submission(input=self.input, dimensions=self.dimensions, **self._options())]

    def response(self, accepted: AcceptedJob, result: Completed) -> "EmbeddingsResponse":
        as_floats = self.encoding_format != "base64"
        return EmbeddingsResponse(
            data=[
                Embedding(index, _floats(embedding) if as_floats else b64encode(embedding).decode())
                for index, embedding in enumerate(result.embeddings or ())
            ],
            model=accepted.model,
            usage=InputUsage.of(result),
        )


class RerankRequest(InputsRequest, frozen=True, kw_only=True):
    others: ClassVar[OtherParameters] = RERANK

    query: Text
    documents: AnyDocuments
    top_n: TopN | None = None
    return_documents: bool | None = None

    def submissions(self) -> list[Submission]:
        return [
            Submission(
                query=self.query,
                documents=self.documents,
                top_n=self.top_n,
                return_documents=bool(self.return_documents),
                **self._options(),
            )
        ]

    def response(self, accepted: AcceptedJob, result: Completed) -> "RerankResponse":
        return RerankResponse(
            id=f"rerank-{accepted.id}",
            results=result.ranking or [],
            model=accepted.model,
            usage=InputUsage.of(result),
        )


class InputUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, result: Completed) -> "InputUsage":
        return cls(result.usage.prompt_tokens, result.usage.total_tokens)


class Embedding(Struct, frozen=True):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsResponse(Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: InputUsage


class RerankResponse(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    results: list[RankedDocument]
    """The best first."""
    model: str
    usage: InputUsage


def _floats(embedding: bytes) -> list[float]:
    floats: list[float] = numpy.frombuffer(embedding, "<f4").astype(float).tolist()
    return floats
