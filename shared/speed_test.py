"""What `sluice bench` and its processes (`services/inferer/engine/speed_test.py`) write to each
other, as lines of JSON: `Subject` as argument, then `Ready`, then for each `Jobs` a `Done`.
`Failed` may come instead of each answer, and is the last."""

from msgspec import Struct


class Subject(Struct, frozen=True):
    """What a process measures."""

    slots: int
    as_q4_0: bool = False
    """Converts the model to Q4_0 first, in a temporary file."""


class Ready(Struct, frozen=True, tag="ready", kw_only=True):
    """The model is loaded, and has a context for each slot."""

    quantization: str
    """Of the file, as llama.cpp names it: ``Q4_K - Medium``."""
    n_ctx: int
    threads: int
    gpu_layers: int
    warning: str | None
    """Why the inferer computes without AMX and repacked weights here, if it does."""


class Jobs(Struct, frozen=True):
    """Run one job in each slot, all at once. After ``limit_s`` seconds those that have at least two
    tokens of their answer are aborted."""

    prompt_tokens: int
    answer_tokens: int
    limit_s: float


class Done(Struct, frozen=True, tag="done"):
    """What became of them. Tokens are those of all jobs together."""

    prompt_tokens: int
    prompt_s: float
    """Until all prompts were computed."""
    answer_tokens: int
    answer_s: float
    """Those after the first of each answer, and the time from then to the end."""


class Failed(Struct, frozen=True, tag="failed"):
    """An error with its code (`shared/errors.py`)."""

    code: str
    message: str


Reply = Ready | Done | Failed
