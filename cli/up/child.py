"""One child process of `sluice up`: kept running while it is wanted, stopped when asked."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cli.up.child_output import ChildOutput
from shared.logs import logger
from shared.process.exit_status import describe_exit
from shared.process.lifecycle import EXIT_CONFIGURATION
from shared.process.parent_death import die_with_parent
from shared.timestamps import timestamp

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
STEADY_S = 10.0
"""A child that lived so long starts with the first pause again."""
GIVE_UP_AFTER = 3
REFUSALS = 5
"""Starts in a row that ended sooner, before the stack has ever served: another ends likewise."""

ROOT = Path(__file__).resolve().parents[2]
"""Services run as modules from here."""

log = logger()


class Child:
    """Restarts its process with backoff while it is wanted, until `stop`."""

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        cpus: Sequence[int] | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Wanted once `start` is called.

        ``cpus`` are the numbers of those it may run on; None means all of ours. ``descriptors``
        are those of our open files that it keeps open, too.
        """
        self.name = name
        self._descriptors = descriptors
        self._cpus = cpus
        self.started_at = timestamp()
        """When its process was last started; before that, when this was made."""
        self.hopeless: str | None = None
        """Why it was given up: it would fail the same way again."""
        self._command = command
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._end_with_parent = die_with_parent(signal.SIGTERM)
        self._wanted = asyncio.Event()
        self._stopping = asyncio.Event()
        self._gives_up = True

    @property
    def is_wanted(self) -> bool:
        return self._wanted.is_set() and not self._stopping.is_set()

    @property
    def has_worked(self) -> bool:
        return not self._gives_up

    def start(self) -> None:
        """Have it run from now on."""
        self._wanted.set()

    def keep_trying(self) -> None:
        """From now on restart it whatever it says: it has worked once."""
        self._gives_up = False

    async def run(self) -> None:
        """Keep the process running while it is wanted.

        Returns after `stop`, or when starting it is hopeless.
        """
        pause_s = FIRST_PAUSE_S
        failures = 0
        while True:
            await self._wanted.wait()  # `stop` ends this, too
            if self._stopping.is_set():
                return
            started = time.monotonic()
            try:
                exit_status, last_words = await self._run_once()
            except (OSError, subprocess.SubprocessError) as error:
                why = f"{self._command[0]} cannot be run: {_reason(error, self._command[0])}"
                if self._gives_up:
                    self.hopeless = f"the {self.name} cannot start: {why}"
                    return
                log.warning("child_not_started", child=self.name, error=why, pause_s=pause_s)
            else:
                if not self.is_wanted:
                    pause_s, failures = FIRST_PAUSE_S, 0
                    continue
                if time.monotonic() - started > STEADY_S:
                    pause_s, failures = FIRST_PAUSE_S, 0
                failures += 1
                if self._gives_up and exit_status == EXIT_CONFIGURATION:
                    why = last_words or "its configuration is wrong"
                    self.hopeless = f"the {self.name} cannot start: {why}"
                    return
                if self._gives_up and failures >= GIVE_UP_AFTER:
                    self.hopeless = (
                        f"the {self.name} ended {failures} times as soon as it was started, the "
                        f"last time by {describe_exit(exit_status)}"
                        + (f"; it said: {last_words}" if last_words else "")
                    )
                    return
                if exit_status == EXIT_CONFIGURATION:
                    # It has worked, so what it misses may come back: a disk, the broker's streams.
                    pause_s = LONGEST_PAUSE_S
                    if failures >= REFUSALS:
                        self.hopeless = (
                            f"the {self.name} refused {failures} times to start again: "
                            f"{last_words or 'its configuration is wrong'}"
                        )
                        log.error("child_given_up", child=self.name, why=self.hopeless)
                        return
                log.warning(
                    "child_died",
                    child=self.name,
                    cause=describe_exit(exit_status),
                    exit_status=exit_status,
                    last_words=last_words,
                    pause_s=pause_s,
                )
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def restart(self, patience_s: float) -> None:
        """End the process as `stop` does; `run` starts it again."""
        await self._end(patience_s)

    async def rest(self, patience_s: float) -> None:
        """End the process as `stop` does; `start` brings it back."""
        self._wanted.clear()
        await self._end(patience_s)

    async def stop(self, patience_s: float) -> None:
        """End the process with SIGTERM, after ``patience_s`` with SIGKILL."""
        self._stopping.set()
        self._wanted.set()
        await self._end(patience_s)

    async def _end(self, patience_s: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(patience_s):
                await process.wait()
        except TimeoutError:
            log.warning("child_killed", child=self.name, after_s=patience_s)
            process.kill()
            await process.wait()

    async def _run_once(self) -> tuple[int, str]:
        """Start it and wait for its end: exit status and last words.

        Raises:
            OSError, SubprocessError: it cannot be started.
        """
        self.started_at = timestamp()
        with ChildOutput() as output:
            exit_status = await self._start(output)
        return exit_status, output.last_words

    async def _start(self, output: ChildOutput) -> int:
        # Logs of children go to stderr: stdout is for the line that says `ready`. In a session
        # of its own, Ctrl-C in the terminal reaches a child only through us, in our order.
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output.descriptor,
            stderr=output.descriptor,
            start_new_session=True,
            pass_fds=self._descriptors,
            preexec_fn=self._set_up,
        )
        log.info("child_started", child=self.name, pid=self._process.pid)
        if not self.is_wanted:
            self._process.terminate()  # who ended it could not see it yet
        return await self._process.wait()

    def _set_up(self) -> None:
        """In the child, before the command."""
        self._end_with_parent()
        if self._cpus is not None:
            os.sched_setaffinity(0, self._cpus)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass


def _reason(error: Exception, file: str) -> str:
    """Why it could not be executed."""
    if isinstance(error, FileNotFoundError) and Path(file).exists():
        return "the interpreter or the dynamic loader that it names does not exist"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error)
