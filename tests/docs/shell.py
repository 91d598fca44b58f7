"""The shell of a reader who follows a page: in a clone, with a stack of its own."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import termios
import time
from pathlib import Path
from typing import Self

from tests.docs.blocks import shows
from tests.support.processes import (
    PATIENCE_S,
    ROOT,
    Child,
    eventually,
    scripts,
)

PROMPT = re.compile("\x1e(\\d+)\x1e")
READY = re.compile(r"^ready (\S+) (\S+)$", re.MULTILINE)
GATEWAY = "http://127.0.0.1:5001"
BROKER = re.compile(r"nats://[\w.-]+:4222")
STARTS_STACK = re.compile(r"\bsluice up\b|^make up\b")
STARTS_INFERER = re.compile(r"-m services\.inferer\b")
ENDLESS = re.compile(r"\bsluice top\b|\bnats kv watch\b|\bnats events\b|\bnats stream view\b")
"""Until Ctrl-C, or a key that asks for the next page."""
KILLS_INFERERS = "pkill -9 -f services.inferer"
FAILS_ON_REFUSAL = 'curl() { command curl --silent --show-error --fail-with-body "$@"; }'
SHARED = {".git", "data"}
"""Not in the reader's clone."""


class Shell:
    """An interactive bash on a terminal. ``sluice up`` and inferers run beside it, as in other
    terminals: on free ports, which take the place of 5001 and 4222 in all commands, and with
    ``model`` as ``smollm2`` where a command names no other."""

    def __init__(self, folder: Path, model: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.model = model
        for entry in ROOT.iterdir():
            if entry.name not in SHARED:
                (folder / entry.name).symlink_to(entry)
        path = os.pathsep.join((str(scripts()), os.environ["PATH"], str(Path.home() / "go/bin")))
        # Where `make` runs the tests, another one would print that it is inside of it.
        outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        self.environment = {
            **{name: value for name, value in environment.items() if name not in outer},
            "PATH": path,
            "HOME": str(folder),
            "INFERER_THREADS": "1",
        }
        self.url = self.nats_url = self._received = ""
        self.stack: Child | None = None
        self._beside: list[Child] = []
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bash.kill()
        self._bash.wait()
        os.close(self._terminal)
        for child in reversed(self._beside):
            _end(child)

    def run(self, command: str, until_shown: list[str] | None = None) -> tuple[str, int]:
        """The output and the exit status of ``command``. One that never ends is killed
        once its output shows ``until_shown``, or anything at all."""
        if STARTS_STACK.search(command):
            return self.start_stack(command), 0
        if self.stack is None:
            self.start_stack("sluice up")
        if STARTS_INFERER.search(command):
            return self._start_inferer(command), 0
        if command == KILLS_INFERERS:
            self._kill_inferers()
            return "", 0
        self._write(self.with_addresses(command) + "\n")
        if ENDLESS.search(command):
            wanted = until_shown or []
            eventually(
                lambda: self._read().strip() != "" and shows(self._received, wanted),
                f"{command} shows {wanted}:\n{self._received}",
            )
            # A program that asks for a key reads Ctrl-C as one.
            os.killpg(os.tcgetpgrp(self._terminal), signal.SIGKILL)
        eventually(lambda: PROMPT.search(self._read()), f"the end of {command}:\n{self._received}")
        output, status, _ = PROMPT.split(self._received, maxsplit=1)
        self._received = ""
        return output, int(status)

    def with_addresses(self, text: str) -> str:
        """``text`` with those of the stack that runs."""
        return BROKER.sub(self.nats_url, text.replace(GATEWAY, self.url))

    def set(self, **variables: str) -> None:
        self.run("export " + " ".join(f"{name}={value}" for name, value in variables.items()))

    def start_stack(self, command: str) -> str:
        """In place of the one that runs, which is ended."""
        self.end_stack()
        if command.startswith("make"):
            asked = ["make", "--dry-run", *command.split()[1:]]
            recipe = subprocess.check_output(
                asked, cwd=self.folder, env=self.environment, text=True
            )
            command = recipe.splitlines()[-1]
        command += " --port 0 --nats-port 0"
        if "--model" not in command:
            command += f" --model smollm2={self.model}"
        self.stack = self._start(command)
        ready = self._logged(self.stack, READY)
        self.url, self.nats_url = ready.groups()
        self.set(SLUICE_URL=self.url, NATS_URL=self.nats_url)
        return self.stack.output()

    def end_stack(self) -> None:
        """And the inferers that were started for it. Another one is started only by a command."""
        for child in reversed(self._beside):
            _end(child)
        self._beside.clear()

    def _start_inferer(self, command: str) -> str:
        own = f"NATS_URL={self.nats_url} INFERER_ID=another INFERER_ALIAS=smollm2"
        command = self.with_addresses(command).replace("INFERER_MODEL=smollm2 ", "")
        child = self._start(f"{own} INFERER_MODEL={self.model} {command}")
        self._logged(child, re.compile('"event": "inferer_ready"'))
        return child.output()

    def _start(self, command: str) -> Child:
        log = self.folder / f"beside-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                ["bash", "-c", f"exec env {command}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._beside.append(Child(child, log))
        return self._beside[-1]

    def _logged(self, child: Child, pattern: re.Pattern[str]) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            assert child.popen.poll() is None, child.output()
            return pattern.search(child.output())

        return eventually(found, f"{pattern.pattern} in\n{child.output()}")

    def _kill_inferers(self) -> None:
        """Those of this stack alone; a page's ``pkill`` means all on the machine."""
        assert self.stack is not None
        for pid in _descendants(self.stack.popen.pid):
            if b"services.inferer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    def _open(self) -> None:
        self._terminal, theirs = pty.openpty()
        os.set_blocking(self._terminal, False)
        termios.tcsetwinsize(theirs, (50, 200))
        attributes = termios.tcgetattr(theirs)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)

        def take_over() -> None:
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # this test may ignore it

        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "--noediting", "+H", "-i"],
            cwd=self.folder,
            env={**self.environment, "PS1": "\x1e$?\x1e", "PS2": "", "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_over,
        )
        os.close(theirs)
        self._received = ""
        eventually(lambda: PROMPT.search(self._read()), "a prompt")
        self._received = ""
        self._write(FAILS_ON_REFUSAL + "\n")
        eventually(lambda: PROMPT.search(self._read()), "a prompt")
        self._received = ""

    def _write(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def _read(self) -> str:
        """All that was written since the last prompt."""
        try:
            while True:
                self._received += os.read(self._terminal, 65536).decode(errors="replace")
        except OSError:  # nothing more now
            return self._received


def _end(child: Child) -> None:
    child.popen.terminate()
    child.popen.wait(PATIENCE_S)


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        children = Path(f"/proc/{one}/task").glob("*/children")
        found += [int(child) for file in children for child in file.read_text().split()]
    return found[1:]
