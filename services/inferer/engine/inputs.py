"""The tokens of inputs to embed, and of documents to rank."""

import threading
from collections.abc import Callable, Iterable
from functools import partial

import numpy
from numpy.typing import NDArray

from services.inferer.engine.model import Model
from services.inferer.engine.rank_prompt import RankPrompt
from services.inferer.engine.sequence import Aborted
from shared.errors import InvalidRequest, PromptTooLong
from shared.token_ids import require_known
from shared.wire.inputs import Inputs, Texts

Tokens = NDArray[numpy.int32]
"""With 32 bits: those of 2,048 long inputs are millions."""


def tokens_to_embed(
    model: Model, inputs: Inputs, n_ctx: int, cancelled: threading.Event
) -> list[Tokens]:
    """The tokens of each input. Texts get the special tokens that the model expects; tokens are
    taken as they are.

    Raises:
        InvalidRequest: an input has no tokens, or one that the model does not have.
        PromptTooLong: an input has more than ``n_ctx`` tokens.
        Aborted: ``cancelled`` was set.
    """

    def read(name: str, one: str | list[int]) -> list[int]:
        if isinstance(one, str):
            return model.tokenize(one)
        require_known(one, model.vocabulary.size, name)
        return one

    names = [f"input[{number}]" for number in range(len(inputs))]
    reads = [partial(read, name, one) for name, one in zip(names, inputs, strict=True)]
    return _read_all(zip(names, reads, strict=True), n_ctx, cancelled)


def tokens_to_rank(
    model: Model, query: str, documents: Texts, n_ctx: int, cancelled: threading.Event
) -> list[Tokens]:
    """The tokens of the query with each of the documents. Raises: as `tokens_to_embed`."""
    try:
        prompt = RankPrompt(model, query)
    except PromptTooLong as error:
        raise PromptTooLong(f"query: {error}", "query") from None
    return _read_all(
        (
            (f"documents[{number}], with the query", partial(prompt.tokens, document))
            for number, document in enumerate(documents)
        ),
        n_ctx,
        cancelled,
    )


def _read_all(
    reads: Iterable[tuple[str, Callable[[], list[int]]]], n_ctx: int, cancelled: threading.Event
) -> list[Tokens]:
    found = []
    for name, read in reads:
        if cancelled.is_set():
            raise Aborted
        param, _, _ = name.partition(",")
        try:
            tokens = read()
        except PromptTooLong as error:
            raise PromptTooLong(f"{name}: {error}", param) from None
        if not tokens:
            raise InvalidRequest(f"{name}: it has no tokens for this model; send some text", param)
        if len(tokens) > n_ctx:
            raise PromptTooLong(
                f"{name}: {len(tokens)} tokens are more than the model's context of {n_ctx}; "
                "divide it",
                param,
            )
        found.append(numpy.array(tokens, numpy.int32))
    return found
