"""A process that computes for `sluice bench`: `services/inferer/engine/speed_test.py`."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from cli.exit_status import EXIT_FAILED, CommandError
from cli.up.child import ROOT
from shared.process.exit_status import describe_exit
from shared.process.parent_death import die_with_parent
from shared.speed_test import Done, Failed, Jobs, Ready, Reply, Subject

MODULE = "services.inferer.engine.speed_test"

_decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


class NotMeasured(Exception):
    """The process reports an error, with a code of `shared/errors.py`."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.code = failed.code


class SpeedTest:
    """The process. It ends with the block, and with this process however that ends."""

    def __init__(
        self, name: str, model: Path, subject: Subject, cpus: Sequence[int] | None
    ) -> None:
        """Start it; ``name`` is for errors. ``cpus`` are those it may use; None means all."""
        self._name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the block
        environment = {**os.environ, "INFERER_MODEL": str(model)}
        if cpus is not None:
            environment["INFERER_THREADS"] = ""  # as many as it has CPUs
        ends_with_parent = die_with_parent(signal.SIGKILL)

        def set_up() -> None:
            ends_with_parent()
            if cpus is not None:
                os.sched_setaffinity(0, cpus)

        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, msgspec.json.encode(subject).decode()],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for this process, which ends the other
            preexec_fn=set_up,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ready(self) -> Ready:
        """Wait until its model is loaded. Raises: NotMeasured, CommandError: it died."""
        reply = self._reply()
        assert isinstance(reply, Ready)
        return reply

    def start(self, jobs: Jobs) -> None:
        """Have it run ``jobs``."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died: `done` says so
            self._process.stdin.write(msgspec.json.encode(jobs) + b"\n")
            self._process.stdin.flush()

    def done(self) -> Done:
        """Wait until the jobs have ended. Raises: NotMeasured, CommandError: it died."""
        reply = self._reply()
        assert isinstance(reply, Done)
        return reply

    def _reply(self) -> Ready | Done:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CommandError(self._cause_of_death(), EXIT_FAILED)
        reply = _decoder.decode(line)
        if isinstance(reply, Failed):
            raise NotMeasured(reply)
        return reply

    def _cause_of_death(self) -> str:
        how = describe_exit(self._process.wait())
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        last = f" ({lines[-1].strip()})" if lines and not lines[-1].startswith("{") else ""
        return (
            f"the process that measured {self._name} died of {how}{last}; "
            'see "An inferer dies" in docs/troubleshooting.md'
        )
