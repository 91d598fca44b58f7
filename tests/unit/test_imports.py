"""The import contracts of pyproject.toml, which `make check` enforces: each finds a violation."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import ROOT, scripts

PLANTED = {
    "services and the command line import shared": (
        "services/gateway/eta/lengths.py",
        "services.inferer.settings",
    ),
    "shared imports neither services": ("shared/cpus.py", "cli.exit_status"),
    "the layers of shared": ("shared/wire/subjects.py", "shared.broker.connection"),
    "the layers of the gateway": ("services/gateway/jobs/jobs.py", "services.gateway.http.errors"),
    "neither edge imports the other": (
        "services/gateway/micro/service.py",
        "services.gateway.http.errors",
    ),
    "the layers of the command line": ("cli/up/stack.py", "cli.commands.up"),
    "the layers of the inferer": (
        "services/inferer/engine/engine.py",
        "services.inferer.worker.lease",
    ),
    "the engine does not import NATS": ("services/inferer/engine/engine.py", "nats"),
    "the scheduler imports no runtime": ("services/inferer/engine/scheduler.py", "llama_cpp"),
    "no runtime, directly or not": (
        "services/inferer/engine/prompt_cache.py",
        "services.inferer.engine.context",
    ),
    "only the engine calls llama.cpp": ("services/inferer/worker/worker.py", "llama_cpp"),
}
"""What a contract says, and an import that breaks it."""


@pytest.mark.parametrize("contract", PLANTED)
def test_a_forbidden_import_is_found(tmp_path: Path, contract: str) -> None:
    """The check fails, and names the contract and the module."""
    for folder in ("services", "shared", "cli"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file, module = PLANTED[contract]
    with (tmp_path / file).open("a") as planted:
        planted.write(f"\nimport {module}\n")
    checked = subprocess.run(
        [scripts() / "lint-imports", "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 1, checked.stdout + checked.stderr
    broken = [line for line in checked.stdout.splitlines() if line.endswith("BROKEN")]
    assert any(contract in line for line in broken)
    importing = file.removesuffix(".py").replace("/", ".")
    assert f"{importing} -> {module}" in checked.stdout
