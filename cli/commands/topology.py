"""``sluice topology``: creates streams, consumers and buckets without a gateway."""

import asyncio
import logging
import sys
from typing import Annotated

import typer

from cli.exit_status import EXIT_UNREACHABLE, EXIT_USAGE, CommandError
from cli.options import DEFAULT_NATS_URL, Json, NatsUrl, Replicas
from cli.output import out, print_json
from shared.broker.connection import connected
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings, load
from shared.errors import BrokerUnavailable, SettingsError, TopologyError
from shared.logs import configure_logs
from shared.model_names import NAME_RULE, is_name

CONNECT_TIMEOUT_S = 10.0

app = typer.Typer(no_args_is_help=True, help="Streams, consumers and buckets on the broker.")


@app.callback()
def _group() -> None:
    """Streams, consumers and buckets on the broker."""


@app.command()
def apply(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Also create a queue for this model.")
    ] = None,
    replicas: Replicas = 1,
    nats_url: NatsUrl = DEFAULT_NATS_URL,
    as_json: Json = False,
) -> None:
    """Create or update streams, consumers and buckets. Prints the changes; safe to repeat."""
    models = model or []
    for name in models:
        if not is_name(name):
            raise CommandError(f"{name!r} is not a valid model name: give {NAME_RULE}", EXIT_USAGE)
    # Errors of the connection are reported by the command itself.
    configure_logs("sluice", stream=sys.stderr, level=logging.CRITICAL)
    try:
        settings = load(BrokerSettings, "NATS", {"NATS_URL": nats_url})
        changes = asyncio.run(_apply(settings, Topology(replicas=replicas), models))
    except (TimeoutError, BrokerUnavailable) as error:
        why = f" ({error})" if str(error) else ""
        raise CommandError(f"no broker at {nats_url}{why}", EXIT_UNREACHABLE) from None
    except (TopologyError, SettingsError) as error:
        raise CommandError(str(error), EXIT_USAGE) from None
    if as_json:
        print_json({"changes": changes})
    else:
        for change in changes or ["no changes needed"]:
            out.print(change)


async def _apply(settings: BrokerSettings, topology: Topology, models: list[str]) -> list[str]:
    async with (
        asyncio.timeout(CONNECT_TIMEOUT_S),
        connected(settings, "sluice topology") as broker,
    ):
        return await ensure_topology(broker, topology, models)
