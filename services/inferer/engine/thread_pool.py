"""Threads that compute one batch after another.

Without a pool, llama.cpp starts its threads anew for each batch. The kernel often starts one on the
core of the thread that then waits for it, and the batch takes longer (decision 39).
"""

import ctypes

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
    """The threads of an engine, in one pool, or divided among several. Not thread-safe: the compute
    thread owns it. Close it after the contexts that its pools are attached to."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pools: dict[int, list[ThreadPool]] = {}
        """By the number of pools among which the threads are divided."""
        self._in_use: list[ThreadPool] = []

    @property
    def all(self) -> ThreadPool:
        """A pool of all threads."""
        return self.divided(1)[0]

    def divided(self, parts: int) -> list[ThreadPool]:
        """Pools of the same size, ``parts`` of them, or one for each thread if that is fewer. The
        threads of other pools sleep from now on, so that they do not keep the cores busy."""
        parts = min(parts, self.threads)
        pools = self._pools.get(parts)
        if pools is None:
            pools = [ThreadPool(self.threads // parts) for _ in range(parts)]
            self._pools[parts] = pools
        if pools is not self._in_use:
            self.pause()
            self._in_use = pools
        return pools

    def pause(self) -> None:
        """See `ThreadPool.pause`."""
        for pool in self._in_use:
            pool.pause()

    def close(self) -> None:
        for pools in self._pools.values():
            for pool in pools:
                pool.close()
