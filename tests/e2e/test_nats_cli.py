"""The command `nats` for operators. The commands of its page are run by tests/docs."""

import asyncio
import subprocess
import time

import nats

from tests.docs.blocks import commands_of
from tests.support.processes import PATIENCE_S, ROOT, Stack

PAGE = ROOT / "docs/how-to/nats-cli.md"


def test_the_page_has_every_command_that_operators_use() -> None:
    """None is forgotten."""
    commands = [command.text for command in commands_of(PAGE)]
    for wanted in (
        *(f"stream {one}" for one in ("ls", "info", "report", "subjects", "view", "edit")),
        *(f"consumer {one}" for one in ("ls", "info", "report", "edit")),
        *(f"micro {one}" for one in ("ls", "info", "stats")),
        *(f"kv {one}" for one in ("ls", "get", "watch")),
        "events --js-advisory",
        "server check consumer",
        "server check stream",
    ):
        assert any(command.startswith(f"nats {wanted}") for command in commands), wanted


async def test_what_an_operator_adds_stays(stack: Stack, nats_command: str) -> None:
    """When gateways write the configuration anew, because the limit changes, because their own keys
    are gone, or because they start; and it is not taken for a difference."""
    connection = await nats.connect(stack.nats.url)
    jetstream = connection.jetstream()
    edited = {"io.nats.monitor.unprocessed-critical": "50", "team": "search"}
    options = [f"--metadata={key}={value}" for key, value in edited.items()]
    for edit in (["consumer", "edit", "REQUESTS", "tiny"], ["stream", "edit", "DEAD"]):
        command = [nats_command, "-s", stack.nats.url, *edit, *options, "-f"]
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)

    async def metadata() -> dict[str, str]:
        info = await jetstream.consumer_info("REQUESTS", "tiny")
        return _without_servers(info.config.metadata)

    give_up_at = time.monotonic() + PATIENCE_S
    while "sluice.facts" not in await metadata():
        assert time.monotonic() < give_up_at
    stack.http.put("/concurrency", json={"concurrency": 2}).raise_for_status()
    while (await jetstream.consumer_info("REQUESTS", "tiny")).config.max_ack_pending != 2:
        assert time.monotonic() < give_up_at
    stack.gateways[0].end()
    stack.start_gateway().wait_for("gateway_ready")
    assert not stack.gateways[1].events("topology_changed")
    after = await metadata()
    assert after.pop("sluice.facts")
    assert after == edited
    assert _without_servers((await jetstream.stream_info("DEAD")).config.metadata) == edited
    await connection.close()


def _without_servers(metadata: dict[str, str] | None) -> dict[str, str]:
    return {key: value for key, value in (metadata or {}).items() if not key.startswith("_nats.")}
