"""Payloads of wire version 2, as they are, or once were, sent: they must stay readable."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import UNSET, Raw

from shared.wire.api import JobStatus
from shared.wire.codecs import (
    Unreadable,
    decode_cancel_notice,
    decode_dead_letter,
    decode_idempotency_entry,
    decode_inferer_entry,
    decode_model_facts,
    decode_orphan_entry,
    decode_request,
    decode_result,
    decode_state_event,
    decode_token_frame,
    encode,
)
from shared.wire.events import StateEvent, TokenFrame
from shared.wire.inferers import InfererEntry, ModelFacts
from shared.wire.inputs import Document
from shared.wire.requests import (
    ChatMessage,
    IdempotencyEntry,
    InferenceRequest,
    JsonObject,
    JsonSchema,
    NamedSchema,
    OrphanEntry,
    PlainText,
    SamplingDefaults,
    TextPart,
)
from shared.wire.responses import ResponseForm
from shared.wire.results import (
    Cancelled,
    Completed,
    DeadLetter,
    Expired,
    Failed,
    RankedDocument,
    Timings,
    Usage,
)

ID = "01968a3e-5c00-7abc-8def-0123456789ab"
T0, T1, T2 = (f"2026-01-31T12:00:0{second}.000000Z" for second in (0, 1, 2))
COMMON: dict[str, Any] = {"id": ID, "model": "m", "attempt": 1, "queued_at": T0, "finished_at": T2}

PAYLOADS: list[tuple[Callable[[bytes], Any], bytes, Any]] = [
    (
        decode_request,
        b'{"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"hi"}],'
        b'"task":"chat","response":{"has_instructions":true,"history":1,"previous":"%b",'
        b'"background":true,"effort":"low","user":"u77"}}' % ID.encode(),
        InferenceRequest(
            task="chat",
            messages=[ChatMessage("system", "Be brief."), ChatMessage("user", "hi")],
            response=ResponseForm(
                has_instructions=True,
                history=1,
                previous=ID,
                background=True,
                effort="low",
                user="u77",
            ),
        ),
    ),
    (
        decode_result,
        b'{"outcome":"cancelled","id":"%b","model":"m","attempt":1,"queued_at":"%b",'
        b'"finished_at":"%b","response":{"store":false},"code":"cancelled","message":"cancelled '
        b'on request"}' % (ID.encode(), T0.encode(), T2.encode()),
        Cancelled(
            **COMMON,
            response=ResponseForm(store=False),
            code="cancelled",
            message="cancelled on request",
        ),
    ),
    (
        decode_request,
        b'{"task":"complete","prompt":"once","max_tokens":5,"seed":7,"stop":"END","queued_at":"%b"}'
        % T0.encode(),
        InferenceRequest(
            task="complete", prompt="once", max_tokens=5, seed=7, stop="END", queued_at=T0
        ),
    ),
    (
        decode_request,
        b'{"task":"chat","messages":[{"role":"system","content":"be brief"},{"role":"user",'
        b'"content":'
        b'[{"type":"text","text":"hi"}],"name":"ann"}],"temperature":0,"top_p":1,"top_k":0,'
        b'"min_p":0,"stop":["a","b"],"repeat_penalty":1.1,"presence_penalty":-2,'
        b'"frequency_penalty":2,"response_format":{"type":"json_schema","json_schema":'
        b'{"name":"x","schema":{"type":"object"},"strict":true}},"stream":true,"via":"nats",'
        b'"metadata":{"k":[1]},"retry_of":"old"}',
        InferenceRequest(
            task="chat",
            messages=[
                ChatMessage("system", "be brief"),
                ChatMessage("user", [TextPart("text", "hi")], name="ann"),
            ],
            temperature=0,
            top_p=1,
            top_k=0,
            min_p=0,
            stop=["a", "b"],
            repeat_penalty=1.1,
            presence_penalty=-2,
            frequency_penalty=2,
            response_format=JsonSchema(
                NamedSchema(Raw(b'{"type":"object"}'), name="x", strict=True)
            ),
            stream=True,
            via="nats",
            metadata=Raw(b'{"k":[1]}'),
            retry_of="old",
        ),
    ),
    (
        decode_request,
        b'{"task":"complete","prompt":"x","response_format":{"type":"json_object"}}',
        InferenceRequest(task="complete", prompt="x", response_format=JsonObject()),
    ),
    (
        decode_request,
        b'{"task":"complete","prompt":"x","response_format":{"type":"json_object","schema":{}}}',
        InferenceRequest(
            task="complete", prompt="x", response_format=JsonSchema(NamedSchema(Raw(b"{}")))
        ),
    ),
    (
        decode_request,
        b'{"task":"complete","prompt":"x","response_format":{"type":"text"},"a_later_field":1}',
        InferenceRequest(task="complete", prompt="x", response_format=PlainText()),
    ),
    (
        decode_result,
        b'{"outcome":"completed","id":"%b","model":"m","attempt":1,"queued_at":"%b",'
        b'"finished_at":"%b","started_at":"%b","inferer":"i","timings":{"queued_ms":1000.0,'
        b'"load_ms":0.0,"prompt_ms":2.5,"first_token_ms":2.5,"generation_ms":9.0,'
        b'"tokens_per_s":3.5},"owner":"ann","metadata":{"k":1},"text":"hi","finish_reason":"stop",'
        b'"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3},"task":"chat"}'
        % (ID.encode(), T0.encode(), T2.encode(), T1.encode()),
        Completed(
            **COMMON,
            started_at=T1,
            inferer="i",
            timings=Timings(
                queued_ms=1000,
                prompt_ms=2.5,
                first_token_ms=2.5,
                generation_ms=9,
                tokens_per_s=3.5,
            ),
            owner="ann",
            metadata=Raw(b'{"k":1}'),
            text="hi",
            finish_reason="stop",
            usage=Usage(1, 2, 3),
            task="chat",
        ),
    ),
    (
        decode_request,
        b'{"task":"embed","input":["a",[1,2]],"via":"openai"}',
        InferenceRequest(task="embed", input=["a", [1, 2]], via="openai"),
    ),
    (
        decode_request,
        b'{"task":"rerank","query":"q","documents":["a","b"],"top_n":1,"return_documents":true}',
        InferenceRequest(
            task="rerank", query="q", documents=["a", "b"], top_n=1, return_documents=True
        ),
    ),
    (
        decode_result,
        b'{"outcome":"completed","id":"%b","model":"m","attempt":1,"queued_at":"%b",'
        b'"finished_at":"%b","text":"","finish_reason":"stop","usage":{"prompt_tokens":1,'
        b'"completion_tokens":0,"total_tokens":1},"task":"embed","embeddings":["AACAPwAAAAA="]}'
        % (ID.encode(), T0.encode(), T2.encode()),
        Completed(
            **COMMON,
            text="",
            finish_reason="stop",
            usage=Usage(1, 0, 1),
            task="embed",
            embeddings=[b"\0\0\x80\x3f\0\0\0\0"],
        ),
    ),
    (
        decode_result,
        b'{"outcome":"completed","id":"%b","model":"m","attempt":1,"queued_at":"%b",'
        b'"finished_at":"%b","text":"","finish_reason":"stop","usage":{"prompt_tokens":1,'
        b'"completion_tokens":0,"total_tokens":1},"task":"rerank","ranking":[{"index":1,'
        b'"relevance_score":0.5,"document":{"text":"b"}},{"index":0,"relevance_score":-1.0}]}'
        % (ID.encode(), T0.encode(), T2.encode()),
        Completed(
            **COMMON,
            text="",
            finish_reason="stop",
            usage=Usage(1, 0, 1),
            task="rerank",
            ranking=[RankedDocument(1, 0.5, Document("b")), RankedDocument(0, -1.0)],
        ),
    ),
    *(
        (
            decode_result,
            b'{"outcome":"%b","id":"%b","model":"m","attempt":1,"queued_at":"%b",'
            b'"finished_at":"%b","code":"c","message":"why"}'
            % (outcome, ID.encode(), T0.encode(), T2.encode()),
            kind(**COMMON, code="c", message="why"),
        )
        for outcome, kind in (
            (b"failed", Failed),
            (b"cancelled", Cancelled),
            (b"expired", Expired),
        )
    ),
    (
        decode_state_event,
        b'{"state":"returned","attempt":2,"at":"%b","inferer":"i"}' % T1.encode(),
        StateEvent(state="returned", attempt=2, at=T1, inferer="i"),
    ),
    (
        decode_token_frame,
        b'{"attempt":1,"index":3,"tokens":["a",""]}',
        TokenFrame(attempt=1, index=3, tokens=["a", ""]),
    ),
    (
        decode_inferer_entry,
        b'{"id":"i","model":"m","slots":1,"host":"h","threads":2,"n_ctx":4096,"tasks":["chat","complete"],'
        b'"started_at":"%b","version":"0.1.0"}' % T0.encode(),
        InfererEntry(
            id="i",
            model="m",
            slots=1,
            host="h",
            threads=2,
            n_ctx=4096,
            tasks=["chat", "complete"],
            started_at=T0,
            version="0.1.0",
        ),
    ),
    (
        decode_idempotency_entry,
        b'{"id":"%b","digest":"d1ce57"}' % ID.encode(),
        IdempotencyEntry(ID, "d1ce57"),
    ),
    (decode_orphan_entry, b'{"until":"%b"}' % T0.encode(), OrphanEntry(T0)),
    (decode_model_facts, b'{"n_ctx":4096,"tasks":["complete"]}', ModelFacts(4096, ["complete"])),
    (
        decode_model_facts,
        b'{"n_ctx":4096,"tasks":["complete"],"adapters":["a","v1.0_b"],'
        b'"sampling_defaults":{"temperature":0.6}}',
        ModelFacts(
            4096,
            ["complete"],
            adapters=["a", "v1.0_b"],
            sampling_defaults=SamplingDefaults(temperature=0.6),
        ),
    ),
    (
        decode_dead_letter,
        b'{"id":"x","model":"m","code":"c","message":"why","attempts":3,"at":"%b","request":"{"}'
        % T0.encode(),
        DeadLetter(id="x", model="m", code="c", message="why", attempts=3, at=T0, request="{"),
    ),
    (
        decode_dead_letter,
        b'{"id":"x","model":"m","code":"c","message":"why","attempts":3,"at":"%b","request":"{",'
        b'"priority":"low","timeout_s":60.0}' % T0.encode(),
        DeadLetter(
            id="x",
            model="m",
            code="c",
            message="why",
            attempts=3,
            at=T0,
            request="{",
            priority="low",
            timeout_s=60,
        ),
    ),
    (
        decode_state_event,
        b'{"state":"retrying","attempt":1,"at":"%b","inferer":"i","code":"c","message":"why"}'
        % T1.encode(),
        StateEvent(state="retrying", attempt=1, at=T1, inferer="i", code="c", message="why"),
    ),
]


@pytest.mark.parametrize(("decode", "payload", "meaning"), PAYLOADS)
def test_payloads_of_every_version_can_be_read(
    decode: Callable[[bytes], Any], payload: bytes, meaning: Any
) -> None:
    """Each decodes to what it meant when it was sent, and survives a round trip."""
    assert decode(payload) == meaning
    assert decode(encode(meaning)) == meaning


def test_what_an_earlier_version_left_out_is_not_left_to_the_model() -> None:
    """It did not write values that equal llama.cpp's defaults, even if a client had sent them."""
    defaults = SamplingDefaults()
    earlier = decode_request(b'{"task":"complete","prompt":"x","top_k":7}').with_said_sampling()
    assert (earlier.temperature, earlier.top_k) == (defaults.temperature, 7)
    now = decode_request(b'{"task":"complete","prompt":"x","top_k":7,"says_sampling":true}')
    assert now.with_said_sampling() == now
    assert now.temperature is UNSET
    embed = decode_request(b'{"task":"embed","input":["a"]}')
    assert embed.with_said_sampling() == embed


