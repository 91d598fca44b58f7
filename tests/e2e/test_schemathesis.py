"""The gateway against its own OpenAPI document; `make schemathesis` does it for ten minutes."""

from pathlib import Path

import pytest

from tests.conformance.run import N_CTX, examine
from tests.support.processes import Stack


@pytest.mark.timeout(420)
def test_schemathesis_finds_nothing(tmp_path: Path, tiny_model: Path) -> None:
    """No answer but a documented one, in the documented form, to whatever is sent; no crash."""
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        stack.start_inferer(tiny_model, INFERER_N_CTX=str(N_CTX))
        stack.wait_until_served("tiny")
        ended = examine(stack.url, tmp_path, seconds=30, seed=1)
        assert ended.returncode == 0, ended.stdout
        assert stack.gateways[0].events("request_crashed") == []
