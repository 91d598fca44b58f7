"""Parameters under ``/v1``: none is ignored. Which are known is compared with the official client
in `tests/unit/test_openai_parameters.py`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from services.gateway.http.openai.parameters import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RERANK,
    RESPONSES,
    OtherParameters,
    Refused,
    WithoutEffect,
)
from tests.support.processes import Stack, eventually, server_sent_events
from tests.support.schemas import TOO_MUCH

HI: Any = [{"role": "user", "content": "hi"}]
GREEDY: Any = {"model": "tiny", "max_tokens": 5, "temperature": 0}
CHATTING = {**GREEDY, "messages": HI}
ROUTES: dict[str, tuple[OtherParameters, dict[str, Any]]] = {
    "chat/completions": (CHAT, CHATTING),
    "completions": (COMPLETIONS, {**GREEDY, "prompt": "once upon"}),
    "embeddings": (EMBEDDINGS, {"input": "hi"}),
    "rerank": (RERANK, {"query": "a", "documents": ["b"]}),
    "responses": (RESPONSES, {"model": "tiny", "input": "hi"}),
}
SCHEMA_OF_A_RESPONSE = {"type": "json_schema", "name": "a", "schema": TOO_MUCH}
GBNF = r"""
root ::= "yes" | "no, " number  # a comment
number ::= [0-9]{2} "!"
"""


@pytest.fixture(scope="module")
def client(shared_stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared_stack.url}/v1", api_key="none") as opened:
        yield opened


@pytest.mark.parametrize("route", ROUTES)
def test_what_cannot_be_honoured_is_refused_by_name(shared_stack: Stack, route: str) -> None:
    """400 in OpenAI's form with `param`, on each route, before anything is accepted."""
    others, body = ROUTES[route]
    known = shared_stack.gateways[0].events("request_accepted")
    for name, other in others.items():
        if not isinstance(other, Refused):
            continue
        answer = shared_stack.http.post(f"/v1/{route}", json={**body, name: {"x": "something"}})
        assert answer.status_code == 400, (name, answer.text)
        error = answer.json()["error"]
        assert (error["param"], error["type"]) == (name, "invalid_request_error")
        assert other.why in error["message"]
    for name in ("modle", "zzz"):
        answer = shared_stack.http.post(f"/v1/{route}", json={**body, name: 1})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert shared_stack.gateways[0].events("request_accepted") == known