def test_one_answer_is_written_as_it_was_before_there_could_be_several() -> None:
    """What this version sends for one answer, an earlier one can read, and the other way round."""
    request = InferenceRequest(task="complete", prompt="x")
    frame = TokenFrame(attempt=1, index=0, tokens=["a"])
    assert encode(request.work(8)) == b'{"prompt_bytes":1,"max_tokens":8,"task":"complete"}'
    assert encode(frame) == b'{"attempt":1,"index":0,"tokens":["a"]}'
    result = Completed(
        id="x",
        model="m",
        attempt=1,
        queued_at=T0,
        finished_at=T1,
        text="a",
        finish_reason="stop",
        usage=Usage(1, 2, 3),
    )
    for written in (encode(request), encode(result), encode(JobStatus.of(result))):
        assert b'"n"' not in written
        assert b"choices" not in written
    (choice,) = result.choices
    assert (choice.text, choice.finish_reason, choice.completion_tokens) == ("a", "stop", 2)


def test_a_cancel_notice_can_be_read_without_its_fields() -> None:
    """Only its code."""
    assert decode_cancel_notice(b'{"code":"cancelled"}').code == "cancelled"


CONVERSATION = '"messages":[{"role":"user","content":"x"}]'


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("{}", "required field `task`"),
        ('{"prompt":"x"}', "required field `task`"),
        ('{"task":"sing","prompt":"x"}', "Invalid enum value"),
        ('{"task":"chat"}', "the task `chat` takes `messages`"),
        ('{"task":"chat","prompt":"x"}', "the task `chat` takes `messages`"),
        ('{"task":"complete"}', "the task `complete` takes a `prompt`"),
        (f'{{"task":"complete",{CONVERSATION}}}', "the task `chat` takes `messages`"),
        (f'{{"task":"complete","prompt":"x",{CONVERSATION}}}', "the task `chat` takes `messages`"),
        ('{"task":"embed","prompt":"x"}', "the task `complete` takes a `prompt`"),
        ('{"task":"embed"}', "the task `embed` takes `input`"),
        ('{"task":"rerank","query":"q"}', "the task `rerank` takes `query` and `documents`"),
        ('{"task":"embed","input":["x"],"temperature":0}', "`temperature` applies only to text"),
        ('{"task":"embed","input":["x"],"top_n":1}', "`top_n` applies only to `query`"),
    ],
)
def test_a_request_whose_task_does_not_fit_is_refused(body: str, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        decode_request(body)


@pytest.mark.parametrize(
    "option",
    [
        '"max_tokens":"5"',
        '"max_tokens":0',
        '"max_tokens":2147483648',
        '"max_tokens":1.5',
        '"temperature":-0.1',
        '"temperature":2.1',
        '"temperature":"1"',
        '"temperature":null',
        '"temperature":NaN',
        '"top_p":1.1',
        '"adapter":""',
        '"adapter":"../x"',
        '"adapter":"a b"',
        '"adapter":"a\\n"',
        '"adapter":"' + "a" * 65 + '"',
        '"min_p":-0.1',
        '"top_k":-1',
        '"seed":9223372036854775808',
        '"seed":true',
        '"stop":""',
        '"stop":["a",""]',
        '"stop":["x"' + ',"x"' * 16 + "]",
        '"repeat_penalty":0',
        '"presence_penalty":2.5',
        '"frequency_penalty":-2.5',
        '"response_format":{"type":"xml"}',
        '"response_format":{"type":"json_schema"}',
        '"stream":1',
        '"logit_bias":{"5":101}',
        '"logit_bias":{"a":1}',
        '"logit_bias":{"-1":1}',
        '"logit_bias":[[5,1]]',
        '"min_tokens":-1',
        '"ignore_eos":1',
        '"stop_token_ids":[-1]',
        '"stop_token_ids":["5"]',
        '"n":0',
        '"n":9',
        '"n":"2"',
    ],
)
def test_options_out_of_range_or_of_another_type_are_refused(option: str) -> None:
    """Strictly: "5" is not 5, and null does not stand for a default."""
    with pytest.raises(Unreadable):
        decode_request(b'{"task":"complete","prompt":"x",%b}' % option.encode())


@pytest.mark.parametrize(
    "body",
    [
        b'{"task":"complete","prompt":""}',
        b'{"task":"chat","messages":[]}',
        b'{"task":"chat","messages":[{"role":"me","content":"x"}]}',
    ],
)
def test_empty_prompts_and_unknown_roles_are_refused(body: bytes) -> None:
    """There is nothing to answer to."""
    with pytest.raises(Unreadable):
        decode_request(body)


def test_what_cannot_be_read_is_quoted_in_part() -> None:
    """msgspec quotes a wrong value as a whole, and it may have megabytes."""
    with pytest.raises(Unreadable) as caught:
        decode_request(json.dumps({"task": "A" * 300_000, "prompt": "x"}).encode())
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "more",
    [
        b'"embeddings":["AACAPwA="]',
        b'"embeddings":["!"]',
        b'"ranking":[{"index":0,"relevance_score":"high"}]',
        b'"ranking":[{"index":-1,"relevance_score":0.5}]',
    ],
)
def test_a_result_that_is_no_embedding_or_ranking_cannot_be_read(more: bytes) -> None:
    """What reads one later relies on it."""
    body = (
        b'{"outcome":"completed","id":"x","model":"m","attempt":1,"queued_at":"%b",'
        b'"finished_at":"%b","text":"","finish_reason":"stop","usage":{"prompt_tokens":1,'
        b'"completion_tokens":0,"total_tokens":1},%b}' % (T0.encode(), T2.encode(), more)
    )
    with pytest.raises(Unreadable):
        decode_result(body)
