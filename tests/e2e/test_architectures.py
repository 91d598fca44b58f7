"""Models of other architectures are served."""

from pathlib import Path

from tests.support.architectures import write_mamba
from tests.support.processes import Stack


def test_mamba_is_served(tmp_path: Path) -> None:
    """It has no heads to divide by, and answers like any other."""
    with Stack(tmp_path / "stack") as stack:
        stack.serve(write_mamba(tmp_path / "mamba.gguf"))
        end = stack.wait_for_end(stack.submit(prompt="Once upon a time", max_tokens=8))
    assert end["state"] == "SUCCESS"
    assert end["result"]["usage"]["completion_tokens"] > 0
