"""How each parameter of `POST /v1/responses` is handled."""

from typing import Literal, NamedTuple


class Parameter(NamedTuple):
    """``accepted`` parameters have no effect, because they cannot change the answer. ``note`` gives
    the reason or, for a refused parameter, what to use instead."""

    handling: Literal["honoured", "accepted", "refused"]
    note: str = ""


def _refused(note: str) -> Parameter:
    return Parameter("refused", note)


_HONOURED = Parameter("honoured")

OWN = (
    "top_k",
    "min_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "cache_prompt",
    "adapter",
    "timeout_s",
    "priority",
)
"""Fields of a job that OpenAI's API does not have."""

PARAMETERS: dict[str, Parameter] = {
    "model": _HONOURED,
    "input": Parameter("honoured", "text, function calls and their outputs, reasoning"),
    "instructions": _HONOURED,
    "previous_response_id": Parameter(
        "honoured", "as long as the earlier response and its request are kept"
    ),
    "tools": Parameter("honoured", "functions only"),
    "tool_choice": Parameter("honoured", "functions only"),
    "parallel_tool_calls": _HONOURED,
    "text": Parameter("honoured", "`format`; of `verbosity` only `medium`"),
    "reasoning": Parameter("honoured", "`effort`, as an option of the model's chat template"),
    "max_output_tokens": _HONOURED,
    "temperature": _HONOURED,
    "top_p": _HONOURED,
    "top_logprobs": Parameter("honoured", "needs `include`"),
    "include": Parameter("honoured", "`message.output_text.logprobs`"),
    "metadata": Parameter("honoured", "any object, up to 16 kB"),
    "store": Parameter("honoured", "with `false`, the response cannot be read again"),
    "background": _HONOURED,
    "stream": _HONOURED,
    "stream_options": Parameter("accepted", "events are never padded (`include_obfuscation`)"),
    "truncation": Parameter("accepted", "`disabled`; `auto` is refused"),
    "max_tool_calls": Parameter("accepted", "it limits built-in tools, which are not supported"),
    "service_tier": Parameter("accepted", "`auto` and `default`; otherwise use `priority`"),
    "user": Parameter("accepted", "returned"),
    "safety_identifier": Parameter("accepted", "returned"),
    "prompt_cache_key": Parameter("accepted", "returned; prompts are cached anyway"),
    "prompt_cache_retention": Parameter("accepted", "prompts are cached anyway"),
    "prompt_cache_options": _refused("leave it out: prompts are cached anyway"),
    "access_programs": _refused("leave it out"),
    "background_options": _refused("use `timeout_s` and `priority` instead"),
    "context_management": _refused("send a shorter `input`"),
    "conversation": _refused("use `previous_response_id` instead"),
    "image": _refused("only text is supported"),
    "moderation": _refused("leave it out"),
    "prompt": _refused("send the text itself, as `instructions` and `input`"),
    **dict.fromkeys((*OWN, "chat_template_kwargs"), Parameter("honoured", "not in OpenAI's API")),
}
