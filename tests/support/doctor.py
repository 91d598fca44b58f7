"""`sluice doctor` on a stack."""

import json
import subprocess
from typing import Any

from tests.support.processes import PATIENCE_S, Stack, clean_environment, scripts

Finding = dict[str, Any]


def examine(stack: Stack) -> dict[str, list[Finding]]:
    """The findings by what they are about; the exit status says whether something is wrong."""
    command = [str(scripts() / "sluice"), "doctor", "--url", stack.url]
    done = subprocess.run(
        [*command, "--nats-url", stack.nats.url, "--json"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    findings = json.loads(done.stdout)["findings"]
    is_wrong = any(finding["severity"] == "error" for finding in findings)
    assert (done.returncode, done.stderr) == (int(is_wrong), "")
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        assert (finding["advice"] is None) == (finding["severity"] == "ok")
        found.setdefault(finding["about"], []).append(finding)
    return found