LONG = "x " * 5000
"""More tokens than the context has; only the inferer finds out."""
TOO_MUCH_WORK = {"type": "json_schema", "json_schema": {"schema": TOO_MUCH}}


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("completions", {"prompt": ["a"] * 65}, "prompt"),
        ("completions", {"prompt": ["a"] * 2049}, "prompt"),
        ("completions", {"prompt": ["a", 5]}, "prompt"),
        ("completions", {"prompt": ["a", ""]}, "prompt[1]"),
        ("completions", {"prompt": ["a", "word " * 400_000]}, "prompt[1]"),
        ("completions", {"prompt": LONG}, "prompt"),
        ("completions", {"prompt": ["a", LONG]}, "prompt[1]"),
        ("completions", {"prompt": [99_999_999]}, "prompt"),
        ("completions", {"prompt": "a", "best_of": 2}, "best_of"),
        ("completions", {"prompt": "a", "response_format": TOO_MUCH_WORK}, "response_format"),
        ("completions", {"prompt": "a", "guided_json": TOO_MUCH}, "guided_json"),
        ("completions", {"prompt": ["a", "b"], "guided_json": TOO_MUCH}, "guided_json"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("chat/completions", {"messages": HI, "guided_json": TOO_MUCH}, "guided_json"),
        ("chat/completions", {"messages": HI, "tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"messages": HI, "metadata": 5}, "metadata"),
        ("chat/completions", {"messages": HI, "n": 9}, "n"),
        ("chat/completions", {"messages": HI, "adapter": "none"}, "adapter"),
        ("embeddings", {"input": ["a"] * 2049}, "input"),
        ("embeddings", {"input": ["a", 5]}, "input"),
        ("embeddings", {"input": "a"}, "model"),
        ("rerank", {"query": "a", "documents": [{"text": "b", "x": 1}]}, "documents[0].x"),
        ("rerank", {"query": "a", "documents": ["b"]}, "model"),
        ("responses", {"input": []}, "input"),
        ("responses", {"input": LONG}, "input"),
        ("responses", {"input": "a", "text": {"format": SCHEMA_OF_A_RESPONSE}}, "text.format"),
        ("responses", {"input": "a", "guided_json": TOO_MUCH}, "guided_json"),
        ("responses", {"input": "a", "guided_regex": "("}, "guided_regex"),
        ("responses", {"input": "a", "tool_choice": "required"}, "tool_choice"),
        ("responses", {"input": "a", "previous_response_id": 5}, "previous_response_id"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_400_about_one_parameter_names_it(
    shared_stack: Stack, route: str, body: dict[str, Any], param: str
) -> None:
    """Whether the gateway or the inferer finds it. A stream that has begun ends with the error."""
    sent = {"model": "tiny", **body}
    answer = shared_stack.http.post(f"/v1/{route}", json=sent)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
    if route in ("completions", "chat/completions"):
        answer = shared_stack.http.post(f"/v1/{route}", json={**sent, "stream": True})
        (error,) = re.findall(r'{"error":.*', answer.text)
        assert json.loads(error)["error"]["param"] == param


def test_the_status_of_a_job_names_the_parameter(shared_stack: Stack) -> None:
    """Under the name that a job has for it."""
    job_id = shared_stack.submit(prompt=LONG)
    error = shared_stack.wait_for_end(job_id)["error"]
    assert (error["code"], error["param"]) == ("prompt_too_long", "prompt")
    body = {"model": "tiny", "input": LONG, "background": True}
    response = shared_stack.http.post("/v1/responses", json=body).json()
    shared_stack.wait_for_end(response["id"].removeprefix("resp_"))
    failed = shared_stack.http.get(f"/v1/responses/{response['id']}").json()
    assert failed["error"].keys() == {"code", "message"}


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_what_has_no_effect_changes_nothing(shared_stack: Stack, route: str) -> None:
    """The same answer with each such parameter, and with each refused one that asks for nothing."""
    others, body = ROUTES[route]
    expected = _choices(shared_stack, route, body)
    for name, other in others.items():
        values = ["x", {"x": 1}] if isinstance(other, WithoutEffect) else [None, *other.nothing]
        for value in values[-2:]:
            assert _choices(shared_stack, route, {**body, name: value}) == expected, name


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_official_client_is_told(client: openai.OpenAI, stream: bool) -> None:
    """A BadRequestError with `param`, also before a stream; `did you mean` for a typing error."""
    for options, param, hint in (
        ({"extra_body": {"max_token": 5}}, "max_token", "did you mean max_tokens?"),
        ({"audio": {"voice": "a", "format": "mp3"}}, "audio", "text"),
        ({"verbosity": "low"}, "verbosity", "message"),
        ({"service_tier": "priority"}, "service_tier", "use `priority`"),
        ({"store": True}, "store", "GET /jobs"),
        ({"stream_options": {"include_usge": True}}, "stream_options.include_usge", "did you mean"),
        ({"response_format": {"type": "text", "typ": 1}}, "response_format.typ", "did you mean"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "chat template"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex", "cannot be enforced"),
        ({"extra_body": {"grammar": "root = x"}}, "grammar", "not a grammar in GBNF"),
        ({"extra_body": {"guided_json": {"type": "x"}}}, "guided_json", "guided_json"),
    ):
        wanted: Any = {"model": "tiny", "messages": HI, "stream": stream, **options}
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**wanted)
        assert raised.value.param == param
        assert hint in raised.value.message


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"repetition_penalty": 1.8}, {"repeat_penalty": 1.8}),
        ({"n_predict": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 3}, {"max_tokens": 3}),
        ({"json_schema": {"type": "boolean"}}, {"guided_json": '{"type": "boolean"}'}),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "boolean"}}},
            {"structured_outputs": {"json": {"type": "boolean"}}},
        ),
        ({"grammar": GBNF}, {"response_format": {"type": "grammar", "grammar": GBNF}}),
        ({"guided_regex": "a+b"}, {"response_format": {"type": "regex", "pattern": "a+b"}}),
        ({"top_k": -1, "temperature": 1, "seed": 5}, {"top_k": 0, "temperature": 1, "seed": 5}),
    ],
    ids=str,
)
def test_a_foreign_word_does_what_ours_does(
    shared_stack: Stack, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    """And not what happens without it."""
    base = {"model": "tiny", "messages": HI, "temperature": 0}
    long = {**base, "max_tokens": 40}
    base = base if "n_predict" in theirs or "max_completion_tokens" in theirs else long
    found = _choices(shared_stack, "chat/completions", {**base, **theirs})
    assert found == _choices(shared_stack, "chat/completions", {**base, **ours})
    assert found != _choices(shared_stack, "chat/completions", long)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"grammar": GBNF}, r"yes|no, \d\d!"),
        ({"guided_grammar": GBNF}, r"yes|no, \d\d!"),
        ({"structured_outputs": {"grammar": GBNF}}, r"yes|no, \d\d!"),
        ({"grammar": 'root ::= "}" | "/" | "{\\"\\n"'}, r'[}/]|\{"\n'),
        ({"guided_regex": r"(north|south)/[0-9]{2}\n"}, r"(north|south)/[0-9]{2}\n"),
        ({"structured_outputs": {"regex": "é{3}"}}, "é{3}"),
        ({"guided_choice": ["a b", "(c)|", "ü/\n"]}, re.escape("a b") + r"|\(c\)\||ü/\n"),
        ({"structured_outputs": {"choice": ["north", "south"]}}, "north|south"),
        ({"response_format": {"type": "regex", "pattern": "[ab]{4}"}}, "[ab]{4}"),
    ],
    ids=str,
)
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_an_answer_is_of_its_grammar(
    shared_stack: Stack, route: str, options: dict[str, Any], pattern: str
) -> None:
    """Whatever the seed."""
    _, body = ROUTES[route]
    for seed in range(3):
        asked = {**body, "max_tokens": 60, "temperature": 2, "seed": seed, **options}
        (choice,) = _choices(shared_stack, route, asked)
        text = choice.get("text") or choice["message"]["content"]
        assert re.fullmatch(pattern, text), text
        assert choice["finish_reason"] == "stop"


