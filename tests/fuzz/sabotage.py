"""``python -m tests.fuzz.sabotage SERVICE FILE``: a service that does what none may; the
fuzzer is to notice."""

import asyncio
import os
import sys
import time

from shared.process.lifecycle import run_process

LIVES_S = 8.0
HOLDS_EVERY_S, HOLDS_S = 3.0, 1.5


async def site_is_up() -> None:
    """`Site` writes this file once everything serves."""
    while not os.path.exists(sys.argv[2]):  # noqa: ASYNC240, PTH110
        await asyncio.sleep(0.1)


async def gateway() -> None:
    """Holds its loop for longer than a second now and then; ends of itself, after some seconds."""
    from services.gateway.server import main

    async def hold() -> None:
        await site_is_up()
        began = time.monotonic()
        while time.monotonic() - began < LIVES_S:
            await asyncio.sleep(HOLDS_EVERY_S)
            time.sleep(HOLDS_S)  # noqa: ASYNC251  # this is what is to be noticed
        os._exit(3)

    holding = asyncio.create_task(hold())
    await main()
    holding.cancel()


async def inferer() -> None:
    """Ends of itself while it has nothing to do, so that no job can be blamed; says a traceback."""
    from services.inferer.crash.flight_recorder import FlightRecorder
    from services.inferer.serve import main

    async def die() -> None:
        await site_is_up()
        await asyncio.sleep(LIVES_S)
        try:
            raise RuntimeError("sabotage")
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(4)

    dying = asyncio.create_task(die())
    await main(FlightRecorder())
    dying.cancel()


if __name__ == "__main__":
    sys.exit(run_process(sys.argv[1], {"gateway": gateway, "inferer": inferer}[sys.argv[1]]))
