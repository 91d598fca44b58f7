"""Examines the gateway: whether it is ready, and whether its queues have room."""

from collections.abc import Iterator
from typing import Any

import httpx2
import msgspec

from cli.doctor.finding import Finding, error, ok
from cli.proxy import proxy_for, via_proxy
from shared.wire.api import QueueReport

TIMEOUT_S = 3.0

NO_GATEWAY = "start one (sluice up, or python -m services.gateway), or name another with --url"


async def examine_gateway(url: str) -> tuple[list[Finding], str | None]:
    """The findings, and the gateway's version if it responds.

    Raises:
        CommandError: the URL of the proxy in the environment cannot be used.
    """
    try:
        proxy = proxy_for(httpx2.URL(url))
        async with httpx2.AsyncClient(
            base_url=url,
            timeout=TIMEOUT_S,
            proxy=proxy,
            verify=httpx2.create_ssl_context(),
            trust_env=False,
        ) as client:
            health = await client.get("/healthz")
            ready = await client.get("/readyz")
            queue = await client.get("/queue")
    except httpx2.InvalidURL:
        return [error("gateway", f"{url} is not a URL", NO_GATEWAY)], None
    except httpx2.HTTPError:
        found = f"no answer at {url}{via_proxy(proxy, httpx2.URL(url).host)}"
        return [error("gateway", found, NO_GATEWAY)], None
    try:
        version = msgspec.json.decode(health.content, type=dict[str, str])["version"]
        if 503 in (ready.status_code, queue.status_code):
            refusal = next(answer for answer in (ready, queue) if answer.status_code == 503)
            why = msgspec.json.decode(refusal.content, type=dict[str, Any])["detail"]
            advice = "its log says what it is waiting for"
            return [error("gateway", f"not ready at {url}: {why}", advice)], version
        report = msgspec.json.decode(queue.content, type=QueueReport)
    except (msgspec.DecodeError, KeyError):
        return [error("gateway", f"the server at {url} is not a Sluice gateway", NO_GATEWAY)], None
    return [ok("gateway", f"ready at {url}"), *_full(report)], version


def _full(report: QueueReport) -> Iterator[Finding]:
    for model in report.models:
        if model.waiting >= model.max_waiting > 0:
            yield error(
                model.model,
                f"the queue is full: {model.waiting} waiting, the limit is {model.max_waiting}; "
                "new jobs are refused with 429 until it drains",
                "add inferers, or raise GATEWAY_MAX_WAITING",
            )
