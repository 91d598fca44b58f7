"""Output items and events of responses follow from the text alone."""

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest
from msgspec import Raw

from services.gateway.http.openai.responses.body import ResponseBody
from services.gateway.http.openai.responses.output import DELTA_CHARS, Output, output_of
from services.gateway.http.openai.responses.stream import NumberedEvent, ResponseEvents, last_number
from services.gateway.jobs.events import JobEvent, Tokens
from shared.answers.marks import HERMES, THINK
from shared.timestamps import timestamp
from shared.wire.answers import PLAIN, AnswerFormat
from shared.wire.api import JobStatus
from shared.wire.codecs import encode
from shared.wire.events import StateEvent
from shared.wire.logprobs import TokenLogprob
from shared.wire.responses import ResponseForm
from shared.wire.results import Cancelled, Completed, Result, Usage

JOB = "01890000-0000-7000-8000-000000000000"
NOW = "2026-01-01T00:00:00.000000Z"
CALLS = AnswerFormat(THINK, HERMES)
TEXTS = {
    "plain": (PLAIN, "One, two, three; é and the rest of it.  "),
    "empty": (PLAIN, ""),
    "short": (PLAIN, "a"),
    "reasoning": (CALLS, "<think>\nWell, what do I know?\n</think>\n\nNothing at all."),
    "a call": (CALLS, 'Wait. <tool_call>{"name": "f", "arguments": {"a": "é"}}</tool_call>'),
    "all": (
        CALLS,
        "<think>Two of them.</think>Now: "
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": {"b": [1, 2]}}</tool_call>',
    ),
}


def completed(format: AnswerFormat, text: str, **fields: Any) -> Completed:
    options: dict[str, Any] = {"finish_reason": "stop", "attempt": 1} | fields
    return Completed(
        id=JOB,
        model="tiny",
        queued_at=NOW,
        started_at=NOW,
        finished_at=NOW,
        text=text,
        format=format,
        usage=Usage(1, 2, 3),
        task="chat",
        **options,
    )


def response() -> ResponseBody:
    return ResponseBody.queued(
        job_id=JOB,
        model="tiny",
        queued_at=NOW,
        metadata=encoded_metadata(),
        form=ResponseForm(),
        request=None,
    )


def encoded_metadata() -> Raw:
    return Raw(b'{"a":"b"}')


def events_of(
    format: AnswerFormat, job_events: Iterable[JobEvent], after: int = -1
) -> list[dict[str, Any]]:
    events = ResponseEvents(response(), JOB, lambda: format, after)
    found = list(events.opening())
    for event in job_events:
        found += events.of(event)
    return plain(found)


def plain(events: Iterable[NumberedEvent]) -> list[dict[str, Any]]:
    return [json.loads(encode(event.body)) for event in events]


def pieces(text: str, seed: int) -> list[str]:
    source, found = random.Random(seed), []
    while text:
        cut = source.randint(1, 6)
        found.append(text[:cut])
        text = text[cut:]
    return found


def started() -> JobEvent:
    return JobEvent("1", "started", StateEvent(state="started", attempt=1, at=NOW, inferer="x"))


def tokens(texts: Iterable[str]) -> list[JobEvent]:
    return [JobEvent("1", "tokens", Tokens(1, 0, text)) for text in texts]


def end(result: Result) -> JobEvent:
    return JobEvent("end", "result", JobStatus.of(result))


@pytest.mark.parametrize("name", TEXTS)
def test_events_do_not_depend_on_the_pieces_of_the_text(name: str) -> None:
    """However the text comes, with the result alone too, and after whichever event it goes on."""
    format, text = TEXTS[name]
    result = completed(format, text)
    whole = ResponseEvents(response(), JOB, lambda: format, after=-1)
    expected = plain([*whole.opening(), *whole.of_result(result)])
    numbers = [event["sequence_number"] for event in expected]
    assert numbers == list(range(len(expected)))
    assert last_number(response(), JOB, result) == numbers[-1]
    for seed in range(5):
        job = [started(), *tokens(pieces(text, seed)), end(result)]
        assert events_of(format, job) == expected
        for after in numbers:
            assert events_of(format, job, after) == expected[after + 1 :]
    assert events_of(format, [*tokens([text]), end(result)]) == expected


@pytest.mark.parametrize("name", TEXTS)
def test_the_events_add_up_to_the_output(name: str) -> None:
    """What is added and what is done agree with the items of the whole response."""
    format, text = TEXTS[name]
    result = completed(format, text)
    events = events_of(format, [*tokens(pieces(text, 1)), end(result)])
    output = json.loads(encode(output_of(result)))
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"] == output
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["item"] for event in done] == output
    assert [event["output_index"] for event in done] == list(range(len(output)))
    for index, item in enumerate(output):
        deltas = [
            event["delta"]
            for event in events
            if event["type"].endswith(".delta") and event["output_index"] == index
        ]
        assert all(event["item_id"] == item["id"] for event in of_item(events, index))
        if item["type"] == "function_call":
            assert "".join(deltas) == item["arguments"]
        else:
            assert "".join(deltas) == item["content"][0]["text"]
            assert all(len(delta) == DELTA_CHARS for delta in deltas[:-1])
    assert len({item["id"] for item in output}) == len(output)


