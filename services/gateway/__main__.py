"""``python -m services.gateway``: serve HTTP and NATS until SIGTERM."""

import sys

from shared.process.signals import block_signals


def start() -> int:
    """Run the gateway. Returns its exit status."""
    block_signals()  # the imports below take a second
    from services.gateway.server import main
    from shared.process.lifecycle import run_process

    return run_process("gateway", main)


if __name__ == "__main__":
    sys.exit(start())
