"""The official OpenAI client, unchanged, with its default settings."""

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.support.processes import Stack, eventually

HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(shared_stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared_stack.url}/v1", api_key="none") as opened:
        yield opened


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    """list and retrieve agree on the one model; another is a NotFoundError."""
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert model.created > 1_700_000_000
    assert client.models.retrieve("tiny") == model
    for name in ("nope", "No Such"):
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve(name)
        assert raised.value.code == "model_not_found"


def test_a_chat_completion_has_everything_the_client_models(client: openai.OpenAI) -> None:
    """Everything the client models is there and adds up."""
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer._request_id


def test_what_clients_send_back_is_taken(client: openai.OpenAI) -> None:
    """An assistant's message without content, as it is when tools were called, and a tool's; no
    model named. From anybody else content is missing, and the field is named."""
    called: Any = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for silent in ({"content": None}, {}):
        conversation: Any = [
            *HI,
            {"role": "assistant", **silent, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ]
        answer = client.chat.completions.create(model="", messages=conversation, max_tokens=2)
        assert (answer.model, answer.usage and answer.usage.completion_tokens) == ("tiny", 2)
    for role in ("user", "system", "tool"):
        without_content: Any = [*HI, {"role": role, "content": None}]
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(model="tiny", messages=without_content)
        assert raised.value.param == "messages[1].content"


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_a_deadline_counts(shared_stack: Stack, client: openai.OpenAI, streams: bool) -> None:
    """`timeout_s` ends a job here, too; one that cannot be is refused."""
    blocker = shared_stack.submit(prompt="blocker", max_tokens=4000)
    brief: Any = {"model": "tiny", "messages": HI, "stream": streams}
    with pytest.raises(openai.APIError) as raised:
        list(client.chat.completions.create(**brief, extra_body={"timeout_s": 0.2}))
    assert raised.value.code in ("deadline_passed", "timed_out")
    shared_stack.http.delete(f"/jobs/{blocker}")
    with pytest.raises(openai.BadRequestError, match="timeout_s"):
        client.chat.completions.create(**brief, extra_body={"timeout_s": -1})


def test_a_completion_has_16_tokens_by_default(client: openai.OpenAI) -> None:
    """16 tokens where nothing is said, as OpenAI does it."""
    answer = client.completions.create(model="tiny", prompt="once upon")
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_a_streamed_chat_adds_up(client: openai.OpenAI) -> None:
    """The deltas are the text that the same seed gives at once; the last chunk has the reason."""
    options: Any = {"model": "tiny", "messages": HI, "max_tokens": 60, "seed": 11}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 3, "it did not stream"
    assert all(chunk.usage is None for chunk in chunks)


def test_a_streamed_completion_adds_up(client: openai.OpenAI) -> None:
    """The same for a plain prompt."""
    options: Any = {"model": "tiny", "prompt": "once", "max_tokens": 60, "seed": 11}
    whole = client.completions.create(**options).choices[0].text
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"


def test_usage_in_a_stream_is_sent_if_asked_for(client: openai.OpenAI) -> None:
    """`include_usage` adds one last chunk without choices; the others say null."""
    stream = client.chat.completions.create(
        model="tiny",
        messages=HI,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    *others, last = stream
    assert all(chunk.usage is None and chunk.choices for chunk in others)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 4


def test_options_arrive(client: openai.OpenAI) -> None:
    """seed, stop, temperature, max_tokens and max_completion_tokens do what they say."""

    def ask(**options: Any) -> Any:
        options = {"model": "tiny", "prompt": "once", "max_tokens": 30, **options}
        return client.completions.create(**options)

    text = ask(seed=1).choices[0].text
    assert ask(seed=1).choices[0].text == text
    assert ask(seed=2).choices[0].text != text
    assert ask(temperature=0, seed=1).choices[0].text == ask(temperature=0).choices[0].text
    end = text[5:9]
    stopped = ask(seed=1, stop=[end, "never there"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(end)], "stop")

    chat = client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=3)
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 3


def test_all_roles_and_text_parts_are_accepted(client: openai.OpenAI) -> None:
    """developer is system by another name, and parts are joined: the prompt is the same."""

    def prompt_tokens(*messages: Any) -> int:
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    rules, question = "Answer in one short sentence.", "What is the capital of France?"
    user = {"role": "user", "content": question}
    parts = [{"type": "text", "text": question[:10]}, {"type": "text", "text": question[10:]}]
    system = prompt_tokens({"role": "system", "content": rules}, user)
    assert prompt_tokens({"role": "developer", "content": rules}, user) == system
    assert prompt_tokens({"role": "system", "content": 2 * rules}, user) > system
    assert prompt_tokens({"role": "user", "content": parts}) == prompt_tokens(user)


def test_the_second_turn_says_what_was_cached(client: openai.OpenAI) -> None:
    """The tokens of the first one; none for a job that wants to be computed whole."""
    question = {"role": "user", "content": "Tell me about the sea. " * 30}

    def usage_of(*messages: Any, **options: Any) -> Any:
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, temperature=0, **options
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage, answer.choices[0].message.content

    first, text = usage_of(question)
    turn = (question, {"role": "assistant", "content": text}, {"role": "user", "content": "More"})
    second, _ = usage_of(*turn)
    cold, _ = usage_of(*turn, extra_body={"cache_prompt": False})
    assert second.prompt_tokens_details.cached_tokens >= first.prompt_tokens - 10
    assert cold.prompt_tokens_details.cached_tokens == 0
    assert cold.prompt_tokens == second.prompt_tokens


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    """Even a model of random weights answers with JSON valid under it."""
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=HI,
        max_tokens=300,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": schema},
        },
    )
    assert answer.choices[0].finish_reason == "stop"
    parsed = json.loads(answer.choices[0].message.content or "")
    assert parsed["answer"] in ("yes", "no")
    assert isinstance(parsed["sure"], bool)


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    """Of each token, and of the likeliest in its place; streamed they are the same."""
    wanted: dict[str, Any] = {
        "model": "tiny",
        "messages": HI,
        "max_tokens": 30,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
        "extra_body": {"ignore_eos": True},
    }
    choice = client.chat.completions.create(**wanted).choices[0]
    assert choice.logprobs is not None
    whole = choice.logprobs.content
    assert whole is not None
    assert len(whole) == 30
    text = b"".join(bytes(one.bytes or []) for one in whole).decode("utf-8", "replace")
    assert text == choice.message.content
    for one in whole:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob <= 0
        assert one.token == one.top_logprobs[0].token
    streamed = [
        one
        for chunk in client.chat.completions.create(**wanted, stream=True)
        if chunk.choices and chunk.choices[0].logprobs is not None
        for one in chunk.choices[0].logprobs.content or []
    ]
    assert [one.model_dump() for one in streamed] == [one.model_dump() for one in whole]
    del wanted["logprobs"], wanted["top_logprobs"]
    assert client.chat.completions.create(**wanted).choices[0].logprobs is None


