"""llama.cpp's context: the memory of the running sequences, and the calls that compute."""

import ctypes
from abc import abstractmethod
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy
from numpy.typing import NDArray

from services.inferer.engine.memory import available_bytes, dry_run
from services.inferer.engine.model import Model
from services.inferer.engine.native_log import forget_problems, last_problem
from services.inferer.engine.prompt_cache import Memory, SavedState
from services.inferer.engine.scheduler import Chunk
from services.inferer.engine.sequence import Sequence
from services.inferer.engine.speculation import MAX_DRAFTS
from services.inferer.engine.thread_pool import ThreadPool
from services.inferer.settings import FlashAttention, KvType
from shared.config import MAX_SLOTS
from shared.counts import counted
from shared.errors import ModelError, OutOfMemory, SettingsError

SET, NOT_SET = b"\x01", b"\x00"
"""The first byte of an abort flag."""

DECODED, ABORTED = 0, 2
NO_MEMORY = (1, -2)
"""No free cells for the batch; no memory for a buffer (`llama_decode`)."""

GIB = 1024**3
_NUMBER = ctypes.sizeof(ctypes.c_uint32)
_HEADER = 2 * _NUMBER
"""Of a sequence's state: a magic number, and the slot."""
_BYTES = ctypes.POINTER(ctypes.c_uint8)

KV_TYPES: dict[KvType, int] = {
    "f16": llama_cpp.GGML_TYPE_F16,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}
FLASH_ATTENTION: dict[FlashAttention, int] = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}

# llama.cpp calls this function between any two operations, and aborts if the result is not 0.
# `strlen` of a buffer whose first byte is the flag does just that without the interpreter's lock,
# which a Python function would take a thousand times per token.
_flag_is_set = llama_cpp.ggml_abort_callback(
    ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
)


class ContextOptions(NamedTuple):
    """What stays the same when a context is replaced by one with more slots."""

    n_ctx: int
    """Tokens of each slot."""
    n_batch: int
    threads: int
    kv_type: KvType = "f16"
    flash_attention: FlashAttention = "auto"


class _State:
    """What `llama_state_seq_get_data` returned: ``data`` from ``begin`` to ``end``.

    Where each sequence has a memory of its own, llama.cpp writes a header (`_HEADER`), the number
    of memories, and for each memory the number of its cells and their content; only the sequence's
    own memory has any. It loads a state only into a context with as many memories. So ``begin``
    and ``end`` leave out the other memories: `Context.save` moves the header to just before the
    sequence's own part, and `Context.load` fills in the number of memories. The zeros after
    ``end`` stand for the others.
    """

    def __init__(self, data: NDArray[numpy.uint8], begin: int, end: int) -> None:
        self.data, self.begin, self.end = data, begin, end

    def __len__(self) -> int:
        return len(self.data)


class EngineMemory(Memory):
    """Memory for sequences, each in a slot of its own, and how they are computed. It is native
    memory: close it."""

    can_undo: bool
    """Whether the last batch can be removed again: all of it after an abort, or wrong drafts."""
    most_at_once: int | None
    """How many sequences are computed at the same time; None if all of a batch are."""
    at_once: int | None
    """The same now: fewer while a prompt is computed in the background."""
    must_be_adjacent: bool
    """Whether sequences are computed together only if their slots are adjacent."""
    has_background: bool
    """Whether a prompt can be computed on some of the threads, while others compute batches."""

    @abstractmethod
    def decode(self, batch: Collection[Chunk[Sequence]]) -> int:
        """Compute ``batch``, whose sequences all have the same adapter. llama.cpp's status:
        `DECODED`, `ABORTED`, or one for `decode_error`.

        If it is not `DECODED`, part of the batch may be in the memory: remove it.
        """

    def begin_background(
        self, chunk: Chunk[Sequence], abort_flag: ctypes.Array[ctypes.c_char]
    ) -> Callable[[], int]:
        """What computes ``chunk``, a part of a prompt, on another thread; its result is that of
        `decode`. Until `end_background` is called, nothing else may use the chunk's slot, and
        ``abort_flag`` alone aborts it. Only with `has_background`, and one at a time."""
        raise NotImplementedError

    def end_background(self) -> None:
        """What `begin_background` returned has been called, and has returned."""
        raise NotImplementedError

    @abstractmethod
    def output(self, slot: int) -> tuple[object, int]:
        """llama.cpp's context with the outputs of ``slot`` in the last batch, and the row there of
        its last token, its draft not counted."""

    @abstractmethod
    def close(self) -> None: ...

    def copy(self, source: int, target: int, length: int) -> None:
        """None of them if there is too little memory for a copy of all tokens of ``source``."""
        assert self.can_copy
        # llama.cpp's own copy is one of all memory, of which little may be in use.
        if self.state_bytes(source) and self.take_over(self, source, target):
            self.truncate(target, length)

    def take_over(self, other: "EngineMemory", source: int, target: int) -> bool:
        """Copy what ``source`` has in ``other`` to ``target``; False if llama.cpp cannot."""
        state = other.save(source)
        return state is not None and self.load(target, state)


