"""An answer under a schema that ends with SUCCESS is valid; what cannot be enforced is refused."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import jsonschema_rs
import pytest

from shared.broker.connection import Broker
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.requests import InferenceRequest
from tests.support.processes import PATIENCE_S, Stack
from tests.support.schemas import schema_format

JOBS_PER_SCHEMA = 20
AT_ONCE = 8

TEXT = {"type": "string", "maxLength": 4}
BIT = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": -5, "maximum": 12}
POINT = {
    "type": "object",
    "properties": {"x": COUNT, "y": COUNT},
    "required": ["x", "y"],
}
NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["next"],
}


def _kind(name: str, **properties: Any) -> dict[str, Any]:
    known = {"kind": {"const": name}, **properties}
    return {"type": "object", "properties": known, "required": list(known)}


SIMPLE: list[dict[str, Any]] = [
    TEXT,
    BIT,
    COUNT,
    POINT,
    {"enum": ["ä", '"', "a\nb", 1, None, [1, {"a": []}], {"größe 📏": 1.5}]},
    {"const": {"a": [True, None, -0.5, "\u2028"]}},
    {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 9},
    {"type": ["string", "null", "boolean"], "maxLength": 3},
    {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    {"type": "string", "pattern": "^\\S{2,4}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "email", "maxLength": 12},
    {"prefixItems": [BIT, COUNT], "items": False, "minItems": 2, "type": "array"},
    {"type": "array", "items": COUNT, "minItems": 1, "maxItems": 3},
    {"oneOf": [_kind("a", n=COUNT), _kind("b", t=TEXT), {"type": "null"}]},
    {"anyOf": [_kind("a"), {"type": "object", "required": ["b"], "additionalProperties": BIT}]},
    {"allOf": [POINT, {"properties": {"x": {"minimum": 3}}}]},
    {"type": "object", "patternProperties": {"^k\\d$": BIT}, "additionalProperties": False},
    {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": COUNT},
    {"anyOf": [{"$ref": "#/$defs/node"}, BIT], "$defs": {"node": NODE}},
]
SCHEMAS = [*SIMPLE, *({"type": "array", "items": one, "maxItems": 2} for one in SIMPLE[:-1])]
SCHEMAS.append({"type": "object", "properties": {f"p{n}": one for n, one in enumerate(SIMPLE[:3])}})


@pytest.fixture
async def broker(shared_stack: Stack) -> AsyncIterator[Broker]:
    connection = Broker(BrokerSettings(url=shared_stack.nats.url), "test")
    await connection.connect()
    yield connection
    await connection.close()


@pytest.mark.timeout(600)
async def test_of_a_thousand_answers_none_that_succeeds_is_invalid(shared_stack: Stack) -> None:
    """50 schemas at temperature 1.5, from a model of random weights: what ends by itself is valid,
    and is most of it."""
    assert len(SCHEMAS) * JOBS_PER_SCHEMA == 1000
    ends: Counter[str] = Counter()
    turns = asyncio.Semaphore(AT_ONCE)

    async def run(http: httpx2.AsyncClient, schema: dict[str, Any], seed: int) -> None:
        wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
        options = {"max_tokens": 100, "temperature": 1.5, "seed": seed, "response_format": wanted}
        async with turns:
            answer = await http.post(
                "/jobs", json={"prompt": "answer:", **options}, headers={"prefer": "wait=60"}
            )
        status = answer.json()
        assert answer.status_code == 200, status
        assert status["state"] == "SUCCESS", (schema, status["error"])
        result = status["result"]
        ends[result["finish_reason"]] += 1
        if result["finish_reason"] == "stop":
            jsonschema_rs.validate(schema, json.loads(result["text"]), validate_formats=True)

    async with httpx2.AsyncClient(base_url=shared_stack.url, timeout=PATIENCE_S) as http:
        await asyncio.gather(
            *(run(http, schema, seed) for schema in SCHEMAS for seed in range(JOBS_PER_SCHEMA))
        )
    assert ends["stop"] > 500, ends


def test_what_cannot_be_enforced_is_refused_before_the_queue(shared_stack: Stack) -> None:
    """By every edge, with the field, the keyword and where it is, within two seconds."""
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    sentence = "response_format: `uniqueItems` (at /properties/tags) cannot be enforced"
    started = time.monotonic()
    job = shared_stack.http.post("/jobs", json={"prompt": "x", "response_format": wanted})
    assert time.monotonic() - started < 2
    problem = job.json()
    assert (job.status_code, problem["param"], problem["detail"]) == (
        400,
        "response_format",
        sentence,
    )
    completion = shared_stack.http.post(
        "/v1/completions", json={"prompt": "x", "response_format": wanted}
    )
    error = completion.json()["error"]
    assert (completion.status_code, error["param"], error["message"]) == (
        400,
        "response_format",
        sentence,
    )


async def test_what_cannot_be_enforced_is_refused_over_nats(
    shared_stack: Stack, broker: Broker
) -> None:
    schema = {"not": {"type": "string"}}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = json.dumps({"prompt": "x", "response_format": wanted}).encode()
    reply = await broker.nc.request("infer.submit", body, timeout=PATIENCE_S)
    assert reply.headers is not None
    assert reply.headers["Nats-Service-Error-Code"] == "400"
    assert "`not` cannot be enforced" in reply.headers["Nats-Service-Error"]


async def test_an_inferer_refuses_what_no_gateway_has_seen(
    shared_stack: Stack, broker: Broker
) -> None:
    """A request that was put on the queue by other software."""
    job_id = new_job_id()
    request = InferenceRequest(
        task="complete", prompt="x", response_format=schema_format({"uniqueItems": True})
    )
    await broker.publish_stored(
        subjects.request("tiny", job_id), encode(request), {subjects.HEADER_MSG_ID: job_id}, 30
    )
    ended = shared_stack.wait_for_end(job_id)
    assert (ended["state"], ended["attempts"]) == ("FAILURE", 1)
    assert ended["error"]["code"] == "invalid_request"
    assert "`uniqueItems` cannot be enforced" in ended["error"]["message"]


def test_an_answer_that_a_stop_string_has_cut_is_no_success(shared_stack: Stack) -> None:
    """It is not JSON. It is a model error that says so, at once: another attempt has the same seed.
    No dead letter is kept of it."""
    wanted = {"type": "json_schema", "json_schema": {"schema": POINT}}
    job_id = shared_stack.submit(
        prompt="x", max_tokens=100, response_format=wanted, stop=['"y'], seed=1
    )
    ended = shared_stack.wait_for_end(job_id)
    assert (ended["state"], ended["attempts"]) == ("FAILURE", 1)
    assert ended["error"]["code"] == "model_error"
    assert "is not JSON" in ended["error"]["message"]
    assert "leave out `stop`" in ended["error"]["message"]
    assert shared_stack.http.get(f"/dead/{job_id}").status_code == 404


@pytest.mark.parametrize("form", ["json_schema", "json_object"])
def test_an_answer_that_max_tokens_has_cut_is_one(shared_stack: Stack, form: str) -> None:
    """As with OpenAI: the text so far, and `length`."""
    wanted: dict[str, Any] = {"type": form}
    if form == "json_schema":
        wanted["json_schema"] = {"schema": POINT}
    job_id = shared_stack.submit(prompt="x", max_tokens=2, seed=3, response_format=wanted)
    ended = shared_stack.wait_for_end(job_id)
    assert ended["state"] == "SUCCESS"
    assert ended["result"]["finish_reason"] == "length"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated|delimiter"):
        json.loads(ended["result"]["text"])


def test_a_schema_beside_json_object_is_a_schema(shared_stack: Stack) -> None:
    """The form that llama.cpp's server takes. It is enforced, and refused, as the other one."""
    wanted: dict[str, Any] = {"type": "json_object", "schema": {"const": {"a": 1}}}
    job_id = shared_stack.submit(prompt="x", max_tokens=30, response_format=wanted)
    ended = shared_stack.wait_for_end(job_id)
    assert ended["state"] == "SUCCESS"
    assert ended["result"]["text"] == '{"a": 1}'
    for schema in ({"uniqueItems": True}, None, 5):
        wanted["schema"] = schema
        answer = shared_stack.http.post("/jobs", json={"prompt": "x", "response_format": wanted})
        assert answer.status_code == 400
        assert answer.json()["param"] == "response_format"
