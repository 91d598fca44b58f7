"""llama.cpp's context for models that make one output of each input: an embedding, or a score."""

import ctypes
from collections.abc import Sequence

import llama_cpp
import numpy
from numpy.typing import NDArray

from services.inferer.engine.context import (
    DECODED,
    FLASH_ATTENTION,
    GIB,
    KV_TYPES,
    ContextOptions,
    create_context,
)
from services.inferer.engine.inputs import Tokens
from services.inferer.engine.memory import available_bytes, dry_run
from services.inferer.engine.model import Model
from services.inferer.engine.native_log import forget_problems
from services.inferer.engine.thread_pool import ThreadPool
from shared.errors import OutOfMemory, SettingsError

MAX_AT_ONCE = 64
"""Inputs in one batch. For each llama.cpp sets aside the memory of one output."""

Output = NDArray[numpy.float32]


class EmbeddingContext:
    """Computes inputs, several in one batch. It is native memory: close it."""

    def __init__(
        self,
        model: Model,
        options: ContextOptions,
        abort_flag: ctypes.Array[ctypes.c_char],
        pool: ThreadPool | None = None,
    ) -> None:
        """``options.n_ctx`` is the length of the longest input. See `Context` for the rest.

        Raises:
            OutOfMemory: the context does not fit.
            SettingsError: this model cannot have such a context.
        """
        if options.n_ctx > model.trained_context:
            raise SettingsError(
                f"INFERER_N_CTX={options.n_ctx}: this model was made for inputs of up to "
                f"{model.trained_context} tokens; set at most as many"
            )
        # An input must be computed as a whole, unless a token sees only those before it and the
        # output is that of the last one.
        self.part_tokens = options.n_batch if model.can_compute_in_parts else options.n_ctx
        """The most tokens in one call of llama.cpp."""
        parameters = _parameters(options, self.part_tokens)
        _require_memory(model, parameters)
        what = f"inputs of {options.n_ctx} tokens"
        self.handle = create_context(model, parameters, abort_flag, pool, what)
        self._memory = llama_cpp.llama_get_memory(self.handle)
        """None if the model sees all tokens of an input at once."""
        if not self._memory and self.part_tokens < options.n_ctx:
            llama_cpp.llama_free(self.handle)
            raise SettingsError(
                f"the model {model.path} sees all tokens of an input at once, but its GGUF says "
                "otherwise (attention.causal); convert it again"
            )
        self._width = model.output_width
        self._batch = llama_cpp.llama_batch_init(self.part_tokens, 0, 1)
        for row in range(self.part_tokens):
            self._batch.n_seq_id[row] = 1
            self._batch.logits[row] = True
        shape = (self.part_tokens,)
        self._tokens = numpy.ctypeslib.as_array(self._batch.token, shape)
        self._positions = numpy.ctypeslib.as_array(self._batch.pos, shape)
        # ctypes makes a new object each time a field is read, so once is enough.
        self._numbers = self._batch.seq_id

    def compute(self, inputs: Sequence[Tokens]) -> tuple[int, list[Output]]:
        """llama.cpp's status, and if it is `DECODED` the output for each of ``inputs``: at most
        `MAX_AT_ONCE`, and together at most `part_tokens`, unless there is only one."""
        if self._memory:
            llama_cpp.llama_memory_clear(self._memory, False)
        longest = max(map(len, inputs))
        # More than one part only where there is one input.
        for start in range(0, longest, self.part_tokens):
            status = self._compute([one[start : start + self.part_tokens] for one in inputs], start)
            if status != DECODED:
                return status, []
        return DECODED, [self._output(number) for number in range(len(inputs))]

    def _compute(self, inputs: Sequence[Tokens], start: int) -> int:
        """Compute tokens of inputs, the first of which have the position ``start``."""
        row = 0
        for number, tokens in enumerate(inputs):
            end = row + len(tokens)
            self._tokens[row:end] = tokens
            self._positions[row:end] = numpy.arange(start, start + len(tokens))
            for one in range(row, end):
                self._numbers[one][0] = number
            row = end
        self._batch.n_tokens = row
        forget_problems()
        status = int(llama_cpp.llama_decode(self.handle, self._batch))
        # A GPU may still be computing, and how long it takes is measured.
        llama_cpp.llama_synchronize(self.handle)
        return status

    def _output(self, number: int) -> Output:
        pointer = llama_cpp.llama_get_embeddings_seq(self.handle, number)
        return numpy.ctypeslib.as_array(pointer, (self._width,)).copy()

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self.handle)


def _parameters(options: ContextOptions, part_tokens: int) -> llama_cpp.llama_context_params:
    parameters = llama_cpp.llama_context_default_params()
    parameters.embeddings = True
    parameters.n_ctx = options.n_ctx
    parameters.n_batch = parameters.n_ubatch = part_tokens
    parameters.n_seq_max = MAX_AT_ONCE
    parameters.kv_unified = True
    parameters.swa_full = False
    parameters.type_k = parameters.type_v = KV_TYPES[options.kv_type]
    parameters.flash_attn_type = FLASH_ATTENTION[options.flash_attention]
    parameters.n_threads = parameters.n_threads_batch = options.threads
    return parameters


def _require_memory(model: Model, parameters: llama_cpp.llama_context_params) -> None:
    """Raises: OutOfMemory: the context, and what it will allocate for its first large batch, does
    not fit."""
    if model.gpu_layers:
        return  # most of it is on the GPU
    (required,) = dry_run(model.path, [parameters])
    # With the first batch of so many tokens llama.cpp allocates the outputs of each of them, also
    # logits, which nobody reads.
    required += 4 * (model.vocabulary.size + model.output_width) * int(parameters.n_batch)
    available = available_bytes()
    if required > available:
        raise OutOfMemory(
            f"no memory for inputs of {parameters.n_ctx} tokens: they take {required / GIB:.1f} "
            f"GiB, {available / GIB:.1f} GiB are available; lower INFERER_N_CTX"
        )
