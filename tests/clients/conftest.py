"""A stack with a model of each kind, for the programs of clients."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import openai
import pytest

from tests.clients.programs.harness import MAX_TOKENS, QUESTION
from tests.clients.running import Ask, Client, Outcome
from tests.support.caller import write_caller
from tests.support.pooled_models import write_bert
from tests.support.processes import Stack


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[dict[str, str]]:
    """The arguments of the programs. Without a cache, the same question has the same answer to the
    last bit."""
    folder = tmp_path_factory.mktemp("stack")
    files = {
        "model": smollm2,
        "caller": write_caller(folder / "caller.gguf"),
        "embedder": write_bert(folder / "embedder.gguf", gguf.PoolingType.MEAN),
    }
    with Stack(folder) as stack:
        stack.start_gateway()
        for name, path in files.items():
            stack.start_inferer(path, INFERER_ALIAS=name, INFERER_CACHE_MB="0")
        for name in files:
            stack.wait_until_served(name)
        yield {"url": f"{stack.url}/v1", **{name: name for name in files}}


@pytest.fixture(scope="module")
def ask(served: dict[str, str]) -> Ask:
    """What a client got in a case; each program is run once, for all of its cases."""
    outcomes: dict[Client, dict[str, Outcome]] = {}

    def outcome(client: Client, case: str) -> Outcome:
        if client not in outcomes:
            outcomes[client] = client.run(served)
        found = outcomes[client][case]
        assert "error" not in found, found["error"]
        return found

    return outcome


@pytest.fixture(scope="module")
def official(served: dict[str, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served["url"], api_key="unused") as client:
        yield client


@pytest.fixture(scope="module")
def text(official: openai.OpenAI) -> str:
    """What the official client gets."""
    answer = official.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=MAX_TOKENS,
    )
    assert answer.choices[0].message.content
    return answer.choices[0].message.content
