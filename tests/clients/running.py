"""Runs the programs of `programs/`, each in the environment of its client."""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.clients.programs.harness import Person
from tests.support.processes import ROOT, clean_environment

ENVIRONMENTS = ROOT / ".venv" / "clients"
PROGRAMS = Path(__file__).parent / "programs"
NOBODY = "http://127.0.0.1:9"
"""A proxy that is not there: whatever is meant for another machine fails."""
ENVIRONMENT = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOBODY),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1"),
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}
TIMEOUT_S = 170

Outcome = dict[str, Any]
"""What a program got in a case."""


class Client(NamedTuple):
    """A client and what it can do."""

    environment: str
    """Its folder in `.venv/clients`."""
    cases: str
    api: str = "chat"

    def run(self, served: Mapping[str, str]) -> dict[str, Outcome]:
        """What each case got, and which cities it called the tool with, by its name."""
        name = f"use_{self.environment.replace('-', '_')}"
        arguments = json.dumps({**served, "api": self.api})
        found: dict[str, Outcome] = run_program(
            self.environment, name, arguments, *self.cases.split()
        )
        return found


Ask = Callable[[Client, str], Outcome]


def require_person(outcome: Outcome) -> None:
    """Cut off nowhere, and within the bounds of the schema."""
    assert outcome["got"]["type"] == "Person"
    Person.model_validate(outcome["got"]["value"])


def run_program(environment: str, name: str, *arguments: str) -> Any:
    """The JSON that a program of `programs/` prints."""
    folder = ENVIRONMENTS / environment
    assert (folder / ".ready").exists(), f"no {environment} here: make clients"
    ended = subprocess.run(
        [*_command(folder, name), *arguments],
        env=clean_environment() | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def _command(folder: Path, name: str) -> list[str]:
    python = folder / "bin" / "python"
    if python.exists():
        return [str(python), str(PROGRAMS / f"{name}.py")]
    node = shutil.which("node")
    if node is None or not (folder / "node_modules").exists():
        pytest.skip("needs node and npm")
    # Node looks for packages beside the program.
    return [node, str(shutil.copy(PROGRAMS / f"{name}.mjs", folder / f"{name}.mjs"))]
