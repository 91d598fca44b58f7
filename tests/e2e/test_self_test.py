"""Before an inferer is ready it has computed: a library that dies is found out, and named.

The library is llama.cpp behind a shim that dies of a real signal, or hangs, when it computes.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.cpus import cpu_model
from tests.support.doctor import examine
from tests.support.processes import Process, Stack, eventually
from tests.support.shim import (
    DIES_AT_DECODE,
    DIES_AT_LOAD,
    HANGS_AT_DECODE,
    only_with_extra_buffers,
    write_shim,
)
from tests.support.up import Up


class Machine:
    """A stack whose inferers find ``library`` and keep what they found out in a folder of the
    test's own."""

    def __init__(self, stack: Stack, model: Path, folder: Path) -> None:
        self.stack = stack
        self.model = model
        self.folder = folder
        self.cache = folder / "cache"

    def start(self, source: str | None = None, **environment: str) -> Process:
        """An inferer; with ``source`` on a library of that code."""
        if source is not None:
            library = self.folder / "library"
            if not library.exists():
                write_shim(library, source)
            environment["LLAMA_CPP_LIB_PATH"] = str(library)
        return self.stack.start_inferer(
            self.model, **{"XDG_CACHE_HOME": str(self.cache), **environment}
        )

    def answers(self) -> bool:
        job_id = self.stack.submit(prompt="hi", max_tokens=3)
        return bool(self.stack.wait_for_end(job_id)["state"] == "SUCCESS")


@pytest.fixture
def machine(tiny_model: Path, tmp_path: Path) -> Iterator[Machine]:
    with Stack(tmp_path / "stack") as stack:
        stack.start_gateway()
        yield Machine(stack, tiny_model, tmp_path)


def test_a_sound_library_passes(machine: Machine) -> None:
    """A sound library passes once, and is not asked again: what passed is remembered."""
    machine.start().wait_for("self_test_passed")
    machine.stack.wait_until_served("tiny")
    second = machine.start()
    second.wait_for("inferer_ready")
    assert second.events("self_test_passed") == []
    other_settings = machine.start(INFERER_N_BATCH="64")
    other_settings.wait_for("inferer_ready")
    assert len(other_settings.events("self_test_passed")) == 1


def test_another_library_is_tested_again(machine: Machine) -> None:
    """What one library can says nothing of another, with the same model and settings."""
    machine.start().wait_for("inferer_ready")
    dies = machine.start(DIES_AT_DECODE)
    assert dies.wait() == 2


def test_a_library_that_dies_with_extra_buffers_runs_without(machine: Machine) -> None:
    """As on a CPU with AMX whose code was compiled wrongly: the inferer serves all the same, says
    once what died, of what, where, and what to do; and says so again after a restart."""
    for number in (1, 2):
        inferer = machine.start(only_with_extra_buffers("die(SIGSEGV);"))
        why = inferer.wait_for("computing_without_extra_buffers")["why"]
        assert "died of signal 11 (SIGSEGV) at its first computation" in why
        assert cpu_model() in why
        assert "docs/compiling.md" in why
        machine.stack.wait_until_served("tiny")
        assert machine.answers()
        # Both write to one log.
        assert len(inferer.events("computing_without_extra_buffers")) == number
        assert len(inferer.events("self_test_passed")) == 1
        assert inferer.terminate() == 0
        machine.stack.inferers.clear()


def test_doctor_says_why_it_is_slow(machine: Machine) -> None:
    """With the CPU, what llama.cpp uses of it, and what the self-test found."""
    machine.start(only_with_extra_buffers("die(SIGILL);"))
    machine.stack.wait_until_served("tiny")
    (finding,) = examine(machine.stack)["inferer inferer-0"]
    assert finding["severity"] == "warning"
    assert cpu_model() in finding["found"]
    assert "SIGILL" in finding["found"]


def test_a_library_that_hangs_with_extra_buffers_runs_without(machine: Machine) -> None:
    """A computation that never ends is ended."""
    inferer = machine.start(only_with_extra_buffers("for (;;) sleep(1);"), INFERER_STALL_S="5")
    why = inferer.wait_for("computing_without_extra_buffers")["why"]
    assert "hung at its first computation" in why
    machine.stack.wait_until_served("tiny")
    assert machine.answers()


def test_a_failure_that_may_pass_is_not_recorded(machine: Machine) -> None:
    """A kill from outside, as by the kernel when memory is short, says nothing of the next start;
    a crash does."""
    enough_memory = machine.folder / "enough memory"
    source = only_with_extra_buffers(
        f'if (access("{enough_memory}", F_OK) != 0) kill(getpid(), SIGKILL);'
    )
    inferer = machine.start(source)
    why = inferer.wait_for("computing_without_extra_buffers")["why"]
    assert "died of signal 9 (SIGKILL) at its first computation" in why
    enough_memory.touch()
    again = machine.start(source)
    again.wait_for("inferer_ready")
    assert not again.events("computing_without_extra_buffers")


@pytest.mark.parametrize(
    ("source", "how"),
    [
        (DIES_AT_DECODE, "died of signal 11 (SIGSEGV) at its first computation"),
        (DIES_AT_LOAD, "died of signal 4 (SIGILL) while it loaded the model"),
        (HANGS_AT_DECODE, "hung at its first computation"),
    ],
    ids=["dies", "dies at load", "hangs"],
)
def test_a_library_that_cannot_compute_ends_the_start_with_one_line(
    machine: Machine, source: str, how: str
) -> None:
    """Status 2: starting it again would end the same way."""
    inferer = machine.start(source, INFERER_STALL_S="5")
    assert inferer.wait() == 2
    (line,) = [one for one in inferer.output().splitlines() if not one.startswith("{")]
    assert line.startswith(f"inferer: llama.cpp {how}")
    assert cpu_model() in line
    assert "docs/compiling.md" in line


def test_sluice_up_ends_with_a_library_that_cannot_compute(
    tiny_model: Path, tmp_path: Path
) -> None:
    """It does not restart for ever what cannot compute, and says why."""
    library = write_shim(tmp_path / "library", DIES_AT_DECODE)
    cache = str(tmp_path / "cache")
    up = Up(tmp_path / "data", tiny_model, LLAMA_CPP_LIB_PATH=str(library), XDG_CACHE_HOME=cache)
    try:
        eventually(lambda: up.popen.poll() is not None, "sluice up has ended")
        assert up.popen.returncode == 2
        assert "llama.cpp died of signal 11 (SIGSEGV) at its first computation" in up.stderr
        assert len(up.starts_of("inferer-1")) == 1
    finally:
        up.end()


def test_an_inferer_starts_although_nothing_can_be_recorded(machine: Machine) -> None:
    """On a file system that cannot be written: it is found out at each start, and serves."""
    for _ in range(2):
        inferer = machine.start(XDG_CACHE_HOME="/proc/no-such-folder")
        inferer.wait_for("inferer_ready")
        assert len(inferer.events("self_test_passed")) == 1


def test_a_broken_record_is_written_anew(machine: Machine) -> None:
    """Half a file, or that of another version, is ignored."""
    machine.start().wait_for("inferer_ready")
    (record,) = (machine.cache / "sluice" / "self-tests").iterdir()
    record.write_bytes(b'{"extra_buffers": ')
    inferer = machine.start()
    inferer.wait_for("inferer_ready")
    assert len(inferer.events("self_test_passed")) == 1
