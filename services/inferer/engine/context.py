"""llama.cpp's context: the memory of the running sequences, and the calls that compute."""

import ctypes
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import llama_cpp

from services.inferer.engine.memory import available_bytes, dry_run
from services.inferer.engine.model import Model, forget_problems, last_problem
from services.inferer.engine.scheduler import Chunk
from services.inferer.engine.sequence import Sequence
from shared.errors import ModelError, OutOfMemory

SET, NOT_SET = b"\x01", b"\x00"
"""The first byte of an abort flag."""

DECODED, ABORTED = 0, 2
NO_MEMORY = (1, -2)
"""No free cells for the batch; no memory for a buffer (`llama_decode`)."""

GIB = 1024**3

# llama.cpp calls this function between any two operations, and aborts if the result is not 0.
# `strlen` of a buffer whose first byte is the flag does just that without the interpreter's lock,
# which a Python function would take a thousand times per token.
_flag_is_set = llama_cpp.ggml_abort_callback(
    ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
)


class Context:
    """Memory for ``slots`` sequences of ``n_ctx`` tokens. It is native memory: close it."""

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        n_ctx: int,
        n_batch: int,
        threads: int,
        abort_flag: ctypes.Array[ctypes.c_char],
    ) -> None:
        """``abort_flag`` has two bytes; while the first is set, `decode` aborts.

        Raises:
            OutOfMemory: the context does not fit.
        """
        _require_memory(model, slots, n_ctx, n_batch)
        parameters = _parameters(model.has_original_context, slots, n_ctx, n_batch, threads)
        parameters.abort_callback = _flag_is_set
        parameters.abort_callback_data = ctypes.addressof(abort_flag)
        self.handle = llama_cpp.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise OutOfMemory(
                f"no memory for {slots} contexts of {n_ctx} tokens; lower INFERER_N_CTX"
            )
        self._memory = llama_cpp.llama_get_memory(self.handle)
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
        # ctypes makes a new object each time a field is read, so once is enough.
        self._tokens, self._positions = self._batch.token, self._batch.pos
        self._slots, self._logits = self._batch.seq_id, self._batch.logits
        for row in range(n_batch):
            self._batch.n_seq_id[row] = 1

    def decode(self, batch: Iterable[Chunk[Sequence]]) -> int:
        """Compute ``batch``. llama.cpp's status: `DECODED`, `ABORTED`, or one for `decode_error`.

        If it is not `DECODED`, part of the batch may be in the context: remove it.
        """
        row = 0
        for sequence, size, last_row, has_output in batch:
            for offset in range(size):
                self._tokens[row] = sequence.pending[offset]
                self._positions[row] = sequence.position + offset
                self._slots[row][0] = sequence.slot
                self._logits[row] = False
                row += 1
            self._logits[last_row] = has_output
        self._batch.n_tokens = row
        forget_problems()
        return int(llama_cpp.llama_decode(self.handle, self._batch))

    def remove(self, slot: int, position: int) -> bool:
        """Remove what ``slot`` has from ``position`` on; -1 means everything.

        False if llama.cpp cannot: from a recurrent memory it removes all or nothing.
        """
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, slot, position, -1))

    def take_over(self, other: "Context", slots: Iterable[int]) -> None:
        """Copy what ``slots`` have in ``other``.

        Raises:
            ModelError: llama.cpp cannot.
        """
        for slot in slots:
            size = llama_cpp.llama_state_seq_get_size(other.handle, slot)
            state = (ctypes.c_uint8 * size)()
            llama_cpp.llama_state_seq_get_data(other.handle, state, size, slot)
            if not llama_cpp.llama_state_seq_set_data(self.handle, state, size, slot):
                raise ModelError(
                    "llama.cpp cannot move this model's running jobs to a larger context; try "
                    "again when no job runs"
                )

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self.handle)


def decode_error(status: int) -> ModelError:
    """The error of a `Context.decode` that failed with ``status``."""
    kind = OutOfMemory if status in NO_MEMORY else ModelError
    return kind(f"llama.cpp's decode failed with status {status}: {last_problem()}")


def _parameters(
    has_original_context: bool, slots: int, n_ctx: int, n_batch: int, threads: int
) -> llama_cpp.llama_context_params:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = n_ctx * slots
    parameters.n_batch = parameters.n_ubatch = n_batch
    parameters.n_seq_max = slots
    # Memory that sequences share is used better. But llama.cpp chooses a LongRoPE model's factors
    # by the total size: with two slots the same seed would give another text than with one, so
    # there each sequence has memory of its own.
    parameters.kv_unified = not has_original_context
    parameters.n_threads = parameters.n_threads_batch = threads
    return parameters


def _require_memory(model: Model, slots: int, n_ctx: int, n_batch: int) -> None:
    """Check that the context fits: the kernel allocates more memory than it has, and would kill the
    process when llama.cpp fills it.

    Raises:
        OutOfMemory: it does not fit.
    """
    if model.gpu_layers:
        return  # most of it is on the GPU
    required, available = _required_bytes(model, slots, n_ctx, n_batch), available_bytes()
    if required > available:
        raise OutOfMemory(
            f"no memory for {slots} contexts of {n_ctx} tokens: they take "
            f"{required / GIB:.1f} GiB, {available / GIB:.1f} GiB are available; "
            "lower INFERER_N_CTX"
        )


def _required_bytes(model: Model, slots: int, n_ctx: int, n_batch: int) -> int:
    one, two = _sizes(model.path, model.has_original_context, n_ctx, n_batch)
    return one + (slots - 1) * (two - one)


@lru_cache
def _sizes(path: Path, has_original_context: bool, n_ctx: int, n_batch: int) -> tuple[int, int]:
    """The bytes that a context takes with one slot, and with two; each further slot takes as many
    as the second."""
    one, two = dry_run(
        path, [_parameters(has_original_context, slots, n_ctx, n_batch, 1) for slots in (1, 2)]
    )
    return one, two