class Context(EngineMemory):
    """One context for ``slots`` sequences, which share its batches."""

    most_at_once = at_once = None
    must_be_adjacent = True
    has_background = False

    def __init__(
        self,
        model: Model,
        slots: int,
        options: ContextOptions,
        abort_flag: ctypes.Array[ctypes.c_char],
        pool: ThreadPool | None = None,
    ) -> None:
        """``abort_flag`` has two bytes; while the first is set, `decode` aborts. Without a ``pool``
        llama.cpp starts its threads anew for each batch.

        Raises:
            OutOfMemory: the context does not fit.
            SettingsError: this model cannot have such a context.
        """
        if options.flash_attention == "off" and options.kv_type != "f16":
            raise SettingsError(
                f"INFERER_KV_TYPE={options.kv_type} needs flash attention; do not set "
                "INFERER_FLASH_ATTENTION=off"
            )
        require_memory(model, slots, options)
        parameters = _parameters(_is_shared(model), slots, options)
        what = f"{counted(slots, 'context')} of {options.n_ctx} tokens"
        self.handle = create_context(model, parameters, abort_flag, pool, what)
        self._abort_flag = abort_flag  # llama.cpp has only its address
        self._memory = llama_cpp.llama_get_memory(self.handle)
        self._window = model.window
        self._is_recurrent = model.is_recurrent
        self._memories = slots
        """How many a state lists, if each sequence has one."""
        empty = int(llama_cpp.llama_state_seq_get_size(self.handle, 0))
        self.can_copy = not parameters.kv_unified and empty == _HEADER + _NUMBER * (1 + slots)
        """Whether a state is as `_State` says: each sequence has a memory of its own, with all its
        tokens and nothing else. What has left a window may be overwritten, and a recurrent state
        has no parts."""
        # Where each sequence has a window of its own, llama.cpp computes a batch in parts, and a
        # later part may take the place of tokens that the window still covers after the removal.
        self.can_undo = bool(not model.is_recurrent and (parameters.kv_unified or not model.window))
        self._batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)
        # ctypes makes a new object each time a field is read, so once is enough.
        self._tokens, self._positions = self._batch.token, self._batch.pos
        self._slots, self._logits = self._batch.seq_id, self._batch.logits
        for row in range(options.n_batch):
            self._batch.n_seq_id[row] = 1
        self._output_rows: dict[int, int] = {}
        self._adapters = model.adapters
        self._pool = pool
        self._adapter = ""
        """The one that the last batch was computed with."""

    def decode(self, batch: Collection[Chunk[Sequence]]) -> int:
        self.fill(batch)
        forget_problems()
        return self.compute()

    def use(self, pool: ThreadPool, abort_flag: ctypes.Array[ctypes.c_char]) -> None:
        """Compute with the threads of ``pool`` from now on; ``abort_flag`` aborts it."""
        if pool is not self._pool:
            pool.attach(self.handle)
            self._pool = pool
        if abort_flag is not self._abort_flag:
            address = ctypes.addressof(abort_flag)
            llama_cpp.llama_set_abort_callback(self.handle, _flag_is_set, address)
            self._abort_flag = abort_flag

    def fill(self, batch: Collection[Chunk[Sequence]], first_slot: int = 0) -> None:
        """Put ``batch`` where `compute` finds it. The context's slots are numbered from
        ``first_slot``."""
        self._use_adapter(next(iter(batch)).sequence.adapter)
        row = 0
        # llama.cpp computes sequences together where their numbers follow one another.
        for sequence, size, has_output, draft in sorted(batch, key=_slot):
            slot = sequence.slot - first_slot
            last_row = self._output_rows[slot] = row + size - 1
            tokens = sequence.tokens[sequence.position : sequence.position + size] + draft
            for position, token in enumerate(tokens, sequence.position):
                self._tokens[row] = token
                self._positions[row] = position
                self._slots[row][0] = slot
                self._logits[row] = has_output and row >= last_row
                row += 1
        self._batch.n_tokens = row

    def compute(self) -> int:
        """Compute what `fill` was given; on any thread. The status is that of `decode`."""
        status = int(llama_cpp.llama_decode(self.handle, self._batch))
        # A GPU may still be computing, and how long it takes is measured.
        llama_cpp.llama_synchronize(self.handle)
        return status

    def _use_adapter(self, name: str) -> None:
        """An adapter applies to a whole batch. A change makes llama.cpp plan its computation anew,
        which takes about half the time of a token (decision 49)."""
        if name == self._adapter:
            return
        adapters = [self._adapters[name]] if name else []
        count = len(adapters)
        llama_cpp.llama_set_adapters_lora(
            self.handle,
            (llama_cpp.llama_adapter_lora_p_ctypes * count)(*adapters),
            count,
            (ctypes.c_float * count)(*[1.0] * count),
        )
        self._adapter = name

    def output(self, slot: int) -> tuple[object, int]:
        return self.handle, self._output_rows[slot]

    def length(self, slot: int) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, slot)) + 1

    def shortest(self, slot: int) -> int:
        first = int(llama_cpp.llama_memory_seq_pos_min(self._memory, slot))
        return self._shortest(self.length(slot), first)

    def _shortest(self, length: int, first: int) -> int:
        """The same for a sequence that has no token before ``first`` in its window's memory."""
        if self._is_recurrent:
            return length
        return first + self._window - 1 if self._window and first > 0 else 0

    def truncate(self, slot: int, length: int) -> bool:
        # From a recurrent memory llama.cpp removes all or nothing.
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1))

    def state_bytes(self, slot: int) -> int:
        size = self._buffer_bytes(slot)
        return size if size < available_bytes() // 2 else 0

    def _buffer_bytes(self, slot: int) -> int:
        """With room for what `load` may need after it."""
        return int(llama_cpp.llama_state_seq_get_size(self.handle, slot)) + _NUMBER * MAX_SLOTS

    def save(self, slot: int) -> SavedState | None:
        size = self._buffer_bytes(slot)
        try:
            # Not zeroed: llama.cpp is the first to touch it, without the interpreter's lock.
            data = numpy.empty(size, numpy.uint8)
        except MemoryError:
            return None
        begin, end = 0, llama_cpp.llama_state_seq_get_data(self.handle, _at(data), size, slot)
        if not end:
            return None
        data[end:] = 0
        if self.can_copy:
            begin, end = _NUMBER * slot, end - _NUMBER * (self._memories - slot - 1)
            data[begin : begin + _HEADER] = data[:_HEADER].copy()
        length = self.length(slot)
        # What has left the window is not saved.
        first = max(int(llama_cpp.llama_memory_seq_pos_min(self._memory, slot)), 0)
        if self._window:
            first = max(first, length - self._window)
        return SavedState(_State(data, begin, end), self._shortest(length, first))

    def load(self, slot: int, state: SavedState) -> bool:
        saved = state.data
        assert isinstance(saved, _State)
        size = saved.end - saved.begin
        if self.can_copy:
            number = saved.begin + _HEADER
            saved.data[number : number + _NUMBER].view(numpy.uint32)[0] = self._memories
            size += _NUMBER * (self._memories - 1)
        source = _at(saved.data, saved.begin)
        return bool(llama_cpp.llama_state_seq_set_data(self.handle, source, size, slot) == size)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self.handle)


