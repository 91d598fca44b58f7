"""A gateway that is shut down completes what it has started."""

import json
import signal
from pathlib import Path

import httpx2

from tests.support.processes import PATIENCE_S, Stack
from tests.support.wire import connect


def test_cancellations_under_way_end_before_the_gateway(tmp_path: Path) -> None:
    """One whose client has hung up, and one that the broker did not confirm, while the broker is
    away: both are cancelled when it comes back within the grace."""
    with Stack(tmp_path) as stack:
        gateway = stack.start_gateway(
            GATEWAY_MODELS="tiny", GATEWAY_PUBLISH_PATIENCE_S="1", GATEWAY_SHUTDOWN_S="60"
        )
        gateway.wait_for("gateway_ready")
        client = connect(stack.url)
        client.sendall(_completion(stack.url))
        abandoned = gateway.wait_for("request_accepted")["job_id"]
        stack.nats.process.freeze()
        answer = httpx2.post(
            f"{stack.url}/jobs", json={"prompt": "hi", "model": "tiny"}, timeout=PATIENCE_S
        )
        assert answer.status_code == 503
        assert "is not known" in answer.json()["detail"]
        client.close()
        stack.nats.process.kill()
        gateway.wait_for("broker_disconnected")

        gateway.popen.send_signal(signal.SIGTERM)
        gateway.wait_for("gateway_stopping")
        stack.nats.start()
        assert gateway.wait() == 0
        assert [line["job_id"] for line in gateway.events("job_abandoned")] == [abandoned]
        (withdrawn,) = (line["job_id"] for line in gateway.events("job_withdrawn"))
        stack.start_gateway().wait_for("gateway_ready")
        with httpx2.Client(base_url=stack.urls[1], timeout=PATIENCE_S) as other:
            for job_id in (abandoned, withdrawn):
                assert other.get(f"/status/{job_id}").json()["state"] == "REVOKED"


def test_jobs_that_could_not_be_cancelled_are_logged(tmp_path: Path) -> None:
    """The broker stays away for longer than the grace."""
    with Stack(tmp_path) as stack:
        gateway = stack.start_gateway(GATEWAY_MODELS="tiny", GATEWAY_SHUTDOWN_S="1")
        gateway.wait_for("gateway_ready")
        client = connect(stack.url)
        client.sendall(_completion(stack.url))
        abandoned = gateway.wait_for("request_accepted")["job_id"]
        stack.nats.process.freeze()
        client.close()
        stack.nats.process.kill()
        gateway.wait_for("broker_disconnected")
        assert gateway.terminate() == 0
        (line,) = gateway.events("jobs_not_cancelled")
        assert line["left"] == [f"abandon {abandoned}"]


def _completion(url: str) -> bytes:
    body = json.dumps({"prompt": "hi", "model": "tiny"}).encode()
    host = httpx2.URL(url).netloc.decode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