def test_log_probabilities_of_a_completion(client: openai.OpenAI) -> None:
    """In the form of that route: lists, with the place of each token."""
    wanted: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 20, "seed": 3}
    choice = client.completions.create(**wanted, logprobs=2).choices[0]
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert len(top) == 2
        assert logprob <= max(top.values())
        assert top.get(token, logprob) == logprob
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        if "\N{REPLACEMENT CHARACTER}" not in token:
            assert choice.text[offset:].startswith(token)
    chunks = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(**wanted, logprobs=2, stream=True)
        if chunk.choices[0].logprobs is not None
    ]
    assert [token for chunk in chunks for token in chunk.tokens or []] == found.tokens
    assert [logprob for chunk in chunks for logprob in chunk.token_logprobs or []] == (
        found.token_logprobs
    )
    offsets = [offset for chunk in chunks for offset in chunk.text_offset or []]
    assert offsets == found.text_offset
    plain = client.completions.create(**wanted, logprobs=0).choices[0].logprobs
    assert plain is not None
    assert (plain.tokens, plain.top_logprobs) == (found.tokens, None)


def test_tokens_are_banned_and_forced(client: openai.OpenAI) -> None:
    """`logit_bias` as OpenAI has it; `min_tokens`, `ignore_eos` and `stop_token_ids` as others."""
    text = client.completions.create(
        model="tiny", prompt="hi", max_tokens=8, temperature=0, logit_bias={"70": 100}
    )
    again = client.completions.create(
        model="tiny",
        prompt="hi",
        max_tokens=8,
        temperature=0,
        logit_bias={"70": 100},
        extra_body={"stop_token_ids": [70], "min_tokens": 3},
    )
    assert text.usage is not None
    assert again.usage is not None
    assert text.usage.completion_tokens == 8
    assert len(set(text.choices[0].text)) == 1
    assert again.usage.completion_tokens == 3
    assert again.choices[0].finish_reason == "stop"
    assert text.choices[0].text[0] not in again.choices[0].text
    whole = client.completions.create(
        model="tiny", prompt="hi", max_tokens=50, extra_body={"ignore_eos": True}
    )
    assert whole.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"n": 9}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name"),
        ({"extra_body": {"functions": [{"name": "f"}]}}, "functions"),
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 2_000}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"extra_body": {"stop_token_ids": [99999999]}}, "stop_token_ids"),
        ({"extra_body": {"min_tokens": 9}, "max_tokens": 8}, "min_tokens"),
        ({"extra_body": {"min_tokens": 5_000}}, "min_tokens"),
        (
            {"extra_body": {"stop_token_ids": [5]}, "response_format": {"type": "json_object"}},
            "stop_token_ids",
        ),
        (
            {"extra_body": {"ignore_eos": True}, "response_format": {"type": "json_object"}},
            "ignore_eos",
        ),
    ],
    ids=str,
)
def test_a_bad_request_names_its_parameter(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    """What is wrong or not supported is a BadRequestError, before anything is accepted."""
    wanted: dict[str, Any] = {"model": "tiny", "messages": HI, **options}
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**wanted)
    error = raised.value
    assert (error.param, error.code) == (param, "invalid_request")
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(client: openai.OpenAI, stream: bool) -> None:
    """NotFoundError, also where a stream was asked for."""
    for create in (
        lambda: client.chat.completions.create(model="nope", messages=HI, stream=stream),
        lambda: client.completions.create(model="nope", prompt="hi", stream=stream),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            create()
        assert raised.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_is_cancelled_is_not_sent_again(
    shared_stack: Stack, client: openai.OpenAI, stream: bool
) -> None:
    """The client gets an error, and does not run the job a second time."""
    known = _accepted(shared_stack)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            answer: Any = client.completions.create(
                model="tiny", prompt="go on", max_tokens=4_000, stream=stream
            )
            for _ in answer:
                pass
        except Exception as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    (job_id,) = eventually(_new(shared_stack, known), "accepted")
    shared_stack.wait_for_state(job_id, "STARTED")
    assert shared_stack.http.delete(f"/jobs/{job_id}").json()["state"] == "REVOKED"
    asking.join(60)

    (error,) = errors
    assert isinstance(error, openai.APIError)
    assert error.code == "cancelled"
    assert stream or isinstance(error, openai.APIStatusError)
    assert _accepted(shared_stack) == known | {job_id}


async def test_the_asynchronous_client_works_too(shared_stack: Stack) -> None:
    """The same over its other transport: an answer, a stream and an error."""
    async with openai.AsyncOpenAI(base_url=f"{shared_stack.url}/v1", api_key="none") as client:
        options: Any = {"model": "tiny", "messages": HI, "max_tokens": 30, "seed": 3}
        whole = (await client.chat.completions.create(**options)).choices[0].message.content
        stream = await client.chat.completions.create(**options, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(parts) == whole
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(**{**options, "max_tokens": -1})


def test_requests_at_the_same_time_are_all_answered(
    shared_stack: Stack, client: openai.OpenAI
) -> None:
    """Ten callers of one client get ten answers: nobody gets another's."""
    texts: dict[int, str] = {}

    def ask(seed: int) -> None:
        answer = client.completions.create(model="tiny", prompt="hi", seed=seed, max_tokens=20)
        texts[seed] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(texts) == 10
    assert all(first != other for first, other in itertools.combinations(texts.values(), 2))
    again = client.completions.create(model="tiny", prompt="hi", seed=4, max_tokens=20)
    assert again.choices[0].text == texts[4]


def _accepted(stack: Stack) -> set[str]:
    return {event["job_id"] for event in stack.gateways[0].events("request_accepted")}


def _new(stack: Stack, known: set[str]) -> Callable[[], set[str] | None]:
    return lambda: (_accepted(stack) - known) or None
