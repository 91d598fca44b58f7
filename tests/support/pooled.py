"""What llama.cpp computes of one input at a time, pooled here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy
from numpy.typing import NDArray

Vector = NDArray[numpy.float64]
Tokens = NDArray[numpy.int32]


@contextmanager
def _context(path: Path, pooling: int) -> Iterator[tuple[Any, Any]]:
    """The model and a context for inputs of 512 tokens."""
    model = llama_cpp.llama_model_load_from_file(
        bytes(path), llama_cpp.llama_model_default_params()
    )
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 512
    parameters.embeddings = True
    parameters.pooling_type = pooling
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    yield model, context
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


def _compute(context: Any, tokens: Sequence[int] | Tokens) -> None:
    if memory := llama_cpp.llama_get_memory(context):
        llama_cpp.llama_memory_clear(memory, True)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    for row, token in enumerate(tokens):
        batch.token[row], batch.pos[row], batch.logits[row] = token, row, True
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
    batch.n_tokens = len(tokens)
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)


def tokenize(path: Path, text: str, *, special: bool = True) -> list[int]:
    """The tokens of ``text``, with those that the model wants around it if ``special``."""
    with _context(path, llama_cpp.LLAMA_POOLING_TYPE_NONE) as (model, _):
        buffer = (llama_cpp.llama_token * 1024)()
        vocab = llama_cpp.llama_model_get_vocab(model)
        data = text.encode()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, 1024, special, special)
        return list(buffer[:count])


def embedded(path: Path, inputs: Sequence[Sequence[int] | Tokens], pools: str) -> list[Vector]:
    """The embedding of each input, of length 1. ``pools``: mean, first or last."""
    found = []
    with _context(path, llama_cpp.LLAMA_POOLING_TYPE_NONE) as (model, context):
        width = llama_cpp.llama_model_n_embd_out(model)
        for tokens in inputs:
            _compute(context, tokens)
            read = llama_cpp.llama_get_embeddings_ith
            rows = numpy.array([read(context, row)[:width] for row in range(len(tokens))])
            whole = {"mean": rows.mean(axis=0), "first": rows[0], "last": rows[-1]}[pools]
            found.append(whole / numpy.linalg.norm(whole))
    return found


def scored(path: Path, inputs: Sequence[Sequence[int] | Tokens]) -> list[float]:
    """The score of each input, by the model's head."""
    found = []
    with _context(path, llama_cpp.LLAMA_POOLING_TYPE_RANK) as (_, context):
        for tokens in inputs:
            _compute(context, tokens)
            found.append(float(llama_cpp.llama_get_embeddings_seq(context, 0)[0]))
    return found
