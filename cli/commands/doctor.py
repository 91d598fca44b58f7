"""``sluice doctor``: find out why jobs are slow or stuck."""

import asyncio
import logging
import sys

import typer

from cli.doctor.examination import examine
from cli.exit_status import EXIT_FAILED, EXIT_USAGE, CommandError
from cli.options import DEFAULT_NATS_URL, DEFAULT_URL, Json, NatsUrl, Replicas, Url
from cli.output import print_findings, print_json
from shared.config import BrokerSettings, load
from shared.errors import SettingsError
from shared.logs import configure_logs


def doctor(
    context: typer.Context,
    url: Url = DEFAULT_URL,
    nats_url: NatsUrl = DEFAULT_NATS_URL,
    replicas: Replicas = 1,
    as_json: Json = False,
) -> None:
    """Find out why jobs are slow or stuck, and what to do. Exit status 1 if there are errors.

    If only the gateway's URL is given, the broker is not examined."""
    # Errors of the connection are among the findings.
    configure_logs("sluice", stream=sys.stderr, level=logging.CRITICAL)
    try:
        settings = load(BrokerSettings, "NATS", {"NATS_URL": nats_url})
    except SettingsError as error:
        raise CommandError(str(error), EXIT_USAGE) from None
    # The broker of a gateway elsewhere is not the one at the default address.
    is_broker_known = _is_given(context, "nats_url") or not _is_given(context, "url")
    findings = asyncio.run(
        examine(settings if is_broker_known else None, url.rstrip("/"), replicas)
    )
    print_json({"findings": findings}) if as_json else print_findings(findings)
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the option was set on the command line or in the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
