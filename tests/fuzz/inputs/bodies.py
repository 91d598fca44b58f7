"""Bodies of submits, in our words and in OpenAI's."""

from typing import Any

from hypothesis import strategies as st

from tests.fuzz.inputs.schemas import schemas
from tests.fuzz.inputs.texts import texts
from tests.fuzz.inputs.values import values

FORMATS = st.one_of(
    st.sampled_from(({"type": "text"}, {"type": "json_object"}, {"type": "grammar"}, None)),
    schemas().map(lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}),
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(("user", "system", "assistant", "tool", "developer")),
            "content": st.one_of(
                texts(2_000),
                st.lists(texts(500).map(lambda text: {"type": "text", "text": text}), max_size=3),
                st.none(),
            ),
        },
        optional={"name": st.text(max_size=10)},
    ),
    max_size=4,
)


def _any_of(*good: Any) -> st.SearchStrategy[Any]:
    """Mostly one of these."""
    return st.one_of(st.sampled_from(good), st.sampled_from(good), values())


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": _any_of(0, 0.8, 2, 1e-300),
    "top_p": _any_of(0, 0.5, 1),
    "top_k": _any_of(0, 1, 40, 2**31 - 1),
    "min_p": _any_of(0, 0.05, 1),
    "seed": _any_of(0, 7, -1, 2**63 - 1),
    "n": _any_of(1, 2, 3, 9),
    "stop": _any_of("a", "\n", ["a", "b"], "e" * 3_000),
    "repeat_penalty": _any_of(1, 1.1, 10),
    "presence_penalty": _any_of(0, -2, 2),
    "frequency_penalty": _any_of(0, -2, 2),
    "response_format": FORMATS,
    "logit_bias": _any_of({}, {"5": -100, "6": 100}, {"99999999": 1}),
    "min_tokens": _any_of(0, 3, 2**31 - 1),
    "ignore_eos": _any_of(True, False),
    "stop_token_ids": _any_of([], [5, 6], [99999999]),
    "logprobs": _any_of(True, False),
    "top_logprobs": _any_of(0, 3, 20),
    "adapter": _any_of("first", "", "a b"),
    "cache_prompt": _any_of(True, False),
    "metadata": _any_of({}, {"a": 1}),
    "priority": _any_of("high", "normal", "low"),
    "model": _any_of("tiny", "nobody", "", "org/name", "qwen2.5:1.5b", "x" * 200, "a.>"),
    "user": values(),
}


def submissions() -> st.SearchStrategy[dict[str, Any]]:
    """What ``POST /jobs`` takes, or nearly."""
    asked = st.one_of(
        st.fixed_dictionaries({"prompt": texts()}),
        st.fixed_dictionaries({"messages": MESSAGES}),
        st.fixed_dictionaries({}, optional={"prompt": values(), "messages": values()}),
    )
    return _with_options(asked, {**OPTIONS, "stream": _any_of(True, False)})


def openai_requests() -> st.SearchStrategy[dict[str, Any]]:
    """What the routes under ``/v1`` take, or nearly."""
    asked = st.one_of(
        st.fixed_dictionaries({"messages": MESSAGES}),
        st.fixed_dictionaries({"prompt": st.one_of(texts(), st.lists(texts(200), max_size=3))}),
    )
    more = {
        "stream": _any_of(True, False),
        "stream_options": _any_of({"include_usage": True}, None),
        "echo": _any_of(True, False),
        "best_of": _any_of(1, 2),
        "tools": _any_of([], None),
        "logprobs": _any_of(False, None),
        "max_completion_tokens": _any_of(1, 5),
    }
    return _with_options(asked, {**OPTIONS, **more})


@st.composite
def _with_options(
    draw: st.DrawFn, asked: st.SearchStrategy[dict[str, Any]], options: dict[str, Any]
) -> dict[str, Any]:
    """A few of ``options``, and bounds, so that a case takes a moment and no more."""
    names = draw(st.lists(st.sampled_from(sorted(options)), max_size=4, unique=True))
    body = {name: draw(options[name]) for name in names}
    return body | draw(asked) | {"max_tokens": draw(_any_of(1, 3, 8)), "timeout_s": 20}
