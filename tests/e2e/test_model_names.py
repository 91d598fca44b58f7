"""A model called as users call it, from the inferer's setting to every place where it is named."""

import asyncio
import json
import subprocess
from pathlib import Path

import openai
import pytest

from shared.broker.connection import connected
from shared.broker.consumers import read_models
from shared.config import BrokerSettings
from shared.model_names import token_of
from tests.support.processes import PATIENCE_S, Stack, clean_environment, eventually, scripts

BODY = {"prompt": "hi", "max_tokens": 2, "seed": 1}


def sluice(stack: Stack, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [scripts() / "sluice", *arguments],
        env={**clean_environment(), "SLUICE_URL": stack.url, "NATS_URL": stack.nats.url},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def queues(stack: Stack) -> set[str]:
    return {queue["model"] for queue in stack.http.get("/queue").json()["models"]}


@pytest.mark.parametrize("name", ["qwen2.5:1.5b", "org/Name v2, final"])
def test_it_is_named_everywhere(tmp_path: Path, tiny_model: Path, name: str) -> None:
    """Jobs may name the model or its token; every answer says the name, consumers have the token;
    and it is remembered while no inferer lives, by a new gateway too."""
    token = token_of(name)
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        # Its id is made of the token, as it is a key of a bucket.
        stack.start_inferer(tiny_model, INFERER_ALIAS=name, INFERER_ID="")
        stack.wait_until_served(name)
        for asked in (name, token, "", None):
            job_id = stack.submit(**BODY, model=asked)
            status = stack.wait_for_end(job_id)
            assert (status["state"], status["model"]) == ("SUCCESS", name), status
        (inferer,) = stack.http.get("/inferers").json()["inferers"]
        assert inferer["model"] == name
        assert inferer["id"].endswith(f"-{token}")
        with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == [name]
            assert client.models.retrieve(name).id == name
            chat = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=2
            )
            assert chat.model == name
        assert stack.http.get(f"/v1/models/{name}").json()["id"] == name
        changed = stack.http.put("/concurrency", json={"concurrency": 2, "model": name})
        assert [one["model"] for one in changed.json()["inferers"]] == [name]
        for command in (("queue",), ("inferers",), ("top", "--once"), ("status", job_id)):
            shown = sluice(stack, *command)
            assert name in shown.stdout, (command, shown.stdout, shown.stderr)
        examined = sluice(stack, "doctor", "--json")
        findings = json.loads(examined.stdout)["findings"]
        assert [f for f in findings if f["severity"] == "error"] == []
        assert name in {finding["about"] for finding in findings}

        stack.inferers[0].terminate()
        waiting = stack.submit(**BODY, model=name)
        assert stack.status(waiting)["model"] == name
        stack.gateways[0].terminate()
        stack.start_gateway()
        second = stack.urls[1]
        listed = eventually(lambda: _models(stack, second), "the new gateway knows it")
        assert listed == [name]
        stack.urls[0] = second


def _models(stack: Stack, url: str) -> list[str] | None:
    shown = subprocess.run(
        [scripts() / "sluice", "queue", "--json", "--url", url],
        env=clean_environment(),
        capture_output=True,
        timeout=PATIENCE_S,
    )
    if shown.returncode:
        return None
    return [queue["model"] for queue in json.loads(shown.stdout)["models"]] or None


def test_a_model_that_a_gateway_expects(tmp_path: Path) -> None:
    """GATEWAY_MODELS makes its queue under its name, which restarts do not lose."""
    names = {"qwen2.5:1.5b", "org/name", "plain"}
    with Stack(tmp_path) as stack:
        stack.start_gateway(GATEWAY_MODELS=", ".join(names))
        eventually(lambda: stack.gateways[0].events("gateway_ready") or None, "it is ready")
        assert queues(stack) == names
        job_id = stack.submit(**BODY, model="org/name")
        assert stack.status(job_id)["model"] == "org/name"
        missing = stack.http.post("/jobs", json={**BODY, "model": "org/other"})
        assert missing.status_code == 404
        assert "org/name, plain, qwen2.5:1.5b" in missing.json()["detail"]
        cancelled = stack.http.delete(f"/jobs/{job_id}").json()
        assert (cancelled["state"], cancelled["model"]) == ("REVOKED", "org/name")
        assert asyncio.run(_tokens(stack)) == {token_of(name) for name in names}


async def _tokens(stack: Stack) -> set[str]:
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        return set(await read_models(broker))


def test_a_dead_letter_keeps_the_name_and_what_it_repeats(tmp_path: Path, tiny_model: Path) -> None:
    """A retry of it is a job of the same model; when that fails, too, its letter says of which job
    it is a retry."""
    name = "org/broken"
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        stack.start_inferer(
            tiny_model, INFERER_ALIAS=name, INFERER_MAX_ATTEMPTS="1", INFERER_N_CTX="0"
        )
        stack.wait_until_served(name)
        first = stack.submit(prompt="go on", max_tokens=4000)
        stack.wait_for_state(first, "STARTED")
        stack.inferers[0].kill()
        stack.start_inferer(tiny_model, INFERER_ALIAS=name, INFERER_MAX_ATTEMPTS="1")
        assert stack.wait_for_end(first)["error"]["code"] == "worker_lost"
        assert stack.http.get(f"/dead/{first}").json()["model"] == name
        retried = stack.http.post(f"/dead/{first}/retry").json()
        assert retried["retry_of"] == first
        second = retried["id"]
        stack.wait_for_state(second, "STARTED")
        stack.inferers[1].kill()
        stack.start_inferer(tiny_model, INFERER_ALIAS=name, INFERER_MAX_ATTEMPTS="1")
        ended = stack.wait_for_end(second)
        assert (ended["model"], ended["retry_of"]) == (name, first)
        letter = stack.http.get(f"/dead/{second}").json()
        assert (letter["model"], letter["retry_of"]) == (name, first)
        (head,) = stack.http.get("/dead").json()["letters"]
        assert head["retry_of"] == first
        assert first in sluice(stack, "dead", "show", second).stdout
