"""``python -m services.inferer.health``: whether this host's inferer is alive, by its exit status.

An inferer listens on no port. It refreshes its entry in the bucket INFERERS, which expires 10 s
after the last refresh; so this detects an event loop that hangs as well as a dead process.
"""

import asyncio
import logging
import sys

import structlog

from services.inferer.settings import InfererSettings
from shared.broker.connection import Broker
from shared.config import BrokerSettings, load
from shared.errors import BrokerUnavailable, SettingsError
from shared.model_names import served_name
from shared.wire import subjects

CONNECT_TIMEOUT_S = 3.0
"""`Broker.connect` never gives up; the container engine would kill the check without a reason."""


class Unhealthy(Exception):
    """One sentence that says what is wrong."""


async def check() -> None:
    """Raises: Unhealthy, SettingsError."""
    settings = load(InfererSettings, "INFERER")
    broker = Broker(load(BrokerSettings, "NATS"), "inferer health")
    # As the inferer names itself, from the same variables and the same host name.
    alias = served_name(settings.model, settings.alias)
    inferer_id = settings.identity(alias)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await broker.connect()
    except TimeoutError:
        raise Unhealthy(f"no connection to the broker in {CONNECT_TIMEOUT_S:g} s") from None
    subject = subjects.inferer(alias, inferer_id)
    try:
        entry = await broker.subject_get(f"KV_{subjects.INFERERS}", subject)
    except BrokerUnavailable as error:
        raise Unhealthy(f"cannot read the bucket {subjects.INFERERS}: {error}") from error
    finally:
        await broker.close()
    # An entry that was deleted or has expired leaves a marker without data.
    if entry is None or not entry.data:
        raise Unhealthy(f"{inferer_id} is not among the live inferers")


def main() -> int:
    # The connection's own events would be further lines; Docker shows the last output as a whole.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        asyncio.run(check())
    except (Unhealthy, SettingsError) as error:
        print(f"inferer health: {error}", file=sys.stderr)
        return 1  # Docker reserves all other statuses
    return 0


if __name__ == "__main__":
    sys.exit(main())