def test_a_grammar_beside_tools(shared_stack: Stack) -> None:
    """The answer is of the grammar, or it is a call."""
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": nothing}}
    asked = {**CHATTING, "max_tokens": 200, "guided_choice": ["north"], "tools": [tool]}
    for choice in ("auto", "none", "required"):
        (found,) = _choices(shared_stack, "chat/completions", {**asked, "tool_choice": choice})
        message = found["message"]
        assert message["content"] == "north" or message.get("tool_calls"), message


def test_a_seed_of_minus_one_is_random(shared_stack: Stack) -> None:
    wild = {"model": "tiny", "prompt": "hi", "seed": -1, "temperature": 2, "top_k": 0, "min_p": 0}
    texts = {
        _choices(shared_stack, "completions", {**wild, "top_p": 1, "max_tokens": 30})[0]["text"]
        for _ in range(3)
    }
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("given", "priority"), [(-7, "high"), (0, "normal"), (3, "low"), ("high", "high")]
)
def test_a_number_is_a_priority(shared_stack: Stack, given: int | str, priority: str) -> None:
    answer = shared_stack.http.post("/v1/chat/completions", json={**CHATTING, "priority": given})
    status = shared_stack.status(answer.json()["id"].removeprefix("chatcmpl-"))
    assert status["priority"] == priority


@pytest.fixture(scope="module")
def small_stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """With little context and a short queue."""
    with Stack(tmp_path_factory.mktemp("small")) as stack:
        stack.start_gateway(GATEWAY_MAX_WAITING="3")
        stack.start_inferer(tiny_model, INFERER_N_CTX="256")
        stack.wait_until_served("tiny")
        yield stack


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_more_tokens_than_the_context_has_are_clamped(small_stack: Stack, name: str) -> None:
    """The answer ends when the context is full."""
    body = {"messages": HI, name: 100_000, "ignore_eos": True}
    answer = small_stack.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert 256 <= answer["usage"]["total_tokens"] <= 257


