"""LangChain's tools, whole and streamed, with tiny models of each family.

Their weights are random, so a grammar forces the call; `tests/e2e/test_tools.py` shows the same
with the official client.
"""

import json
from typing import Any

import pytest

from tests.clients.running import run_program
from tests.support.families import FAMILIES, brevity, write_family
from tests.support.processes import Stack

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each family, what LangChain got whole and streamed."""
    folder = tmp_path_factory.mktemp("families")
    paths = [write_family(folder, name) for name in FAMILIES]
    models = {
        path.stem: {
            "chat_template_kwargs": {"enable_thinking": False},
            "logit_bias": brevity(path),
            "cache_prompt": False,
        }
        for path in paths
    }
    with Stack(folder) as stack:
        stack.start_gateway()
        for path in paths:
            stack.start_inferer(path)
        for path in paths:
            stack.wait_until_served(path.stem)
        arguments = json.dumps({"url": f"{stack.url}/v1", "models": models})
        found: dict[str, Any] = run_program("langchain", "use_langchain_families", arguments)
        return found


@pytest.mark.parametrize("family", FAMILIES)
def test_langchain_runs_the_tool_and_gets_an_answer(outcomes: dict[str, Any], family: str) -> None:
    """The arguments are valid, the result goes back by the id of its call, and a text comes: the
    same when streamed."""
    whole, streamed = outcomes[family]
    assert whole["called"] in (["Oslo"], ["Bergen"])
    assert whole["calls_after"] == 0
    assert streamed == whole
