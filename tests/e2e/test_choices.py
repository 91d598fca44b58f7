"""Several answers to one prompt, in one job: over HTTP, with OpenAI's client, and over NATS."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import nats
import openai
import pytest

from tests.support.processes import PATIENCE_S, Stack, eventually, server_sent_events

HI: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["number"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(shared_stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared_stack.url}/v1", api_key="none") as opened:
        yield opened


def by_choice(chunks: Iterable[Any], n: int) -> list[list[Any]]:
    """The choices of a stream's chunks, by their index."""
    found: list[list[Any]] = [[] for _ in range(n)]
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index].append(choice)
    return found


def test_a_chat_has_several_answers(client: openai.OpenAI) -> None:
    """The prompt counts once, the tokens of all answers are counted. Each answer is that of its
    own seed, and ends for its own reason. Streamed it is the same."""
    options: Any = {"model": "tiny", "messages": HI, "max_tokens": 30, "seed": 11}
    options["extra_body"] = {"cache_prompt": False}
    whole = client.chat.completions.create(**options, n=4)
    alone = [
        client.chat.completions.create(**{**options, "seed": 11 + number}) for number in range(4)
    ]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [one.choices[0].message.content for one in alone]
    assert len({*texts}) == 4
    assert whole.usage is not None
    usages = [one.usage for one in alone if one.usage is not None]
    assert whole.usage.prompt_tokens == usages[0].prompt_tokens
    assert whole.usage.completion_tokens == sum(usage.completion_tokens for usage in usages)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    *chunks, last = client.chat.completions.create(
        **options, n=4, stream=True, stream_options={"include_usage": True}
    )
    for choice, parts in zip(whole.choices, by_choice(chunks, 4), strict=True):
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.delta.role for part in parts if part.delta.role] == ["assistant"]
        assert [part.finish_reason for part in parts if part.finish_reason] == [
            choice.finish_reason
        ]
    assert (last.choices, last.usage) == ([], whole.usage)


def test_at_temperature_0_all_answers_are_the_same(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="once", n=3, best_of=3, temperature=0, max_tokens=20
    )
    assert len({choice.text for choice in answer.choices}) == 1
    assert len(answer.choices) == 3


@pytest.mark.parametrize("task", ["chat", "complete"])
def test_each_answer_has_its_log_probabilities(client: openai.OpenAI, task: str) -> None:
    """Streamed and whole, with the offsets of its own text; a stop string ends each by itself."""
    options: Any = {"model": "tiny", "n": 3, "max_tokens": 25, "seed": 3}
    # With a cached prompt, some CPUs round the sixth digit differently.
    options |= {"extra_body": {"cache_prompt": False}}
    create: Any
    if task == "chat":
        create = client.chat.completions.create
        options |= {"messages": HI, "logprobs": True, "top_logprobs": 2}
    else:
        create = client.completions.create
        options |= {"prompt": "once", "logprobs": 2}
    text = create(**options).choices[1]
    text = text.message.content if task == "chat" else text.text
    options |= {"stop": [text[14:18]]}
    whole = create(**options)
    streamed = by_choice(create(**options, stream=True), 3)
    names = ["content"] if task == "chat" else ["tokens", "token_logprobs", "text_offset"]
    for choice, parts in zip(whole.choices, streamed, strict=True):
        for name in names:
            pieces = [
                piece
                for part in parts
                if part.logprobs is not None
                for piece in getattr(part.logprobs, name)
            ]
            assert pieces == getattr(choice.logprobs, name)
            assert pieces