def test_several_prompts_are_several_choices(client: openai.OpenAI) -> None:
    """In the order of OpenAI: the answers to the first prompt, then those to the second. Each is
    what the prompt alone gets, and the usage is that of all."""
    options: Any = {"model": "tiny", "max_tokens": 6, "seed": 3, "n": 2, "echo": True}
    prompts = ["once upon", "the rain", "once upon"]
    alone = [client.completions.create(prompt=one, **options) for one in prompts]
    together = client.completions.create(prompt=prompts, **options)
    assert [choice.index for choice in together.choices] == list(range(6))
    expected = [choice.text for answer in alone for choice in answer.choices]
    assert [choice.text for choice in together.choices] == expected
    assert expected[2].startswith("the rain")
    assert together.usage is not None
    assert together.usage.total_tokens == sum(one.usage.total_tokens for one in alone if one.usage)


def test_several_prompts_are_streamed_together(client: openai.OpenAI) -> None:
    """The same texts; one id; one chunk with the usage of all at the end."""
    options: Any = {"model": "tiny", "prompt": ["once", "the rain"], "max_tokens": 30, "n": 2}
    options |= {"seed": 3, "echo": True}
    whole = client.completions.create(**options)
    *chunks, last = client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons = [""] * 4, [""] * 4
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length"] * 4
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("key", [None, "a key"])
def test_if_one_prompt_fails_the_others_are_cancelled(
    shared_stack: Stack, stream: bool, key: str | None
) -> None:
    """Nobody will see their answers. With a key the client can come back, and they go on. A stream
    may have begun with the text of another one."""
    mark = f"{key} {stream}"
    body: dict[str, Any] = {"prompt": [LONG, "once", "twice"], "ignore_eos": True, "stream": stream}
    body |= {"max_tokens": 20 if key else 4000}
    body["metadata"] = {"mark": mark}
    headers = {"idempotency-key": mark} if key else {}
    answer = shared_stack.http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 400 or (stream and answer.status_code == 200)
    (error,) = re.findall(r'{"error":.*', answer.text)
    assert json.loads(error)["error"]["message"].startswith("prompt[0]: ")

    def accepted() -> list[Any] | None:
        page = shared_stack.http.get("/jobs", params={"metadata.mark": mark}).json()
        return page["jobs"] if page["total"] == 3 else None

    jobs = eventually(accepted, "all are listed")
    ended = [shared_stack.wait_for_end(job["id"]) for job in jobs]
    codes = sorted(job["error"]["code"] if job["error"] else job["state"] for job in ended)
    others = "SUCCESS" if key else "cancelled"
    assert codes == sorted([others, others, "prompt_too_long"])


