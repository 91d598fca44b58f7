"""``INFERER_*``: how one inferer runs."""

import re
import socket
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.config import LAST_PRIORITY, Positive, Seconds, StartConcurrency
from shared.model_names import token_of

KvType = Literal["f16", "q8_0", "q4_0"]
FlashAttention = Literal["auto", "on", "off"]
Batching = Literal["auto", "on", "off"]
SplitMode = Literal["layer", "row", "none"]


class InfererSettings(msgspec.Struct, frozen=True):
    """Every field is an environment variable, ``INFERER_MODEL`` for ``model`` and so on."""

    model: str = "smollm2"
    """Path of a GGUF file, a bundled model (`smollm2`; after `make .venv` also `gemma3-270m`, which
    has no chat template), or a file on the Hugging Face hub: `hf:owner/repo:Q4_K_M`."""
    alias: str = ""
    """The model name that clients use, up to 128 characters: `qwen2.5:1.5b`, `org/name`. By
    default made from the file's name, or the name without `hf:`. NATS names are derived from
    it; `nats consumer ls REQUESTS` shows them."""
    adapters: str = ""
    """A folder of LoRA adapters, each a file `NAME.gguf`, which jobs ask for by name."""
    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{0,128}$")] = ""
    """Unique among live inferers, and the same again after a restart. By default the host name
    and the model."""
    concurrency: StartConcurrency = 1
    """Jobs at once after a start. `auto`: as many as make those of a queue end soonest on
    average, or about as soon."""
    batching: Batching = "auto"
    """Whether the jobs that run share each batch, or each has a context of its own and its share
    of the threads, which is faster with small models. `auto`: what is measured to be faster.
    On a GPU they always share (decision 58)."""
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Compute threads; 0: the CPUs that this process may really use."""
    gpu_layers: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    """Layers on the GPU; -1: all, if llama.cpp finds a GPU."""
    split_mode: SplitMode = "layer"
    """How several GPUs share a model: each has some of its layers, or some rows of each matrix;
    `none`: one GPU has all of it."""
    main_gpu: Annotated[int, Meta(ge=0, le=1024)] = 0
    """The number of that GPU, from 0."""
    flash_attention: FlashAttention = "auto"
    """`on` or `off` if llama.cpp should not choose. With long prompts on a CPU without AVX-512,
    `off` can be faster (decision 11)."""
    n_ctx: Annotated[int, Meta(ge=0, le=2**24)] = 0
    """Tokens of context for each job; 0: what the model was trained for, 4096 at most."""
    kv_type: KvType = "f16"
    """How the context is stored. `q8_0` takes about half of the memory and `q4_0` about a
    quarter, with less precision (decision 36)."""
    n_batch: Positive = 128
    """Tokens of a prompt computed at a time. Larger values are slightly faster but slower to
    cancel; use 512 on a GPU (decision 5)."""
    cache_mb: Annotated[int, Meta(ge=0, le=2**40)] = 512
    """Memory for the states of earlier prompts, in MiB. A prompt that begins like one of them
    is computed from there. 0: every prompt is computed whole, and no token is guessed from earlier
    answers."""
    cache_shared: bool = False
    """Reuse the prompts and answers of one owner for others. The time that a job takes then shows
    whether somebody has sent the same beginning, or got a similar answer."""
    grace_s: Annotated[float, Meta(ge=0, le=24 * 3600)] = 10.0
    """Seconds that a running job may take to finish after SIGTERM before it is requeued."""
    priority: Annotated[int, Meta(ge=0, le=LAST_PRIORITY)] = 0
    """The lowest number is served first; give slow machines a higher one."""
    max_attempts: Positive = 3
    """Attempts at one job, after which it becomes a dead letter."""
    retry_s: Annotated[float, Meta(gt=0, le=300)] = 1.0
    """Seconds before the second attempt; four times as many before each further one, 5 minutes
    at most."""
    stall_s: Seconds = 120.0
    """An inferer that makes no progress on a job for this many seconds exits, so that it can be
    restarted. Progress is a token, or `INFERER_N_BATCH` tokens of a prompt."""

    @property
    def slots(self) -> int:
        """How many slots there are at the start; with ``auto`` they are opened as jobs come."""
        return 1 if self.concurrency == "auto" else self.concurrency

    @property
    def adapters_folder(self) -> Path | None:
        return Path(self.adapters) if self.adapters else None

    def identity(self, alias: str) -> str:
        """The id of the inferer that serves ``alias`` with these settings on this host.

        A restarted container keeps its host name, so it takes over the entry of the dead one.
        """
        host = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().partition(".")[0].lower())
        return self.id or f"{host}-{token_of(alias)}"