def of_item(events: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    return [event for event in events if event.get("output_index") == index and "item_id" in event]


def test_the_parts_of_an_answer_are_items() -> None:
    """Reasoning, a message and calls, in their order; the calls as on the chat route."""
    result = completed(*TEXTS["all"])
    reasoning, message, first, second = output_of(result)
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Two of them."}]
    assert reasoning["summary"] == []
    assert message["content"][0]["text"] == "Now:"
    status = JobStatus.of(result)
    assert status.result is not None
    assert status.result.message
    calls = status.result.message.tool_calls or []
    assert [(call["call_id"], call["name"], call["arguments"]) for call in (first, second)] == [
        (call.id, call.function.name, call.function.arguments) for call in calls
    ]


def test_an_answer_that_was_cut_off_is_incomplete() -> None:
    """The response, and its last item."""
    result = completed(PLAIN, "One, two", finish_reason="length")
    (*_, last) = events_of(PLAIN, [*tokens(["One, two"]), end(result)])
    assert last["type"] == "response.incomplete"
    assert last["response"]["status"] == "incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_a_response_that_never_ran_has_no_event_in_progress() -> None:
    """Its last event has the number that it always has."""
    result = Cancelled(
        id=JOB,
        model="tiny",
        attempt=0,
        queued_at=NOW,
        finished_at=NOW,
        code="cancelled",
        message="x",
    )
    events = events_of(PLAIN, [end(result)])
    assert [(event["type"], event["sequence_number"]) for event in events] == [
        ("response.created", 0),
        ("response.queued", 1),
        ("response.failed", 3),
    ]
    assert events[-1]["response"]["status"] == "cancelled"


@pytest.mark.parametrize("after", [2, 3, 17])
def test_the_end_of_a_job_that_did_not_complete_is_always_sent(after: int) -> None:
    """Also where the events of what it wrote are gone, and a client has more of them."""
    result = Cancelled(
        id=JOB,
        model="tiny",
        attempt=1,
        queued_at=NOW,
        started_at=NOW,
        finished_at=NOW,
        code="cancelled",
        message="x",
    )
    (event,) = events_of(PLAIN, [end(result)], after)
    assert (event["type"], event["sequence_number"]) == ("response.failed", after + 1)


def test_an_attempt_that_came_out_differently_ends_the_stream() -> None:
    """With an error whose number is that of the last event, so that nothing is skipped later."""
    restarted = JobEvent("1", "retrying", Tokens(2, 0, ""))
    events = ResponseEvents(response(), JOB, lambda: PLAIN, after=-1)
    sent = [*events.opening(), *events.of(started())]
    for event in tokens(["a text that differs"]):
        sent += events.of(event)
    (error,) = events.of(restarted)
    assert error.type == "error"
    assert error.body["code"] == "attempt_differs"
    assert error.body["sequence_number"] == sent[-1].body["sequence_number"]
    assert events.is_finished


def test_a_new_client_gets_the_text_of_the_attempt_that_runs() -> None:
    """What an earlier one wrote is shown once it is known to be the same."""
    result = completed(PLAIN, "One and two", attempt=2)
    running = JobStatus.of(result)
    queued = JobEvent("0", "queued", running)
    restarted = JobEvent("1", "retrying", Tokens(2, 0, ""))
    again = [JobEvent("1", "tokens", Tokens(2, 0, "One and two")), end(result)]
    expected = events_of(PLAIN, again)
    other = tokens(["One, two, three, four"])
    assert events_of(PLAIN, [queued, *other, restarted, *again]) == expected
    rest = JobEvent("1", "tokens", Tokens(2, 1, " and two"))
    assert events_of(PLAIN, [queued, *tokens(["One"]), rest, end(result)]) == expected


def test_a_number_beyond_the_end_is_reported_when_the_response_ends() -> None:
    """While it runs, another gateway may have read further."""
    result = completed(PLAIN, "a")
    (event,) = events_of(PLAIN, [*tokens(["a"]), end(result)], after=50)
    assert (event["type"], event["param"]) == ("error", "starting_after")
    assert "50" in event["message"]


@pytest.mark.parametrize("format", [PLAIN, CALLS])
def test_log_probabilities_go_with_their_tokens(format: AnswerFormat) -> None:
    """Those of the message, each once, at its place; also where a character is several tokens."""
    marks = "<think>Hm</think>" if format is CALLS else ""
    words = [*pieces(marks, 3), *pieces("One, two, three", 2)]
    parts = [word.encode() for word in words] + [b"\xe2\x82", b"\xac", b" end"]
    logprobs = [TokenLogprob.of(part, -0.5) for part in parts]
    text = b"".join(parts).decode()
    result = completed(format, text, logprobs=logprobs)
    (*_, message) = output_of(result)
    (part,) = message["content"]
    shown = b"".join(bytes(one["bytes"]) for one in part["logprobs"])
    assert shown.decode().endswith(part["text"])
    streamed = [
        JobEvent("1", "tokens", Tokens(1, 0, word, (one,)))
        for word, one in zip(words, logprobs, strict=False)
    ]
    left = tuple(logprobs[len(words) :])
    streamed += [JobEvent("1", "tokens", Tokens(1, 0, "€ end", left)), end(result)]
    whole = ResponseEvents(response(), JOB, lambda: format, after=-1)
    expected = plain([*whole.opening(), *whole.of_result(result)])
    assert events_of(format, streamed) == expected


def test_nothing_is_lost_of_a_text_that_only_looks_like_a_call() -> None:
    read = Output(JOB, CALLS)
    assert [*read.add("<tool_call>{"), *read.finish(is_whole=True)]
    assert read.items[0]["content"][0]["text"] == "<tool_call>{"


def test_times_are_those_of_the_job() -> None:
    now = timestamp()
    body = ResponseBody.queued(
        job_id=JOB,
        model="tiny",
        queued_at=now,
        metadata=encoded_metadata(),
        form=ResponseForm(previous=JOB),
        request=None,
    )
    assert body.previous_response_id == f"resp_{JOB}"
    assert body.ended(completed(PLAIN, "x")).completed_at == 1767225600