def test_tokens_are_a_prompt(client: openai.OpenAI) -> None:
    """Taken as they are: that the answer begins with token 70 and is continued from there."""
    options: Any = {"model": "tiny", "max_tokens": 5, "temperature": 0, "logprobs": 0}
    one = client.completions.create(prompt=[70, 71, 72], **options)
    assert one.usage is not None
    assert one.usage.prompt_tokens == 3
    two = client.completions.create(prompt=[[70, 71, 72], [5]], **options)
    assert two.choices[0].text == one.choices[0].text
    assert two.usage is not None
    assert two.usage.prompt_tokens == 4
    for wrong, param in (
        ([10**9], "prompt"),
        ([[5], [10**9]], "prompt[1]"),
        ([5] * 5000, "prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(**{**options, "prompt": wrong})
        assert raised.value.param == param


def test_tokens_are_a_prompt_elsewhere(shared_stack: Stack) -> None:
    """As `prompt_tokens` of a job; not beside a `prompt`."""
    job_id = shared_stack.submit(prompt_tokens=[70, 71], max_tokens=2)
    assert shared_stack.wait_for_end(job_id)["result"]["usage"]["prompt_tokens"] == 2
    wrong: list[Any] = [{"prompt_tokens": [1], "prompt": "x"}, {"prompt_tokens": []}]
    for body in wrong:
        assert shared_stack.http.post("/jobs", json=body).status_code == 400


def test_one_bad_prompt_refuses_all(shared_stack: Stack) -> None:
    """It is named, and nothing was accepted."""
    known = shared_stack.gateways[0].events("request_accepted")
    prompts = ["a", "word " * 400_000, "c"]
    answer = shared_stack.http.post("/v1/completions", json={"prompt": prompts})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt[1]"
    assert shared_stack.gateways[0].events("request_accepted") == known


def test_one_that_fails_later_is_named(shared_stack: Stack) -> None:
    """What only the inferer can know, whole and streamed."""
    body = {"prompt": ["a", "b " * 10_000], "max_tokens": 2}
    for stream in (False, True):
        answer = shared_stack.http.post("/v1/completions", json={**body, "stream": stream})
        assert "prompt[1]: the prompt has" in answer.text


def test_a_full_queue_refuses_all(small_stack: Stack) -> None:
    """429, the prompt that found no place is named, and those before it are cancelled. With a key
    they wait for the request to come again."""
    small_stack.http.put("/concurrency", json={"concurrency": 0}).raise_for_status()
    body = {"prompt": list("abcdef"), "max_tokens": 2}
    before = len(small_stack.gateways[0].events("request_accepted"))
    answer = small_stack.http.post("/v1/completions", json=body)
    assert answer.status_code == 429, answer.text
    assert answer.headers["retry-after"]
    refused = re.match(r"prompt\[(\d)\]: the queue", answer.json()["error"]["message"])
    assert refused is not None
    places = int(refused[1])
    assert places in (3, 4), "the broker may count one job late"

    def accepted() -> list[dict[str, Any]] | None:
        events = small_stack.gateways[0].events("request_accepted")[before:]
        return events if len(events) == places else None

    for job in eventually(accepted, "each is in the log"):
        small_stack.wait_for_state(job["job_id"], "REVOKED")

    headers = {"Idempotency-Key": "full"}
    answer = small_stack.http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 429, answer.text
    small_stack.http.put("/concurrency", json={"concurrency": 1}).raise_for_status()

    def sent_again() -> httpx2.Response | None:
        answer = small_stack.http.post("/v1/completions", json=body, headers=headers)
        return answer if answer.status_code == 200 else None

    again = eventually(sent_again, "all have found a place")
    assert [choice["index"] for choice in again.json()["choices"]] == list(range(6))


def test_a_key_gives_the_same_jobs(shared_stack: Stack) -> None:
    """Several prompts sent again with their key are the same jobs; others are refused."""

    def ask(prompts: Any) -> httpx2.Response:
        return shared_stack.http.post(
            "/v1/completions",
            json={"prompt": prompts, "max_tokens": 4},
            headers={"Idempotency-Key": "several prompts"},
        )

    first, known = ask(["a", "b"]), shared_stack.gateways[0].events("request_accepted")
    assert first.status_code == 200, first.text
    assert ask(["a", "b"]).json() == first.json()
    for prompts in (["a", "c"], ["a"], "a", ["a", "b", "c"], ["b", "a"]):
        refused = ask(prompts)
        assert refused.status_code == 422
        assert refused.json()["error"]["message"].startswith("Idempotency-Key: ")
    assert shared_stack.gateways[0].events("request_accepted") == known


def test_a_stream_of_several_ends_once(shared_stack: Stack) -> None:
    """`[DONE]` comes when all have ended."""
    body = {"prompt": ["a", "b"], "max_tokens": 3, "stream": True}
    with shared_stack.http.stream("POST", "/v1/completions", json=body) as answer:
        data = [event["data"] for event in server_sent_events(answer)]
    assert data[-1] == "[DONE]"
    assert data.count("[DONE]") == 1
    reasons = [json.loads(one)["choices"][0]["finish_reason"] for one in data[:-1]]
    assert reasons.count("length") == 2


def test_a_response_understands_the_words_of_other_servers(client: openai.OpenAI) -> None:
    """As a chat does."""
    words = {"guided_choice": ["yes", "no"], "top_k": -1, "n_predict": 50, "priority": -1}
    response = client.responses.create(model="tiny", input="hi", extra_body=words)
    assert response.output_text in ("yes", "no")
    assert response.max_output_tokens == 50


def _choices(stack: Stack, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = stack.http.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices
