"""LoRA adapters and the sampling of a GGUF through the queue: HTTP, NATS and the command line."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import openai
import pytest
from msgspec.structs import replace

from shared.job_ids import new_job_id
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.requests import InferenceRequest
from tests.support.lora import write_lora
from tests.support.processes import PATIENCE_S, Stack, clean_environment, eventually, scripts
from tests.support.raw_nats import RawNats
from tests.support.shim import SLOW_AT_DECODE, write_shim
from tests.support.tiny_model import write_tiny_model
from tests.support.up import Up

GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
IGNORED = "sampling_default_ignored"
PROMPT = {"prompt": "tell me", **GREEDY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "v1.0_second")):
        write_lora(folder / f"{name}.gguf", seed=seed)
    return folder


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, folder: Path
) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        stack.start_gateway()
        stack.start_inferer(tiny_model, INFERER_ADAPTERS=str(folder), INFERER_CONCURRENCY="3")
        stack.wait_until_served("tiny")
        yield stack


def text_of(stack: Stack, **body: Any) -> str:
    status = stack.wait_for_end(stack.submit(**body))
    assert status["state"] == "SUCCESS", status
    return str(status["result"]["text"])


def card(stack: Stack, model: str = "tiny") -> dict[str, Any]:
    found: dict[str, Any] = stack.http.get(f"/v1/models/{model}").json()
    return found


def put_by_hand(stack: Stack, request: InferenceRequest) -> str:
    """The text of a job that an earlier version has put on the queue of the model `told`."""
    job_id = new_job_id()
    with RawNats(stack.nats.port) as connection:
        connection.request(subjects.request("told", job_id).encode(), encode(request))
    return str(stack.wait_for_end(job_id)["result"]["text"])


@pytest.fixture(scope="module")
def texts(served: Stack) -> dict[str | None, str]:
    """What each adapter answers, one after the other; by its name."""
    names = (None, "first", "v1.0_second")
    found = {name: text_of(served, **PROMPT, adapter=name) for name in names}
    assert len({*found.values()}) == len(names)
    return found


def test_jobs_with_different_adapters_run_side_by_side(
    served: Stack, texts: dict[str | None, str]
) -> None:
    ids = [(name, served.submit(**PROMPT, adapter=name)) for name in 4 * list(texts)]
    for name, job_id in ids:
        assert served.wait_for_end(job_id)["result"]["text"] == texts[name]


def test_the_openai_client_names_an_adapter(served: Stack, texts: dict[str | None, str]) -> None:
    """As it names what OpenAI does not have; the answer names the model."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        for name, wanted in texts.items():
            body = {"adapter": name}
            answer = client.completions.create(
                model="tiny", prompt="tell me", **GREEDY, extra_body=body
            )
            assert (answer.choices[0].text, answer.model) == (wanted, "tiny")
        messages: Any = [{"role": "user", "content": "tell me"}]
        chats = {
            client.chat.completions.create(
                model="tiny", messages=messages, **GREEDY, extra_body={"adapter": name}
            )
            .choices[0]
            .message.content
            for name in texts
        }
        assert len(chats) == len(texts)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model="tiny", messages=messages, extra_body={"adapter": "third"}
            )
        assert refused.value.param == "adapter"


async def test_callers_over_nats_name_an_adapter(
    served: Stack, texts: dict[str | None, str]
) -> None:
    connection = await nats.connect(served.nats.url)
    body = json.dumps({**PROMPT, "adapter": "first"}).encode()
    reply = await connection.request("infer.complete", body, timeout=PATIENCE_S)
    assert json.loads(reply.data)["text"] == texts["first"]
    body = json.dumps({**PROMPT, "adapter": "third"}).encode()
    refused = await connection.request("infer.complete", body, timeout=PATIENCE_S)
    assert refused.headers is not None
    assert "adapter: this model has no adapter third" in refused.headers["Nats-Service-Error"]
    await connection.close()


def test_the_command_line_names_an_adapter(served: Stack, texts: dict[str | None, str]) -> None:
    ask = ["ask", "tell me", "--raw", "--max-tokens", "12", "--temperature", "0", "--json"]
    asked = subprocess.run(
        [scripts() / "sluice", *ask, "--adapter", "first", "--url", served.url],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert json.loads(asked.stdout)["result"]["text"] == texts["first"], asked.stderr


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            {"prompt": "x", "adapter": "third"},
            "adapter: this model has no adapter third; it has: first, v1.0_second",
        ),
        ({"prompt": "x", "adapter": "two words"}, "adapter"),
        ({"prompt": "x", "adapter": ""}, "adapter"),
        ({"prompt": "x", "adapter": ["first"]}, "adapter"),
        (
            {"input": ["x"], "adapter": "first"},
            "`adapter` applies only to text that is generated; leave it out",
        ),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_is_refused_before_the_queue(
    served: Stack, body: dict[str, Any], sentence: str
) -> None:
    answer = served.http.post("/jobs", json=body)
    assert answer.status_code == 400, answer.text
    assert sentence in answer.json()["detail"]


def test_what_a_model_has_is_listed(served: Stack) -> None:
    assert card(served)["adapters"] == ["first", "v1.0_second"]
    (inferer,) = served.http.get("/inferers").json()["inferers"]
    assert inferer["adapters"] == ["first", "v1.0_second"]


def test_an_adapter_is_offered_if_all_inferers_have_it(
    tmp_path: Path, tiny_model: Path, folder: Path
) -> None:
    """A job that an inferer without it gets all the same waits, and runs on one that has it. The
    reason is logged once."""
    with Stack(tmp_path) as stack:
        stack.start_gateway(GATEWAY_MODELS="tiny").wait_for("gateway_ready")
        early = stack.submit(**PROMPT, model="tiny", adapter="first")
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "other.gguf").symlink_to(folder / "first.gguf")
        without = stack.start_inferer(
            tiny_model, INFERER_ADAPTERS=str(tmp_path / "one"), INFERER_RETRY_S="0.01"
        )
        status = stack.wait_for_state(early, "RETRY")
        assert (status["attempts"], status["inferer"]) == (0, None)
        assert "has no adapter first" in status["last_error"]["message"]
        (warning,) = eventually(lambda: without.events("adapter_missing"), "a warning")
        assert "the inferer inferer-0 has no adapter first, it has other" in warning["message"]
        assert card(stack)["adapters"] == ["other"]
        stack.start_inferer(tiny_model, INFERER_ADAPTERS=str(folder))
        stack.wait_until_served("tiny", inferers=2)
        eventually(lambda: card(stack)["adapters"] == [], "none in common")
        assert stack.http.post("/jobs", json={**PROMPT, "adapter": "first"}).status_code == 400
        status = stack.wait_for_end(early)
        assert (status["state"], status["attempts"]) == ("SUCCESS", 1)
        assert len(without.events("adapter_missing")) == 1


def test_an_inferer_with_a_file_that_is_no_adapter_does_not_start(
    tmp_path: Path, tiny_model: Path
) -> None:
    """One line, exit status 2; `sluice up` shows it."""
    write_lora(tmp_path / "good.gguf")
    write_lora(tmp_path / "wide.gguf", width=64)
    line = f"INFERER_ADAPTERS: {tmp_path / 'wide.gguf'} is not a LoRA adapter for this model: "
    with Stack(tmp_path / "stack") as stack:
        inferer = stack.start_inferer(tiny_model, INFERER_ADAPTERS=str(tmp_path))
        assert inferer.wait() == 2
        last = inferer.output().splitlines()[-1]
        assert last.startswith(f"inferer: {line}"), inferer.output()
    up = Up(tmp_path / "data", tiny_model, INFERER_ADAPTERS=str(tmp_path))
    assert up.popen.wait(PATIENCE_S) == 2
    assert line in up.stderr


def test_an_adapter_that_kills_llama_cpp_is_named(tmp_path: Path, tiny_model: Path) -> None:
    """The self-test computes with each before the inferer takes jobs."""
    write_lora(tmp_path / "good.gguf")
    write_lora(tmp_path / "deep.gguf", depth=3)
    with Stack(tmp_path / "stack") as stack:
        inferer = stack.start_inferer(tiny_model, INFERER_ADAPTERS=str(tmp_path))
        assert inferer.wait() == 2
        assert "with the adapter deep" in inferer.output().splitlines()[-1]


def test_an_adapter_is_tested_however_slow_the_model_is(tmp_path: Path, tiny_model: Path) -> None:
    """The time limit is for each by itself: one that was not tested would not pass for good."""
    write_lora(tmp_path / "deep.gguf", depth=3)
    library = write_shim(tmp_path / "library", SLOW_AT_DECODE)
    with Stack(tmp_path / "stack") as stack:
        inferer = stack.start_inferer(
            tiny_model, INFERER_ADAPTERS=str(tmp_path), LLAMA_CPP_LIB_PATH=str(library)
        )
        assert inferer.wait() == 2
        assert "with the adapter deep" in inferer.output().splitlines()[-1]


def test_the_sampling_of_a_gguf_is_listed_and_holds(tmp_path: Path) -> None:
    """What it says wrongly is logged and ignored."""
    fields = {"temp": 0.0, "top_k": 7, "min_p": 2.0, "xtc_probability": 0.5}
    path = write_tiny_model(
        tmp_path / "told.gguf",
        metadata={f"general.sampling.{name}": value for name, value in fields.items()},
    )
    with Stack(tmp_path) as stack:
        stack.serve(path)
        assert card(stack, "told")["sampling_defaults"] == {
            "temperature": 0.0,
            "top_p": 0.95,
            "top_k": 7,
            "min_p": 0.05,
            "repeat_penalty": 1.0,
        }
        ignored = {one["field"]: one["why"] for one in stack.inferers[0].events(IGNORED)}
        assert ignored["general.sampling.xtc_probability"] == "not supported"
        assert "<= 1" in ignored["general.sampling.min_p"]
        texts = {text_of(stack, prompt="hi", max_tokens=12, seed=seed) for seed in (1, 2)}
        assert len(texts) == 1
        # One that was on the queue while the inferer was upgraded means llama.cpp's 0.8.
        old = InferenceRequest(task="complete", prompt="hi", max_tokens=12)
        assert len({put_by_hand(stack, replace(old, seed=seed)) for seed in (1, 2)}) == 2
        hot = {"prompt": "hi", "max_tokens": 12, "temperature": 2}
        assert len({text_of(stack, **hot, seed=seed) for seed in (1, 2)}) == 2
