"""What inferers report about themselves, and the commands they accept."""

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from shared.wire.answers import AnswerFormat
from shared.wire.fields import AtLeastOne, Count, InfererId, SmallInt, TokensPerS, check_times
from shared.wire.requests import AdapterName, SamplingDefaults, Task, Work

MAX_TEMPLATE_OPTIONS = 32
MAX_ADAPTERS = 64
InfererState = Literal["idle", "busy", "stopping"]
Tasks = Annotated[list[Task], Meta(max_length=16)]
"""The broker bounds the metadata of a consumer, where a gateway keeps them."""
TemplateOptionNames = Annotated[
    list[Annotated[str, Meta(max_length=64)]], Meta(max_length=MAX_TEMPLATE_OPTIONS)
]
AdapterNames = Annotated[list[AdapterName], Meta(max_length=MAX_ADAPTERS)]
Cpu = Annotated[int, Meta(ge=0, le=8191)]
"""Linux supports no more."""
Cpus = Annotated[list[Cpu], Meta(max_length=4096)]
"""The CPUs of 32 inferers must fit into one message of 1 MB."""


GRAMMARS, PROMPT_TOKENS = "grammars", "prompt_tokens"
"""Values in ``accepts``: answers with a grammar or regular expression; prompts as tokens."""
Accepted = Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=32)]

Slowdown = Annotated[float, Meta(ge=1, le=1000)]


class RunningJob(Struct, frozen=True, kw_only=True):
    """How far a job is: it has ``completion_tokens`` of at most ``max_tokens``.
    ``prompt_tokens_left`` is how many tokens of the prompt are still to be computed; None if that
    is not known."""

    id: str
    attempt: Count
    started_at: str
    completion_tokens: Count
    max_tokens: Count
    work: Work | None = None
    prompt_tokens_left: Count | None = None

    def __post_init__(self) -> None:
        check_times(self.started_at)


EXTRA_BUFFERS = ("AMX_INT8", "REPACK", "KLEIDIAI")
"""Features that llama.cpp does not use while it computes without extra buffers."""


class InfererEntry(Struct, frozen=True, kw_only=True):
    """An inferer's entry in the bucket ``INFERERS``; it expires 10 s after the last refresh.

    ``cpus`` are the numbers of those it may run on, of which it uses ``threads``; the speeds are
    those of its last jobs, or before the first of its self-test; None if neither was measured.
    ``slowdowns`` says how many times as long a token takes when 1, 2, … jobs generate at once, on
    average of these. If more generate than ``jobs_per_batch``, the oldest are in each batch, and
    the others take turns in its last place; None if all are in each batch.
    ``idle_since`` is None while it has a job. ``overlaps`` are the ids of the inferers that it
    shares CPUs with, to the harm of both, 32 at most; a gateway fills it in, the bucket does not
    hold it. ``cpu`` is the CPU's name; ``cpu_features`` is what llama.cpp was compiled to use of
    it, in llama.cpp's words, and ``cpu_features_missing`` what it could use besides. ``warning``
    says why it computes more slowly than it could, or None. ``tasks`` are those that the model can
    do, ``vocabulary`` is how many tokens it knows, 0 if unknown, ``dimensions`` how many numbers an
    embedding has, 0 if it computes none. ``format`` is that of answers in conversations with tools,
    None if it knows none; ``template_options`` are what the model's chat template takes besides.
    ``adapters`` are the LoRA adapters that it has; ``sampling_defaults`` are the values of options
    that a request does not set. ``max_choices`` is the most answers to one request; ``accepts``
    lists features that earlier versions do not have (`GRAMMARS`, `PROMPT_TOKENS`). ``prefixes`` are
    the fingerprints of prompts that it has computed recently (`shared/prompt_prefixes.py`); always
    empty in the HTTP API.
    """

    id: InfererId
    model: str
    slots: Annotated[int, Meta(ge=0, le=64)]
    host: str
    threads: Annotated[int, Meta(ge=0, le=65_536)]
    n_ctx: AtLeastOne
    tasks: Tasks
    started_at: str
    version: str
    token_bytes: Count = 0
    vocabulary: Count = 0
    format: AnswerFormat | None = None
    template_options: TemplateOptionNames = []
    dimensions: Count = 0
    adapters: AdapterNames = []
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    max_choices: Count = 1
    accepts: Accepted = []
    priority: SmallInt = 0
    state: InfererState = "idle"
    cpus: Cpus = []
    gpu_layers: SmallInt = 0
    jobs: Annotated[list[RunningJob], Meta(max_length=1024)] = []
    prompt_tokens_per_s: TokensPerS | None = None
    tokens_per_s: TokensPerS | None = None
    slowdowns: Annotated[list[Slowdown], Meta(max_length=64)] = []
    jobs_per_batch: AtLeastOne | None = None
    idle_since: str | None = None
    overlaps: list[str] = []
    cpu: str = ""
    cpu_features: list[str] = []
    cpu_features_missing: list[str] = []
    warning: str | None = None
    prefixes: Annotated[list[str], Meta(max_length=64)] = []

    def __post_init__(self) -> None:
        check_times(self.started_at, self.idle_since)