def create_context(
    model: Model,
    parameters: llama_cpp.llama_context_params,
    abort_flag: ctypes.Array[ctypes.c_char],
    pool: ThreadPool | None,
    what: str,
) -> Any:
    """llama.cpp's context, with threads of ``pool``; see `Context` for the rest. ``what`` needs the
    memory.

    Raises:
        OutOfMemory: it does not fit.
    """
    parameters.abort_callback = _flag_is_set
    parameters.abort_callback_data = ctypes.addressof(abort_flag)
    forget_problems()
    handle = llama_cpp.llama_init_from_model(model.handle, parameters)
    if not handle:
        raise OutOfMemory(f"no memory for {what} ({last_problem()}); lower INFERER_N_CTX")
    if pool is not None:
        pool.attach(handle)
    return handle


def decode_error(status: int) -> ModelError:
    """The error of a `Context.decode` that failed with ``status``."""
    kind = OutOfMemory if status in NO_MEMORY else ModelError
    return kind(f"llama.cpp's decode failed with status {status}: {last_problem()}")


def _is_shared(model: Model) -> bool:
    """Whether all sequences share one memory.

    With a memory for each, attention passes over no other sequence's cells and is divided evenly
    among threads (decision 40). Sequences with windows or recurrent states could then not be moved
    to a context with more slots, so they share one. LongRoPE models never do: llama.cpp chooses
    their factors by the size of a memory, and with two slots the same seed would give another text
    than with one.
    """
    return bool(model.window or model.is_recurrent) and not model.has_original_context


