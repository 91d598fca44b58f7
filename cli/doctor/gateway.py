"""What the gateway itself has to say: whether it serves, and whether its queues take more."""

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

from cli.doctor.finding import Finding, ok, wrong
from cli.proxy import proxy_for, through
from shared.wire.api import QueueReport

TIMEOUT_S = 3.0

NO_GATEWAY = "start one (sluice up, or python -m services.gateway), or name another with --url"


async def examine_gateway(url: str) -> tuple[list[Finding], str | None]:
    """The findings, and the gateway's version if one answers.

    Raises:
        CommandError: the gateway is behind a proxy that cannot be used.
    """
    try:
        proxy = proxy_for(httpx.URL(url))
        async with httpx.AsyncClient(
            base_url=url,
            timeout=TIMEOUT_S,
            proxy=proxy,
            verify=httpx.create_ssl_context(),
            trust_env=False,
        ) as client:
            health = await client.get("/healthz")
            ready = await client.get("/readyz")
            queue = await client.get("/queue")
    except httpx.InvalidURL:
        return [wrong("gateway", f"{url} is not a URL", NO_GATEWAY)], None
    except httpx.HTTPError:
        told = f"no answer at {url}{through(proxy, httpx.URL(url).host)}"
        return [wrong("gateway", told, NO_GATEWAY)], None
    try:
        version = msgspec.json.decode(health.content, type=dict[str, str])["version"]
        if 503 in (ready.status_code, queue.status_code):
            refusal = next(answer for answer in (ready, queue) if answer.status_code == 503)
            why = msgspec.json.decode(refusal.content, type=dict[str, Any])["detail"]
            told = "its log says what it is waiting for"
            return [wrong("gateway", f"not ready at {url}: {why}", told)], version
        report = msgspec.json.decode(queue.content, type=QueueReport)
    except (msgspec.DecodeError, KeyError):
        return [
            wrong("gateway", f"what answers at {url} is not a Sluice gateway", NO_GATEWAY)
        ], None
    return [ok("gateway", f"ready at {url}"), *_full(report)], version


def _full(report: QueueReport) -> Iterator[Finding]:
    for model in report.models:
        if model.waiting >= model.max_waiting > 0:
            yield wrong(
                model.model,
                f"the queue is full: {model.waiting} wait, the bound is {model.max_waiting}; new "
                "jobs are refused with 429 until it drains",
                "add inferers, or raise GATEWAY_MAX_WAITING",
            )
