"""``python -m tests.hangups.counted_gateway FILE``: a gateway that writes on SIGUSR1 how many tasks
its event loop has."""

import asyncio
import signal
import sys
from pathlib import Path

from services.gateway.server import main
from shared.process.lifecycle import run_process


async def count_tasks() -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, write_count, Path(sys.argv[1]))
    await main()


def write_count(file: Path) -> None:
    written = file.with_suffix(".new")
    written.write_text(str(len(asyncio.all_tasks())))
    written.rename(file)


if __name__ == "__main__":
    sys.exit(run_process("gateway", count_tasks))
