"""The parameters of the routes under ``/v1`` that are refused or have no effect.

Together with the fields of the bodies, these are all known parameters: any other name is refused.
`docs/reference/openai.md` is generated from both.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from msgspec import Raw, Struct

from services.gateway.validation.decode import decode_body
from services.gateway.validation.wording import unknown_field
from shared.errors import InvalidRequest

EMPTY: tuple[Any, ...] = (None, "", [], {})
LONGEST_NOTHING = 64
"""The most bytes, with white space, of a value that asks for nothing."""


class Refused(Struct, frozen=True):
    """A parameter that would change the answer, and that Sluice cannot honour. Only an empty value
    is accepted, or one of the values in ``nothing``, which ask for what happens anyway."""

    why: str
    nothing: tuple[Any, ...] = ()

    def require_nothing(self, param: str, value: Raw) -> None:
        """Raises: InvalidRequest: the ``value`` of the parameter asks for something."""
        if len(value) <= LONGEST_NOTHING:
            read = decode_body(bytes(value), Any)
            if any(read == one for one in (*EMPTY, *self.nothing)):
                return
        raise InvalidRequest(f"{param}: not supported: {self.why}", param)


class WithoutEffect(Struct, frozen=True):
    """A parameter that cannot change the answer. Any value is accepted and ignored."""

    why: str


OtherParameters = Mapping[str, Refused | WithoutEffect]

_TEXT_ONLY = "only text is supported; leave it out"
_SAMPLERS = "Sluice does not have this sampler; use `temperature`, `top_p`, `top_k` and `min_p`"
_OFF = "belongs to a sampler that is off"
_CACHE = "the prompt cache works automatically"

USER: OtherParameters = {
    "user": WithoutEffect("identifies the end user; use `metadata` to find the jobs of a user"),
}
IDENTITY: OtherParameters = {
    **USER,
    "safety_identifier": WithoutEffect("identifies the end user to OpenAI"),
    "request_id": WithoutEffect("each job has its own id"),
}
TRUNCATION: OtherParameters = {
    "truncate_prompt_tokens": Refused("inputs are never truncated; shorten them yourself"),
}
SAMPLING: OtherParameters = {
    "typical_p": Refused(_SAMPLERS, (1,)),
    "typ_p": Refused(_SAMPLERS, (1,)),
    "tfs_z": Refused(_SAMPLERS, (1,)),
    "top_n_sigma": Refused(_SAMPLERS, (-1, 0)),
    "mirostat": Refused(_SAMPLERS, (0,)),
    "dynatemp_range": Refused(_SAMPLERS, (0,)),
    "xtc_probability": Refused(_SAMPLERS, (0,)),
    "dry_multiplier": Refused(_SAMPLERS, (0,)),
    "samplers": Refused("the order of the samplers is fixed; leave it out"),
    **dict.fromkeys(
        (
            "mirostat_tau",
            "mirostat_eta",
            "dynatemp_exponent",
            "xtc_threshold",
            "dry_base",
            "dry_allowed_length",
            "dry_penalty_last_n",
            "dry_sequence_breakers",
        ),
        WithoutEffect(_OFF),
    ),
    "repeat_last_n": Refused("penalties always apply to the last 64 tokens; leave it out", (64,)),
    "min_keep": Refused(_SAMPLERS, (0, 1)),
    "use_beam_search": Refused("use `n` for several answers", (False,)),
    "length_penalty": Refused("part of beam search; use `max_tokens` and `min_tokens`", (1,)),
}
TOKENS: OtherParameters = {
    "allowed_token_ids": Refused("use `logit_bias`, or `structured_outputs` to choose from texts"),
    "bad_words": Refused("use `logit_bias` with -100 for the tokens of the words"),
    "logits_processors": Refused("clients cannot run code in Sluice; use `logit_bias`"),
    "include_stop_str_in_output": Refused("a stop text is never part of the answer", (False,)),
    "skip_special_tokens": Refused("control tokens are never part of the answer", (True,)),
    "spaces_between_special_tokens": WithoutEffect("control tokens are not part of the answer"),
    "detokenize": Refused("answers are text", (True,)),
    "prompt_logprobs": Refused("`logprobs` cover the answer only"),
    "n_probs": Refused("use `logprobs` and `top_logprobs`", (0,)),
    "post_sampling_probs": Refused("`logprobs` are always those before sampling", (False,)),
    "return_tokens": Refused("use `logprobs`, which has the text of each token", (False,)),
    "return_token_ids": Refused("use `logprobs`, which has the text of each token", (False,)),
    "return_tokens_as_token_ids": Refused("`logprobs` has texts, not ids", (False,)),
    "timings_per_token": Refused("`GET /status/<id>` shows the timings of a job", (False,)),
    "return_progress": Refused("`GET /status/<id>` shows the progress of a job", (False,)),
}
PROMPT: OtherParameters = {
    **TRUNCATION,
    "mm_processor_kwargs": Refused(_TEXT_ONLY),
    "documents": Refused("put them into the prompt"),
    "cache_salt": Refused("use `cache_prompt: false` for a prompt that must not be shared"),
    "kv_transfer_params": Refused("leave it out"),
    "vllm_xargs": Refused("leave it out"),
    "lora": Refused("use `adapter`"),
    "id_slot": WithoutEffect("slots are assigned by the inferer"),
    "n_keep": WithoutEffect("the context is never shifted"),
    "n_discard": WithoutEffect("the context is never shifted"),
    "n_indent": Refused("leave it out", (0,)),
    "t_max_predict_ms": Refused("use `timeout_s`", (0, -1)),
    "speculative.n_max": WithoutEffect("speculation does not change answers"),
    "speculative.n_min": WithoutEffect("speculation does not change answers"),
    "speculative.p_min": WithoutEffect("speculation does not change answers"),
}
TEXT: OtherParameters = {**IDENTITY, **SAMPLING, **TOKENS, **PROMPT}
"""The parameters of both routes that generate text."""

TEMPLATE: OtherParameters = {
    "add_generation_prompt": Refused("an answer is always a new message", (True,)),
    "continue_final_message": Refused(
        "send the text to continue as `prompt` to /v1/completions", (False,)
    ),
    "add_special_tokens": Refused("the chat template adds them", (False,)),
    "chat_template": Refused("the model's own template is used; see `chat_template_kwargs`"),
    "echo": Refused("an answer does not repeat the messages", (False,)),
    "include_reasoning": Refused("reasoning is always returned, in `reasoning_content`", (True,)),
    "reasoning_format": Refused("reasoning is in `reasoning_content`", ("auto", "deepseek")),
    "thinking_token_budget": Refused("use `reasoning_effort` or `max_tokens`"),
    "parse_tool_calls": Refused("tool calls are always parsed", (True,)),
}
"""Those of both routes that take a conversation."""

CHAT: OtherParameters = {
    **TEXT,
    "audio": Refused(_TEXT_ONLY),
    "modalities": Refused(_TEXT_ONLY, (["text"],)),
    "functions": Refused("use `tools`"),
    "function_call": Refused("use `tools` and `tool_choice`", ("none", "auto")),
    "moderation": Refused("Sluice does not moderate; leave it out"),
    "prediction": WithoutEffect("only makes answers faster; speculation does that automatically"),
    "prompt_cache_key": WithoutEffect(_CACHE),
    "prompt_cache_options": WithoutEffect(_CACHE),
    "prompt_cache_retention": WithoutEffect(_CACHE),
    "service_tier": Refused("use `priority`", ("auto", "default")),
    "store": Refused("answers cannot be listed under /v1; `GET /jobs` lists jobs", (False,)),
    "verbosity": Refused("state in a message how long the answer should be", ("medium",)),
    "web_search_options": Refused("Sluice does not search the web; leave it out"),
    **TEMPLATE,
}
COMPLETIONS: OtherParameters = {
    **TEXT,
    "suffix": Refused("text is only generated after the prompt"),
    "add_special_tokens": Refused("special tokens are always added to a text", (True,)),
}
EMBEDDINGS: OtherParameters = {
    **USER,
    **TRUNCATION,
    "add_special_tokens": Refused("special tokens are always added to a text", (True,)),
    "request_id": IDENTITY["request_id"],
    "embd_normalize": Refused("embeddings are always normalized to length 1", (2,)),
    "normalize": Refused("embeddings are always normalized to length 1", (True,)),
    "input_type": Refused("put the prefix that the model needs before each input: `query: `"),
}
RERANK: OtherParameters = {
    **USER,
    **TRUNCATION,
    "request_id": IDENTITY["request_id"],
    "rank_fields": Refused("documents are plain texts"),
    "max_chunks_per_doc": Refused("documents are not split; split them yourself"),
    "max_tokens_per_doc": Refused("documents are never truncated; shorten them yourself"),
}
RESPONSES: OtherParameters = {
    **SAMPLING,
    **TOKENS,
    **PROMPT,
    **TEMPLATE,
    "length_penalty": Refused(
        "part of beam search; use `max_output_tokens` and `min_tokens`", (1,)
    ),
    "include_reasoning": Refused("reasoning is always in the output", (True,)),
    "reasoning_format": Refused("reasoning is an item of the output", ("auto", "deepseek")),
    "n_probs": Refused("use `top_logprobs` and `include`", (0,)),
    "thinking_token_budget": Refused("use `reasoning` or `max_output_tokens`"),
    "use_beam_search": Refused("a response has one answer; leave it out", (False,)),
    "request_id": IDENTITY["request_id"],
    "access_programs": Refused("no programs run here; leave it out"),
    "background_options": Refused("use `timeout_s` and `priority`"),
    "context_management": Refused("nothing is cut from a conversation; shorten it yourself"),
    "conversation": Refused("use `previous_response_id`"),
    "functions": CHAT["functions"],
    "image": Refused(_TEXT_ONLY),
    "logprobs": Refused("use `top_logprobs` and `include`", (False,)),
    "max_completion_tokens": Refused("use `max_output_tokens`"),
    "max_tokens": Refused("use `max_output_tokens`"),
    "messages": Refused("send them as `input`"),
    "moderation": CHAT["moderation"],
    "prompt": Refused("send the text itself, as `instructions` and `input`"),
    "prompt_cache_options": WithoutEffect(_CACHE),
    "prompt_cache_retention": WithoutEffect(_CACHE),
    "reasoning_effort": Refused("use `reasoning`"),
    "response_format": Refused("use `text`"),
    "service_tier": CHAT["service_tier"],
    "truncation": Refused("nothing is cut from a conversation; shorten it yourself", ("disabled",)),
}


class Body(Struct, frozen=True, kw_only=True):
    """The body of a request. Its fields are the honoured parameters."""

    others: ClassVar[OtherParameters] = {}

    @classmethod
    def check_names(cls, body: bytes) -> None:
        """Refuse parameters that would otherwise be ignored.

        Raises:
            InvalidRequest: a parameter of ``body`` is unknown or not supported, or it is not an
                object.
        """
        for name, value in decode_body(body, dict[str, Raw]).items():
            if name in cls.__struct_fields__:
                continue
            other = cls.others.get(name)
            if other is None:
                raise unknown_field(name, name, [*cls.__struct_fields__, *cls.others])
            if isinstance(other, Refused):
                other.require_nothing(name, value)

    def as_sent(self, error: InvalidRequest) -> InvalidRequest:
        """``error``, which is about a job, with the name that its parameter has here."""
        return error