def test_each_answer_calls_its_tool(client: openai.OpenAI) -> None:
    """Calls have ids of their own; streamed they are the same but for the ids."""
    options: Any = {"model": "tiny", "messages": HI, "n": 4, "max_tokens": 200, "seed": 5}
    options |= {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(**options)
    calls = [choice.message.tool_calls[0] for choice in whole.choices if choice.message.tool_calls]
    assert len({call.id for call in calls}) == 4
    assert [choice.finish_reason for choice in whole.choices] == ["tool_calls"] * 4
    streamed = by_choice(client.chat.completions.create(**options, stream=True), 4)
    for call, parts in zip(calls, streamed, strict=True):
        (found,) = [one for part in parts for one in part.delta.tool_calls or []]
        assert found.index == 0
        assert found.function.to_dict() == call.function.to_dict()
        assert parts[-1].finish_reason == "tool_calls"


def test_each_answer_is_valid_under_a_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=HI,
        n=4,
        max_tokens=200,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": TOOL["function"]["parameters"]},
        },
    )
    for choice in answer.choices:
        assert 0 <= json.loads(choice.message.content or "")["number"] <= 99


def test_the_prompt_is_echoed(client: openai.OpenAI) -> None:
    """It comes before each answer, streamed and whole."""
    options: Any = {"model": "tiny", "prompt": ["Zwölf Boxkämpfer"], "seed": 4, "max_tokens": 9}
    plain = client.completions.create(**options, n=2)
    whole = client.completions.create(**options, n=2, echo=True)
    texts = [choice.text for choice in whole.choices]
    assert texts == ["Zwölf Boxkämpfer" + choice.text for choice in plain.choices]
    assert whole.usage is not None
    assert plain.usage is not None
    assert whole.usage.total_tokens == plain.usage.total_tokens
    chunks = client.completions.create(**options, n=2, echo=True, stream=True)
    streamed = ["".join(part.text for part in parts) for parts in by_choice(chunks, 2)]
    assert streamed == texts


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"n": 8, "logprobs": 5, "max_tokens": 1000}, "logprobs"),
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"echo": True, "max_tokens": 0}, "max_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    shared_stack: Stack, client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    """Before the queue, by the name of the field."""
    known = len(shared_stack.gateways[0].events("request_accepted"))
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny", prompt="hi", **options)
    assert raised.value.param == param
    assert len(shared_stack.gateways[0].events("request_accepted")) == known


def test_a_job_has_one_result_with_all_answers(shared_stack: Stack) -> None:
    """`text` and `message` are those of the first."""
    job_id = shared_stack.submit(messages=HI, max_tokens=12, n=3)
    result = shared_stack.wait_for_end(job_id)["result"]
    assert len(result["choices"]) == 3
    for name in ("text", "message", "finish_reason"):
        assert result[name] == result["choices"][0][name]
    assert result["usage"]["prompt_tokens"] > 0
    one = shared_stack.submit(messages=HI, max_tokens=12)
    assert "choices" not in shared_stack.wait_for_end(one)["result"]


def test_progress_counts_all_answers(shared_stack: Stack) -> None:
    """And a cancel ends them all."""
    job_id = shared_stack.submit(prompt="go", max_tokens=1500, n=8, ignore_eos=True)

    def is_in_its_second() -> bool:
        progress = shared_stack.status(job_id).get("progress", {"completion_tokens": 0})
        return bool(progress["completion_tokens"] > 1500 and progress["max_tokens"] == 8 * 1500)

    eventually(is_in_its_second, "the second answer")
    assert shared_stack.http.delete(f"/jobs/{job_id}").json()["state"] == "REVOKED"


async def test_answers_over_nats(shared_stack: Stack) -> None:
    """Frames name their answer and count on; the result has all of them."""
    connection = await nats.connect(shared_stack.nats.url)
    answers = await connection.subscribe(connection.new_inbox())
    body = {"messages": HI, "n": 3, "max_tokens": 40, "stream": True}
    await connection.publish("infer.chat", json.dumps(body).encode(), reply=answers.subject)
    messages = [await answers.next_msg(timeout=PATIENCE_S)]
    while messages[-1].data:
        messages.append(await answers.next_msg(timeout=PATIENCE_S))
    await connection.close()
    *frames, result = [json.loads(message.data) for message in messages[:-1]]
    texts, index = ["", "", ""], 0
    for frame in frames:
        assert frame["index"] == index
        index += len(frame["tokens"])
        texts[frame.get("choice", 0)] += "".join(frame["tokens"])
    assert texts == [result["text"], *(one["text"] for one in result["other_choices"])]
    assert len(result["other_choices"]) == 2


async def test_a_repeated_request_gets_all_answers_over_nats(shared_stack: Stack) -> None:
    """From the gateway, whose frames are those that the inferer sent."""
    connection = await nats.connect(shared_stack.nats.url)
    body = {"prompt": "again", "n": 2, "max_tokens": 40, "stream": True}
    seen = []
    for _ in range(2):
        answers = await connection.subscribe(connection.new_inbox())
        await connection.publish(
            "infer.complete",
            json.dumps(body).encode(),
            reply=answers.subject,
            headers={"Idempotency-Key": "choices"},
        )
        found = [await answers.next_msg(timeout=PATIENCE_S)]
        while found[-1].data:
            found.append(await answers.next_msg(timeout=PATIENCE_S))
        *frames, result = [json.loads(message.data) for message in found[:-1]]
        texts = ["", ""]
        for frame in frames:
            texts[frame.get("choice", 0)] += "".join(frame["tokens"])
        assert texts == [result["text"], result["other_choices"][0]["text"]]
        seen.append(texts)
    assert seen[0] == seen[1]
    await connection.close()


def test_a_stream_goes_on_at_another_gateway(shared_stack: Stack) -> None:
    """After whichever event it was cut off."""
    shared_stack.start_gateway()
    try:
        other = shared_stack.urls[-1]
        eventually(lambda: is_ready(other), "the other gateway is ready")
        job_id = shared_stack.submit(prompt="go", n=2, max_tokens=300, ignore_eos=True)
        events = events_of(shared_stack.url, job_id)
        choices = shared_stack.wait_for_end(job_id)["result"]["choices"]
        texts = [choice["text"] for choice in choices]
        assert texts_in(events, 2) == texts
        for position, event in enumerate(events[:-1]):
            rest = events_of(other, job_id, event["id"])
            assert texts_in(events[: position + 1] + rest, 2) == texts
            assert not any(one["event"] == "retrying" for one in rest)
    finally:
        shared_stack.end_gateway()


def is_ready(url: str) -> bool:
    with suppress(httpx2.TransportError):
        return httpx2.get(f"{url}/readyz").status_code == 200
    return False


def events_of(url: str, job_id: str, after: str = "") -> list[dict[str, str]]:
    headers = {"last-event-id": after} if after else {}
    with httpx2.stream(
        "GET", f"{url}/jobs/{job_id}/events", headers=headers, timeout=PATIENCE_S
    ) as response:
        return list(server_sent_events(response))


def texts_in(events: list[dict[str, str]], n: int) -> list[str]:
    """What a reader of these events is left with, of each answer."""
    texts = [""] * n
    for event in events:
        if event["event"] == "retrying":
            texts = [""] * n
        elif event["event"] == "tokens":
            data = json.loads(event["data"])
            texts[data.get("choice", 0)] += data["text"]
    return texts


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_an_inferer_that_ends_after_the_first_answer(
    tmp_path: Path, tiny_model: Path, end: str
) -> None:
    """The job runs again from its beginning and has one result; who follows it has the same. Only
    a crash counts as an attempt."""
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        first = stack.start_inferer(tiny_model, INFERER_GRACE_S="0")
        stack.wait_until_served("tiny")
        job_id = stack.submit(prompt="go", n=4, max_tokens=600, ignore_eos=True)
        with stack.http.stream("GET", f"/jobs/{job_id}/events") as response:
            events = server_sent_events(response)
            seen: list[dict[str, str]] = []
            while not texts_in(seen, 4)[1]:
                seen.append(next(events))
            stack.inferers.remove(first)
            getattr(first, end)()
            stack.start_inferer(tiny_model, INFERER_ID="another")
            seen += events
        ended = stack.wait_for_end(job_id)
        assert (ended["state"], ended["inferer"]) == ("SUCCESS", "another")
        assert ended["attempts"] == (2 if end == "kill" else 1)
        result = ended["result"]
        assert result["usage"]["completion_tokens"] == 4 * 600
        assert texts_in(seen, 4) == [choice["text"] for choice in result["choices"]]
        assert [event["event"] for event in seen].count("result") == 1
