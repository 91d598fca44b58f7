"""Examines the consumers of each model: whether they exist and are configured correctly."""

from collections.abc import Iterator
from typing import Any

import msgspec

from cli.doctor.finding import Finding, error, ok
from shared.broker.connection import REQUEST_TIMEOUT_S, Broker, unavailable_on_outage
from shared.broker.consumers import (
    GroupedConsumerConfig,
    consumer,
    list_consumers,
    priority_of_consumer,
)
from shared.errors import BrokerUnavailable
from shared.wire import subjects

ABOUT = "consumers"

IGNORED_SETTINGS = {"name", "num_replicas", "metadata", "description", "pause_until"}
"""Settings that the broker fills in, or that do not affect jobs. A pause is checked separately."""


async def examine_consumers(broker: Broker, ack_wait_s: float, served: set[str]) -> list[Finding]:
    """Examine the consumers of every model that has one, and of the ``served`` models.

    Raises:
        BrokerUnavailable: no answer.
    """
    findings: list[Finding] = []
    with unavailable_on_outage(broker):
        models = set(served)
        for info in await list_consumers(broker):
            if priority_of_consumer(info) is None:
                findings.append(_foreign(info.name))
            else:
                models.add(subjects.parse_consumer(info.name)[0])
        for model in sorted(models):
            for priority in subjects.PRIORITIES:
                name = subjects.consumer(model, priority)
                actual = await _read(broker, name)
                findings += _examine(model, priority, ack_wait_s, actual)
    return findings or [ok(ABOUT, "complete and configured correctly")]


def _examine(
    model: str, priority: str, ack_wait_s: float, actual: dict[str, Any] | None
) -> Iterator[Finding]:
    name = subjects.consumer(model, priority)
    if actual is None:
        yield error(
            ABOUT,
            f"{name}: missing, so {priority} jobs of {model} wait forever",
            "a gateway creates it within seconds: is one running? Or run: sluice topology apply "
            f"--model {model}",
        )
        return
    if actual.get("paused"):
        yield error(
            ABOUT,
            f"{name}: paused until {actual['config']['pause_until']}",
            f"run: nats consumer resume {subjects.REQUESTS} {name}",
        )
    # The limit is examined together with the inferers that determine it.
    limit = actual["config"].get("max_ack_pending", 1)
    wanted = consumer(model, priority, ack_wait_s, limit, None)
    if differences := _differences(wanted, actual["config"]):
        found = f"{name}: " + "; ".join(differences)
        yield error(ABOUT, found, "run: sluice topology apply")


def _foreign(name: str) -> Finding:
    return error(
        ABOUT,
        f"{name}: not Sluice's; jobs delivered to it reach no inferer",
        f"run: nats consumer rm {subjects.REQUESTS} {name}",
    )


async def _read(broker: Broker, name: str) -> dict[str, Any] | None:
    """The broker's full report on a consumer, None if it does not exist. nats-py would drop fields
    that it does not know."""
    answer = await broker.nc.request(
        f"$JS.API.CONSUMER.INFO.{subjects.REQUESTS}.{name}", timeout=REQUEST_TIMEOUT_S
    )
    info: dict[str, Any] = msgspec.json.decode(answer.data)
    error = info.get("error")
    if error is None:
        return info
    if error.get("code") == 404:
        return None
    raise BrokerUnavailable(f"the broker could not report on the consumer {name}: {error}")


def _differences(wanted: GroupedConsumerConfig, actual: dict[str, Any]) -> list[str]:
    """The settings that differ from ``wanted``."""
    wants = wanted.as_dict()
    differences = []
    for name in sorted((wants.keys() | actual.keys()) - IGNORED_SETTINGS):
        should_be, is_now = (_plain(name, config.get(name)) for config in (wants, actual))
        if should_be != is_now:
            differences.append(f"{name} is {is_now}, should be {should_be}")
    return differences


def _plain(name: str, value: Any) -> str:
    if not value:
        return "unset"  # None, 0, "" or an empty list
    if name == "ack_wait":
        return f"{value / 1e9:g} s"
    return str(getattr(value, "value", value))
