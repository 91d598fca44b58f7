"""``INFERER_*``: how one inferer runs."""

import re
import socket
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.config import LAST_PRIORITY, Positive, Seconds, StartConcurrency
from shared.model_names import token_of

KvType = Literal["f16", "q8_0", "q4_0"]
FlashAttention = Literal["auto", "on", "off"]
SplitMode = Literal["layer", "row", "none"]


class InfererSettings(msgspec.Struct, frozen=True):
    """Every field is an environment variable, ``INFERER_MODEL`` for ``model`` and so on."""

    model: str = "smollm2"
    """A path to a GGUF file, the name of a bundled one, or ``hf:…``, one on the Hugging Face
    hub."""
    alias: str = ""
    """The name to serve it under; by default made from ``model``."""
    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{0,128}$")] = ""
    """Unique among live inferers, and the same again after a restart; by default the host name
    and the model."""
    concurrency: StartConcurrency = 1
    """Jobs at once. They share each batch that goes through the model. ``auto``: as many as make
    those of a queue end soonest on average."""
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Compute threads; 0 takes the CPUs this process may really use."""
    gpu_layers: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    """Layers to put on GPUs; -1 means all, where llama.cpp finds a GPU."""
    split_mode: SplitMode = "layer"
    """How several GPUs share a model: each has some of its layers, or some rows of each matrix;
    with ``none`` one GPU has all of it."""
    main_gpu: Annotated[int, Meta(ge=0, le=1024)] = 0
    """The number of that GPU, from 0."""
    flash_attention: FlashAttention = "auto"
    """``auto``: where llama.cpp can."""
    n_ctx: Annotated[int, Meta(ge=0, le=2**24)] = 0
    """Tokens of context for each job; 0 takes what the model was trained for, 4096 at most."""
    kv_type: KvType = "f16"
    """How keys and values of the context are stored. ``q8_0`` takes about half of the memory, and
    ``q4_0`` about a quarter, for less precision (decision 36)."""
    n_batch: Positive = 128
    """Most tokens in one call of llama.cpp. On a CPU a cancel waits for the end of one operation on
    them, whose time grows with their number and the length of the prompt (decision 5)."""
    cache_mb: Annotated[int, Meta(ge=0, le=2**40)] = 512
    """MiB of memory for prompts whose slot is needed for others; with 0 every prompt is computed
    whole."""
    cache_shared: bool = False
    """Whether prompts of one owner speed up those of others. How long a job takes then says
    whether somebody has sent the same beginning."""
    grace_s: Annotated[float, Meta(ge=0, le=24 * 3600)] = 10.0
    """Seconds that a running job gets to end after SIGTERM, before it is requeued."""
    priority: Annotated[int, Meta(ge=0, le=LAST_PRIORITY)] = 0
    """0 is served first; inferers with a higher number take what those cannot take at once."""
    max_attempts: Positive = 3
    """Starts of one job, after which it is a dead letter."""
    retry_s: Annotated[float, Meta(gt=0, le=300)] = 1.0
    """About how many seconds after its first failure a job is tried again; four times as many after
    each further one."""
    stall_s: Seconds = 120.0
    """Seconds in which a job that runs must show progress, one token or ``n_batch`` of its prompt;
    else the process ends, to be started again."""

    @property
    def slots(self) -> int:
        """How many slots there are at the start; with ``auto`` they are opened as jobs come."""
        return 1 if self.concurrency == "auto" else self.concurrency

    def identity(self, alias: str) -> str:
        """The id of the inferer that serves ``alias`` with these settings on this host.

        A restarted container keeps its host name, so it takes over the entry of the dead one.
        """
        host = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().partition(".")[0].lower())
        return self.id or f"{host}-{token_of(alias)}"
