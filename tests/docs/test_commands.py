"""The documentation: what readers are told to type works, and shows what the pages show."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import PAGES, Command, commands_of, shows
from tests.docs.not_run import NOT_RUN, why_not_run
from tests.docs.shell import ENDLESS, Shell
from tests.docs.stages import PLACEHOLDERS, STAGES, files
from tests.support.hub import Hub, hub_environment
from tests.support.processes import ROOT

COMMANDS = {page: list(commands_of(page)) for page in PAGES}
RUN = {
    page: [one for one in commands if why_not_run(one.page, one.text) is None]
    for page, commands in COMMANDS.items()
}
REAL_MODEL = {"docs/how-to/tools.md", "examples/median_prices/README.md"}
"""Pages whose commands need answers that make sense."""
REFUSAL = "Nats-Service-Error"


@pytest.fixture
def shell(
    page: Path, tmp_path: Path, tiny_model: Path, smollm2: Path, nats_command: str
) -> Iterator[Shell]:
    """A reader's, at the beginning of ``page``."""
    model = smollm2 if str(page.relative_to(ROOT)) in REAL_MODEL else tiny_model
    with Hub() as hub:
        files(tmp_path, tiny_model, hub)
        environment = hub_environment(tmp_path / "hub", hub.url)
        with Shell(tmp_path, model, environment) as running:
            yield running


@pytest.mark.timeout(600)
def test_output_is_compared_whatever_the_time_is() -> None:
    shown = ["queued at  2026-11-25T02:42:54.107348Z, 3 s ago"]
    assert shows("queued at  2026-11-28T10:20:09.447936Z, 12 s ago", shown)
    assert not shows("queued at  2026-11-28T10:20:09.447936Z, just now", shown)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if RUN[page]],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_of_a_page(page: Path, shell: Shell) -> None:
    """In their order, as one reader types them."""
    names: dict[str, Any] = {}
    staged: str | None = None
    for command in RUN[page]:
        for (where, part), stage in STAGES.items():
            if where == command.page and command.has(part):
                if shell.stack is None:
                    shell.start_stack("sluice up")
                staged = stage(shell)
                shell.set(id=staged)
        if command.language == "python":
            _run_program(shell, command, names)
        else:
            _run(shell, command, staged)


def test_every_reason_not_to_run_a_block_is_needed() -> None:
    """No entry of the list is left when its commands are gone."""
    used = {why_not_run(one.page, one.text) for commands in COMMANDS.values() for one in commands}
    assert used - {None} == set(NOT_RUN)


def test_every_stage_is_needed() -> None:
    for where, part in STAGES:
        assert any(
            one.page == where and one.has(part) for commands in RUN.values() for one in commands
        ), (where, part)


def _run_program(shell: Shell, command: Command, names: dict[str, Any]) -> None:
    """Programs of one page continue each other."""
    if shell.stack is None:
        shell.start_stack("sluice up")
    exec(compile(shell.with_addresses(command.text), command.page, "exec"), names)


def _run(shell: Shell, command: Command, staged: str | None) -> None:
    """It shows what the page shows; where that is nothing, it does not fail."""
    text = command.text
    if staged is not None:
        for placeholder in PLACEHOLDERS:
            text = text.replace(placeholder, staged)
    output, status = shell.run(text, command.shown)
    if command.shown:
        assert shows(output, command.shown), f"$ {text}\n{output}\nis not\n" + "\n".join(
            command.shown
        )
    elif not ENDLESS.search(text):
        assert status == 0, f"$ {text}\n{output}"
    assert REFUSAL not in output, f"$ {text}\n{output}"
