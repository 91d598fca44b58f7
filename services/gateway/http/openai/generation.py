"""The parameters that all routes under `/v1` have that generate text, also by the names that
llama.cpp's and vLLM's servers have for them, and their conversion to those of a job."""

from typing import Annotated, Any

from msgspec import UNSET, Meta, Raw, UnsetType

from services.gateway.http.openai.parameters import Body
from services.gateway.http.openai.structured import StructuredOutputs, formats_of
from shared.errors import InvalidRequest
from shared.wire.api import Submission, TimeoutS
from shared.wire.fields import Metadata
from shared.wire.requests import (
    AdapterName,
    LogitBias,
    MinTokens,
    Penalty,
    Priority,
    Probability,
    RepeatPenalty,
    ResponseFormat,
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
    TemplateOptions,
)
from shared.wire.responses import ReasoningEffort

RANDOM_SEED = -1
"""In llama.cpp and vLLM, this ``seed`` means the same as none."""

NO_LIMIT = -1
"""In llama.cpp, the ``n_predict`` that means no limit."""

AnyPriority = Priority | Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class GenerationRequest(Body, frozen=True, kw_only=True):
    """The parameters of all routes that generate text."""

    model: str | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """0 or -1 disables it."""
    min_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    repetition_penalty: RepeatPenalty | None = None
    """Another name of `repeat_penalty`."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    n_predict: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """llama.cpp's name of the maximum length of an answer, in tokens; -1 means no limit."""
    seed: Seed | None = None
    """With the same seed, a request usually gets the same answer; -1 means a random one."""
    stop: Stop | None = None
    """A text that ends the answer and is not part of it, or up to 16 of them."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's constraint on the answer: one of `json`, `json_object`, `regex`, `choice` and
    `grammar`."""
    guided_json: Raw | UnsetType = UNSET
    """A JSON schema that the answer must match, as an object or as text."""
    guided_regex: str | None = None
    """A regular expression that the whole answer must match."""
    guided_choice: list[str] | None = None
    """The answer must be one of these texts."""
    guided_grammar: str | None = None
    """A grammar that the answer must match, in GBNF."""
    grammar: str | None = None
    """llama.cpp's name of `guided_grammar`."""
    json_schema: Raw | UnsetType = UNSET
    """llama.cpp's name of `guided_json`."""
    logit_bias: LogitBias | None = None
    min_tokens: MinTokens | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopTokenIds | None = None
    cache_prompt: bool | None = None
    adapter: AdapterName | None = None
    metadata: Metadata | UnsetType = UNSET
    timeout_s: TimeoutS | None = None
    priority: AnyPriority | None = None
    """`high`, `normal` or `low`, or a number as in vLLM: below 0 is high, 0 normal, above 0 low."""

    @property
    def own_format(self) -> dict[str, ResponseFormat | None]:
        """What the route's own parameter for the format says, by the parameter's name."""
        return {}

    def _options(self, *more: str) -> dict[str, Any]:
        """The options that were set, with Sluice's names; also ``more``, which a job has under the
        same names.

        Raises:
            InvalidRequest: two parameters contradict each other.
        """
        same = set(GenerationRequest.__struct_fields__) & set(Submission.__struct_fields__)
        options = {name: getattr(self, name) for name in (*same, *more)}
        options |= {
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "repeat_penalty": self._same("repeat_penalty", "repetition_penalty"),
            "max_tokens": self._same(*LENGTHS),
            "seed": None if self.seed == RANDOM_SEED else self.seed,
            "priority": None if self.priority is None else priority_of(self.priority),
            "response_format": next(iter(formats_of(self).values()), None),
        }
        if self.n_predict == 0:
            raise InvalidRequest("n_predict must be at least 1, or -1 for no limit", "n_predict")
        if options["max_tokens"] == NO_LIMIT:
            del options["max_tokens"]
        return {name: value for name, value in options.items() if value is not None}

    def as_sent(self, error: InvalidRequest) -> InvalidRequest:
        names = {
            "response_format": [*formats_of(self)],
            "repeat_penalty": ["repetition_penalty"],
            "max_tokens": LENGTHS[1:],
            "chat_template_kwargs": ["chat_template_kwargs", "reasoning_effort", "enable_thinking"],
            "prompt_tokens": ["prompt"],
        }.get(error.param or "", [])
        for name in names:
            if "." in name or getattr(self, name, None) is not None:
                assert error.param is not None
                return type(error)(error.message.replace(error.param, name), name)
        return error

    def _same(self, *names: str) -> Any:
        """The value of a parameter that has several ``names``.

        Raises: InvalidRequest: they have different values.
        """
        given = {name: getattr(self, name, None) for name in names}
        values = [(name, value) for name, value in given.items() if value is not None]
        for name, value in values:
            if value != values[0][1]:
                raise InvalidRequest(
                    f"{name}: differs from {values[0][0]}, which means the same; send one of them",
                    name,
                )
        return values[0][1] if values else None


LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
"""Names of the maximum length of an answer; each route has some of them."""


def template_options(
    effort: ReasoningEffort | None, enable_thinking: bool | None, options: TemplateOptions | None
) -> TemplateOptions:
    """The options of a chat template that these parameters stand for."""
    found: TemplateOptions = {}
    if effort is not None:
        found = {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
    if enable_thinking is not None:
        found["enable_thinking"] = enable_thinking
    return found | (options or {})


def priority_of(given: AnyPriority) -> Priority:
    """A client's priority as Sluice's. In vLLM it is a number, and the lowest runs first."""
    if isinstance(given, str):
        return given
    return "high" if given < 0 else "low" if given > 0 else "normal"
