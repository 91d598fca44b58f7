"""The command `sluice`."""

import subprocess

from tests.support.processes import PATIENCE_S, Stack, scripts


def sluice(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `sluice` to its end with the gateway of ``stack``."""
    return subprocess.run(
        [scripts() / "sluice", *arguments, "--url", stack.url],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