class ModelFacts(Struct, frozen=True):
    """What a gateway must know of a model to check requests while no inferer is alive.

    ``token_bytes`` is the length of the longest token, 0 if unknown: a prompt of more than
    ``n_ctx`` times that cannot fit. ``vocabulary`` is the number of its tokens, 0 if unknown,
    ``dimensions`` that of an embedding, 0 if it computes none. ``format``, ``template_options``,
    ``sampling_defaults`` are as in `InfererEntry`. ``adapters`` are those that every inferer of the
    model has, ``max_choices`` is the most answers that all of them can give, and ``accepts`` lists
    what all of them accept, because any of them may get the job.
    """

    n_ctx: AtLeastOne
    tasks: Tasks
    token_bytes: Count = 0
    vocabulary: Count = 0
    format: AnswerFormat | None = None
    template_options: TemplateOptionNames = []
    dimensions: Count = 0
    adapters: AdapterNames = []
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    max_choices: Count = 1
    accepts: Accepted = []

    @classmethod
    def of(cls, entries: Sequence[InfererEntry]) -> "ModelFacts":
        """The facts about a model from its inferers, at least one. Where they differ, the youngest
        counts, except for facts that must apply to all of them."""
        youngest = max(entries, key=lambda entry: entry.started_at)
        facts = {name: getattr(youngest, name) for name in cls.__struct_fields__}
        common = set.intersection(*(set(entry.adapters) for entry in entries))
        fewest = min(entry.max_choices for entry in entries)
        accepted = set.intersection(*(set(entry.accepts) for entry in entries))
        common_to_all = {
            "adapters": sorted(common),
            "max_choices": fewest,
            "accepts": sorted(accepted),
        }
        return cls(**{**facts, **common_to_all})


Concurrency = Annotated[int, Meta(ge=0, le=64, description="Jobs at once; 0 takes no jobs.")]


class SetConcurrency(Struct, frozen=True):
    """``infer.control.<model>.<inferer>``: how many slots to have."""

    concurrency: Concurrency


class ConcurrencyChange(Struct, frozen=True, kw_only=True):
    """What an inferer did with the command; ``refused`` says why it refused it."""

    inferer: str
    model: str
    before: int
    concurrency: int
    refused: str | None = None


class OverlappingInferer(Struct, frozen=True):
    """An inferer on the same host, the CPUs that it may use, and how many threads it has."""

    id: str
    threads: int
    cpus: Cpus


class OverlapNotice(Struct, frozen=True):
    """``infer.overlap.<model>.<inferer>``: the inferers that share CPUs with this one, to the harm
    of both. At most 32, with those of the lowest ids."""

    inferers: list[OverlappingInferer]
