"""The limit of open streams: a request that is refused there has left no job behind."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.processes import Stack, eventually

HI = [{"role": "user", "content": "hi"}]
AT_ONCE = 20
LIMIT = 3


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """A gateway that opens few streams."""
    with Stack(tmp_path_factory.mktemp("narrow")) as stack:
        stack.start_gateway(GATEWAY_MODELS="tiny", GATEWAY_MAX_STREAMS=str(LIMIT))
        stack.start_inferer(tiny_model)
        stack.wait_until_served("tiny")
        yield stack


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("chat/completions", {"messages": HI}),
        ("completions", {"prompt": ["one", "two"]}),
        ("responses", {"input": "hi"}),
        ("responses", {"input": "hi", "background": True}),
    ],
    ids=str,
)
def test_a_stream_beyond_the_limit_is_refused_before_its_job_is_accepted(
    narrow: Stack, route: str, body: dict[str, Any]
) -> None:
    """Its client got no id to cancel it with. Those that end make room."""
    mark = f"{route} {body}"[:60]

    async def send() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=narrow.url, timeout=60) as client:
            sent = {"model": "tiny", "max_tokens": 200, "stream": True, **body}
            sent["metadata"] = {"mark": mark}
            if route == "responses":
                sent["max_output_tokens"] = sent.pop("max_tokens")
            posts = (client.post(f"/v1/{route}", json=sent) for _ in range(AT_ONCE))
            return await asyncio.gather(*posts)

    answers = asyncio.run(send())
    served = [answer for answer in answers if answer.status_code == 200]
    assert LIMIT <= len(served) < AT_ONCE
    for answer in answers:
        if answer not in served:
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "too_many_streams"
            assert "retry-after" in answer.headers
    expected = len(served) * len(body.get("prompt", ["one"]))

    def listed() -> int | None:
        """How many jobs, once all that must be there are."""
        page = narrow.http.get("/jobs", params={"metadata.mark": mark}).json()
        return page["total"] if page["total"] >= expected else None

    assert eventually(listed, "the jobs are listed") == expected
    eventually(lambda: asyncio.run(send())[0].status_code == 200, "there is room again")
