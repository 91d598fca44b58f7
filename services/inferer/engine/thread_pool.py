"""Threads that compute one batch after another.

Without a pool, llama.cpp starts its threads anew for each batch. The kernel often starts one on the
core of the thread that then waits for it, and the batch takes longer (decision 39).
"""

import ctypes
from collections.abc import Callable
from typing import Any

from services.inferer.engine.library import CPU, load_library

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
        new = self._function("ggml_threadpool_new", ctypes.c_void_p)
        self._handle = new(ctypes.byref(parameters))

    def attach(self, context: object) -> None:
        """Have ``context`` compute with these threads; it must be set to as many. Contexts that
        share them must not compute at the same time."""
        self._library.llama_attach_threadpool(context, self._handle, self._handle)

    def close(self) -> None:
        self._function("ggml_threadpool_free", None)(self._handle)

    def _function(self, name: str, result: type | None) -> Callable[..., Any]:
        """A function of the code for this CPU, which may be loaded later than the rest."""
        device = self._library.ggml_backend_dev_by_type(CPU)
        registry = self._library.ggml_backend_dev_backend_reg(device)
        address = self._library.ggml_backend_reg_get_proc_address(registry, name.encode())
        return ctypes.CFUNCTYPE(result, ctypes.c_void_p)(address)
