"""The command `sluice`."""

import subprocess

from tests.support.processes import PATIENCE_S, Stack, scripts


def sluice(stack: Stack, *arguments: str, gateway: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `sluice` to its end with a gateway of ``stack``."""
    return subprocess.run(
        [scripts() / "sluice", *arguments, "--url", stack.urls[gateway]],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
