"""Threads that compute one batch after another.

Without a pool, llama.cpp starts its threads anew for each batch. The kernel often starts one on the
core of the thread that then waits for it, and the batch takes longer (decision 39).
"""

import ctypes
from collections.abc import Sequence

import llama_cpp

from services.inferer.engine.library import load_cpu_code, load_library

WAIT = 10
"""How long a thread waits for the next batch before it sleeps, in llama.cpp's measure (``poll``):
about 20 ms on the machine of decision 39. Between two batches one or two pass."""

MAX_THREADS = 512
"""`GGML_MAX_N_THREADS`."""


class _Parameters(ctypes.Structure):
    """`ggml_threadpool_params`."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * MAX_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class ThreadPool:
    """Native threads. Close it after the contexts that it is attached to."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._library = load_library()
        parameters = _Parameters()
        self._library.ggml_threadpool_params_init(ctypes.byref(parameters), threads)
        parameters.poll = WAIT
        self._code = load_cpu_code()
        self._handle = self._code.ggml_threadpool_new(ctypes.byref(parameters))

    def attach(self, context: object) -> None:
        """Have ``context`` compute with these threads. Contexts that share them must not compute at
        the same time."""
        llama_cpp.llama_set_n_threads(context, self.threads, self.threads)
        self._library.llama_attach_threadpool(context, self._handle, self._handle)

    def pause(self) -> None:
        """Have the threads sleep until the next batch, at once: while there is none, the cores are
        free for others."""
        self._code.ggml_threadpool_pause(self._handle)

    def close(self) -> None:
        self._code.ggml_threadpool_free(self._handle)


class ThreadPools:
    """The threads of an engine: all of them in one pool, or divided among contexts. Not
    thread-safe: the compute thread owns it. Close it after the contexts that its pools are attached
    to."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.all = ThreadPool(threads)
        self._divided: dict[tuple[int, int], ThreadPool] = {}
        """By the slot of its context and the number of its threads."""
        self._in_use = [self.all]
        self._reserved: ThreadPool | None = None

    @property
    def free(self) -> int:
        """Threads that are not reserved."""
        return self.threads - (self._reserved.threads if self._reserved else 0)

    def reserve(self, slot: int, threads: int) -> ThreadPool:
        """A pool of ``threads`` for the context of ``slot``, which computes until `release` is
        called, whatever others do meanwhile. There can be one at a time."""
        assert self._reserved is None
        assert threads < self.threads
        self._reserved = self._of(slot, threads)
        # It must not be paused meanwhile.
        self._in_use = [pool for pool in self._in_use if pool is not self._reserved]
        return self._reserved

    def release(self) -> None:
        """The context for which a pool is reserved does not compute any more."""
        if self._reserved is not None:
            self._in_use.append(self._reserved)
            self._reserved = None

    def for_slots(self, slots: Sequence[int]) -> list[ThreadPool]:
        """A pool for the context of each of ``slots``, which compute at the same time: all threads
        that are free for one, an equal share for each of several. There are no more of them than
        threads. The threads of other pools sleep from now on, so that they do not keep the cores
        busy.

        No pool is shared but that of all threads: a context that begins to use another pool has
        llama.cpp pause the one that it used before, and a thread that is paused just when its next
        batch begins never joins in.
        """
        if len(slots) == 1 and self._reserved is None:
            pools = [self.all]
        else:
            assert len(slots) <= self.free
            size = self.free // len(slots)
            pools = [self._of(slot, size) for slot in slots]
        for pool in self._in_use:
            if pool not in pools:
                pool.pause()
        self._in_use = pools
        return pools

    def _of(self, slot: int, size: int) -> ThreadPool:
        key = slot, size
        if key not in self._divided:
            self._divided[key] = ThreadPool(size)
        return self._divided[key]

    def pause(self) -> None:
        """See `ThreadPool.pause`; not the one that is reserved."""
        for pool in self._pools:
            if pool is not self._reserved:
                pool.pause()

    def close(self) -> None:
        for pool in self._pools:
            pool.close()

    @property
    def _pools(self) -> list[ThreadPool]:
        return [self.all, *self._divided.values()]
