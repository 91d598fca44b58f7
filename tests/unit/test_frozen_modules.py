"""The objects of modules are left out of garbage collections, which stop everything else."""

import subprocess
import sys

import pytest

COUNT = """
import gc
from {module} import main
from shared.process.lifecycle import run_process

async def count():
    print(len(gc.get_objects()), gc.get_freeze_count())

run_process("counted", count)
"""


@pytest.mark.parametrize("module", ["services.gateway.server", "services.inferer.serve"])
def test_a_collection_does_not_look_at_modules(module: str) -> None:
    counted = subprocess.run(
        [sys.executable, "-c", COUNT.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
    )
    looked_at, left_out = map(int, counted.stdout.split())
    assert left_out > 10 * looked_at
