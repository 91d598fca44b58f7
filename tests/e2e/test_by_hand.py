"""What people put into the broker with their own hands harms nobody but themselves."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig

from shared.broker.connection import Broker
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.requests import InferenceRequest
from tests.support.processes import Stack

REQUEST = InferenceRequest(task="complete", prompt="hi", max_tokens=2)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Stack]:
    """NATS and a gateway that knows the model `tiny`; no inferer, so jobs stay where they are."""
    with Stack(tmp_path) as running:
        running.start_gateway(GATEWAY_MODELS="tiny").wait_for("gateway_ready")
        yield running


@pytest.fixture
async def js(gateway: Stack) -> AsyncIterator[JetStreamContext]:
    broker = Broker(BrokerSettings(url=gateway.nats.url), "test")
    await broker.connect()
    yield broker.js
    await broker.close()


async def test_an_unreadable_result_is_reported_as_such(
    gateway: Stack, js: JetStreamContext
) -> None:
    """It is final all the same: `failed`, with the reason, for whoever asks."""
    job_id = new_job_id()
    await js.publish(subjects.result("tiny", job_id), b"\xff{")
    status = gateway.status(job_id)
    assert (status["state"], status["error"]["code"]) == ("FAILURE", "unreadable_result")
    events = gateway.http.get(f"/jobs/{job_id}/events").text
    assert "unreadable_result" in events


async def test_an_inferer_outlives_an_unreadable_result(
    gateway: Stack, js: JetStreamContext, tiny_model: Path
) -> None:
    """Its job leaves the queue, and the next one runs."""
    job_id = new_job_id()
    await js.publish(subjects.result("tiny", job_id), b"nonsense")
    await js.publish(subjects.request("tiny", job_id), encode(REQUEST))
    inferer = gateway.start_inferer(tiny_model)
    gateway.wait_until_served("tiny")
    assert gateway.wait_for_end(gateway.submit(prompt="hi", max_tokens=2))["state"] == "SUCCESS"
    assert (await js.stream_info(subjects.REQUESTS)).state.messages == 0
    assert "Traceback" not in inferer.output()


@pytest.mark.parametrize(
    ("body", "deadline"),
    [
        (encode(REQUEST), "tomorrow"),
        (b"\xff\xfe", "2030-01-01T00:00:00.000000Z"),
        (b"[" * 100_000, ""),
    ],
)
async def test_an_unreadable_request_can_be_cancelled(
    gateway: Stack, js: JetStreamContext, body: bytes, deadline: str
) -> None:
    """While it waits it can be read and cancelled; its state event may be nonsense too."""
    job_id = new_job_id()
    headers = {subjects.HEADER_DEADLINE: deadline} if deadline else {}
    await js.publish(subjects.request("tiny", job_id), body, headers=headers)
    await js.publish(subjects.state_events("tiny", job_id), b"started!")
    assert gateway.status(job_id)["state"] == "PENDING"
    cancelled = gateway.http.delete(f"/jobs/{job_id}")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "REVOKED")
    assert (await js.stream_info(subjects.REQUESTS)).state.messages == 0


async def test_a_foreign_consumer_is_not_a_model_and_is_left_alone(
    gateway: Stack, js: JetStreamContext
) -> None:
    """It is not listed as a model, and it is not changed."""
    mine = ConsumerConfig(durable_name="mine", filter_subject="infer.requests.other.low.*.*")
    await js.add_consumer(subjects.REQUESTS, mine)
    for _ in range(2):  # each is a new read by the gateway
        models = gateway.http.get("/queue").json()["models"]
        assert [model["model"] for model in models] == ["tiny"]
    gateway.submit(prompt="hi")  # without a model: only one is served
    assert gateway.http.post("/jobs", json={"prompt": "hi", "model": "mine"}).status_code == 404
    held = (await js.consumer_info(subjects.REQUESTS, "mine")).config
    assert held.filter_subject == "infer.requests.other.low.*.*"
    assert not gateway.gateways[0].events("limit_not_set")