def _parameters(
    is_shared: bool, slots: int, options: ContextOptions
) -> llama_cpp.llama_context_params:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = options.n_ctx * slots
    parameters.n_batch = parameters.n_ubatch = options.n_batch
    parameters.n_seq_max = slots
    # One output for each sequence and each draft. By default there is room for one per token: 134
    # MB for a batch of 128 and Gemma's vocabulary.
    parameters.n_outputs_max = slots + MAX_DRAFTS
    parameters.kv_unified = is_shared
    # Layers that see only the last tokens keep only these.
    parameters.swa_full = False
    parameters.type_k = parameters.type_v = KV_TYPES[options.kv_type]
    parameters.flash_attn_type = FLASH_ATTENTION[options.flash_attention]
    parameters.n_threads = parameters.n_threads_batch = options.threads
    return parameters


def require_memory(
    model: Model, slots: int, options: ContextOptions, *, are_separate: bool = False
) -> None:
    """Check that a context for ``slots``, or one for each, fits: the kernel allocates more memory
    than it has, and would kill the process when llama.cpp fills it.

    Raises:
        OutOfMemory: it does not fit.
        SettingsError: this model cannot have such a context.
    """
    if model.gpu_layers:
        # Most of it is on the GPU, where an allocation that does not fit fails. So would that of a
        # type that the model cannot have, with the same message.
        if options.kv_type != "f16":
            required_bytes(model, slots, options)
        return
    required = required_bytes(model, slots, options, are_separate=are_separate)
    available = available_bytes()
    if required > available:
        raise OutOfMemory(
            f"no memory for {counted(slots, 'context')} of {options.n_ctx} tokens: they take "
            f"{required / GIB:.1f} GiB, {available / GIB:.1f} GiB are available; "
            "lower INFERER_N_CTX"
        )


def required_bytes(
    model: Model, slots: int, options: ContextOptions, *, are_separate: bool = False
) -> int:
    """What a context for ``slots`` takes, or one for each."""
    one, two = _sizes(model.path, _is_shared(model), options)
    return one + (slots - 1) * (one if are_separate else two - one)


@lru_cache
def _sizes(path: Path, is_shared: bool, options: ContextOptions) -> tuple[int, int]:
    """The bytes that a context takes with one slot, and with two; each further slot takes as many
    as the second."""

    def sizes(options: ContextOptions) -> list[int]:
        return dry_run(path, [_parameters(is_shared, slots, options) for slots in (1, 2)])

    try:
        one, two = sizes(options)
    except ModelError as error:
        if options.kv_type == "f16":
            raise
        sizes(options._replace(kv_type="f16"))  # raises if the reason is another
        raise SettingsError(
            f"INFERER_KV_TYPE={options.kv_type} is not possible with this model ({error}); set "
            "INFERER_KV_TYPE=f16"
        ) from None
    return one, two


def _at(data: NDArray[numpy.uint8], offset: int = 0) -> "ctypes._Pointer[ctypes.c_uint8]":
    return ctypes.cast(data.ctypes.data + offset, _BYTES)


def _slot(chunk: Chunk[Sequence]) -> int:
    return chunk.sequence.slot
