"""Whether each model's consumers are there, and set as they should be."""

from collections.abc import Iterator
from typing import Any

import msgspec

from cli.doctor.finding import Finding, ok, wrong
from shared.broker.connection import REQUEST_TIMEOUT_S, Broker, unavailable_on_outage
from shared.broker.consumers import GroupedConsumerConfig, class_of, consumer, list_consumers
from shared.errors import BrokerUnavailable
from shared.wire import subjects

ABOUT = "consumers"

LEFT_TO_THE_BROKER = {"name", "num_replicas", "metadata", "description", "pause_until"}
"""Settings that it fills in, or that change nothing for a job; whether it pauses is asked apart."""


async def examine_consumers(broker: Broker, ack_wait_s: float, served: set[str]) -> list[Finding]:
    """Those of every model that has one, and of the ``served``, which should have theirs.

    Raises:
        BrokerUnavailable: no answer.
    """
    findings: list[Finding] = []
    with unavailable_on_outage(broker):
        models = set(served)
        for info in await list_consumers(broker):
            if class_of(info) is None:
                findings.append(_foreign(info.name))
            else:
                models.add(subjects.parse_consumer(info.name)[0])
        for model in sorted(models):
            for job_class in subjects.CLASSES:
                name = subjects.consumer(model, job_class)
                held = await _read(broker, name)
                findings += _one(model, job_class, ack_wait_s, held)
    return findings or [ok(ABOUT, "as they should be")]


def _one(
    model: str, job_class: str, ack_wait_s: float, held: dict[str, Any] | None
) -> Iterator[Finding]:
    name = subjects.consumer(model, job_class)
    if held is None:
        yield wrong(
            ABOUT,
            f"{name}: missing, so {job_class} jobs of {model} wait for ever",
            "a gateway makes it within seconds: is one running? Or run: sluice topology apply "
            f"--model {model}",
        )
        return
    if held.get("paused"):
        yield wrong(
            ABOUT,
            f"{name}: paused until {held['config']['pause_until']}",
            f"run: nats consumer resume {subjects.REQUESTS} {name}",
        )
    # The limit is looked at with the inferers that it follows from.
    limit = held["config"].get("max_ack_pending", 1)
    wanted = consumer(model, job_class, ack_wait_s, limit, None)
    if differences := _differences(wanted, held["config"]):
        told = f"{name}: " + "; ".join(differences)
        yield wrong(ABOUT, told, "run: sluice topology apply")


def _foreign(name: str) -> Finding:
    return wrong(
        ABOUT,
        f"{name}: not Sluice's; it takes jobs that no inferer sees",
        f"run: nats consumer rm {subjects.REQUESTS} {name}",
    )


async def _read(broker: Broker, name: str) -> dict[str, Any] | None:
    """All that the broker says of a consumer, None if there is none; the client leaves out what
    it does not know."""
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


def _differences(wanted: GroupedConsumerConfig, held: dict[str, Any]) -> list[str]:
    """What is set otherwise than wanted, or beyond it."""
    wants = wanted.as_dict()
    differences = []
    for name in sorted((wants.keys() | held.keys()) - LEFT_TO_THE_BROKER):
        should_be, is_now = (_plain(name, config.get(name)) for config in (wants, held))
        if should_be != is_now:
            differences.append(f"{name} is {is_now}, should be {should_be}")
    return differences


def _plain(name: str, value: Any) -> str:
    if not value:
        return "unset"  # by whatever word
    if name == "ack_wait":
        return f"{value / 1e9:g} s"
    return str(getattr(value, "value", value))
