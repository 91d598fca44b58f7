"""The how-to about the command `nats`: each command on the page is run, and shows what it says."""

import asyncio
import os
import pty
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nats
import pytest

from tests.support.processes import PATIENCE_S, ROOT, Stack, eventually

PAGE = ROOT / "docs/how-to/nats-cli.md"
LEFT_OUT = "…"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
VARIABLE = re.compile(
    r"[0-9a-f]{8}-[0-9a-f-]{27}"  # an id of a job
    r"|\b[A-Za-z0-9]{22}\b"  # of a service
    r"|never|(?<![A-Za-z])\d[\d.,:]*(?:\s?(?:[KMG]i)?B\b|[µmn]?s\b)?"
)


def _examples() -> list[tuple[str, list[str]]]:
    """Each command of the page, with the lines that follow it."""
    found: list[tuple[str, list[str]]] = []
    for block in BLOCK.findall(PAGE.read_text()):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line.removeprefix("$ "), []))
            else:
                found[-1][1].append(line)
    return found


EXAMPLES = _examples()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """As the page says; some jobs have run."""
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        stack.start_gateway()
        stack.start_inferer(tiny_model, INFERER_ALIAS="smollm2", INFERER_ID="inferer-1")
        stack.wait_until_served("smollm2")
        stack.wait_for_end(stack.submit(prompt="hi", max_tokens=3))
        yield stack


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_a_command_shows_what_the_page_shows(
    served: Stack, nats_command: str, command: str, shown: list[str]
) -> None:
    """All lines of the page, in this order; numbers, times and ids differ."""
    program, *arguments = shlex.split(command)
    assert program == "nats"
    wanted = [line for line in shown if line != LEFT_OUT]
    assert wanted
    with _running(nats_command, "-s", served.nats.url, *arguments) as output:
        eventually(lambda: _shows(output(), wanted), f"{command} shows {wanted}")


def test_the_page_has_every_command_that_operators_use() -> None:
    """None is forgotten."""
    commands = [command for command, _ in EXAMPLES]
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


@contextmanager
def _running(*command: str) -> Iterator[Any]:
    """The command at a terminal, which some need. Yields a function that returns its output so
    far."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    received = b""

    def output() -> str:
        nonlocal received
        try:
            while True:
                received += os.read(ours, 65536)
        except OSError:  # nothing more now, or for ever
            return received.decode("utf-8", "replace")

    try:
        yield output
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _shows(output: str, wanted: list[str]) -> bool:
    lines = iter([_comparable(line) for line in ESCAPE.sub("", output).splitlines()])
    return all(any(_is_like(line, _comparable(one)) for line in lines) for one in wanted)


def _is_like(line: str, wanted: str) -> bool:
    if wanted.endswith(LEFT_OUT):
        return line.startswith(wanted.removesuffix(LEFT_OUT))
    return line == wanted


def _comparable(line: str) -> str:
    """``line`` without what differs from run to run: numbers, times, ids, and the width of
    columns."""
    line = VARIABLE.sub("0", line)
    return re.sub(r"─+", "─", " ".join(line.split()))
