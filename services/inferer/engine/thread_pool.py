"""Threads that compute one batch after another.

Without a pool, llama.cpp starts its threads anew for each batch. The kernel often starts one on the
core of the thread that then waits for it, and the batch takes longer (decision 39).
"""

import ctypes

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
        self._library = load_library()
        parameters = _Parameters()
        self._library.ggml_threadpool_params_init(ctypes.byref(parameters), threads)
        parameters.poll = WAIT
        self._code = load_cpu_code()
        self._handle = self._code.ggml_threadpool_new(ctypes.byref(parameters))

    def attach(self, context: object) -> None:
        """Have ``context`` compute with these threads; it must be set to as many. Contexts that
        share them must not compute at the same time."""
        self._library.llama_attach_threadpool(context, self._handle, self._handle)

    def pause(self) -> None:
        """Have the threads sleep until the next batch, at once: while there is none, the cores are
        free for others."""
        self._code.ggml_threadpool_pause(self._handle)

    def close(self) -> None:
        self._code.ggml_threadpool_free(self._handle)
