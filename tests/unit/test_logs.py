"""What a log line may hold."""

import os
import subprocess
import sys

import pytest

FAILS = """
import sys
from shared.logs import configure_logs, drain_logs, logger

def answer(prompt):
    raise ValueError("no answer")

configure_logs("gateway")
try:
    answer("a secret prompt")
except ValueError:
    logger().exception("request_crashed")
drain_logs()
"""


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_traceback_shows_no_local_variables(kind: str) -> None:
    """Prompts and answers stand in variables; an exception that is logged does not show them."""
    reader, writer = os.pipe() if kind == "pipe" else os.openpty()
    process = subprocess.Popen([sys.executable, "-c", FAILS], stdout=writer)
    os.close(writer)
    logged = b""
    try:
        while part := os.read(reader, 65536):
            logged += part
    except OSError:
        pass  # how a terminal ends
    assert process.wait(60) == 0
    assert b"no answer" in logged
    assert b"secret" not in logged
