"""A child process of `sluice up`: restarted while it is wanted, stopped on request."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from cli.up.child_output import ChildOutput
from shared.background import first_of
from shared.logs import logger
from shared.process.exit_status import describe_exit
from shared.process.lifecycle import EXIT_CONFIGURATION
from shared.process.parent_death import die_with_parent
from shared.timestamps import timestamp

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
STEADY_S = 10.0
"""A child that ran for this long is restarted after the shortest pause again."""
MAX_FAILED_STARTS = 3
MAX_REFUSED_RESTARTS = 5
"""The child is given up after this many failures in a row: the first number applies until the stack
has served, the second, to configuration errors only, afterwards."""

ROOT = Path(__file__).resolve().parents[2]
"""The working directory of the services, which run as modules."""

log = logger()


class Child:
    """Restarts its process, with backoff, while it is wanted and until `stop`."""

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        cpus: Sequence[int] | None = None,
        descriptors: Sequence[int] = (),
        render: Callable[[str, str], str | None] | None = None,
    ) -> None:
        """The process is wanted once `start` is called.

        ``cpus`` are the numbers of the CPUs it may run on; None means all of this process.
        ``descriptors`` are open files of this process that it inherits. ``render`` is called with
        the name and a line of output, see `ChildOutput`.
        """
        self.name = name
        self._descriptors = descriptors
        self._render = None if render is None else partial(render, name)
        self._cpus = cpus
        self.started_at = timestamp()
        """When the process was last started; before that, when this object was created."""
        self.fatal_error: str | None = None
        """Why the child was given up: another start would fail in the same way."""
        self._command = command
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._die_with_parent = die_with_parent(signal.SIGTERM)
        self._wanted = asyncio.Event()
        self._stopping = asyncio.Event()
        self._is_proven = False

    @property
    def is_wanted(self) -> bool:
        return self._wanted.is_set() and not self._stopping.is_set()

    @property
    def is_proven(self) -> bool:
        return self._is_proven

    def start(self) -> None:
        """Run the process from now on."""
        self._wanted.set()

    def mark_proven(self) -> None:
        """The process has worked once: from now on failures are assumed to be temporary."""
        self._is_proven = True

    async def run(self) -> None:
        """Keep the process running while it is wanted.

        Returns after `stop`, or when it is given up (`fatal_error`).
        """
        pause_s = FIRST_PAUSE_S
        failures = 0
        while True:
            await self._wanted.wait()  # `stop` sets it as well
            if self._stopping.is_set():
                return
            started = time.monotonic()
            try:
                exit_status, last_output = await self._run_once()
            except (OSError, subprocess.SubprocessError) as error:
                why = f"{self._command[0]} cannot be run: {_reason(error, self._command[0])}"
                if not self._is_proven:
                    self.fatal_error = f"the {self.name} cannot start: {why}"
                    return
                log.warning("child_not_started", child=self.name, error=why, pause_s=pause_s)
            else:
                if not self.is_wanted:
                    pause_s, failures = FIRST_PAUSE_S, 0
                    continue
                if time.monotonic() - started > STEADY_S:
                    pause_s, failures = FIRST_PAUSE_S, 0
                failures += 1
                if not self._is_proven and exit_status == EXIT_CONFIGURATION:
                    why = last_output or "its configuration is wrong"
                    self.fatal_error = f"the {self.name} cannot start: {why}"
                    return
                if not self._is_proven and failures >= MAX_FAILED_STARTS:
                    self.fatal_error = (
                        f"the {self.name} failed {failures} times right after its start, the last "
                        f"time with {describe_exit(exit_status)}"
                        + (f"; its last output: {last_output}" if last_output else "")
                    )
                    return
                if exit_status == EXIT_CONFIGURATION:
                    # It has worked before, so the cause may pass: a missing disk, missing streams.
                    pause_s = LONGEST_PAUSE_S
                    if failures >= MAX_REFUSED_RESTARTS:
                        self.fatal_error = (
                            f"the {self.name} failed to restart {failures} times: "
                            f"{last_output or 'its configuration is wrong'}"
                        )
                        log.error("child_given_up", child=self.name, why=self.fatal_error)
                        return
                log.warning(
                    "child_died",
                    child=self.name,
                    cause=describe_exit(exit_status),
                    exit_status=exit_status,
                    last_output=last_output,
                    pause_s=pause_s,
                )
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def restart(self, timeout_s: float) -> None:
        """Stop the process; `run` starts it again."""
        await self._end(timeout_s)

    async def deactivate(self, timeout_s: float) -> None:
        """Stop the process until the next `start`."""
        self._wanted.clear()
        await self._end(timeout_s)

    async def stop(self, timeout_s: float, hurry: asyncio.Event | None = None) -> None:
        """Stop the process for good: SIGTERM, and SIGKILL after ``timeout_s``, or when ``hurry``
        is set."""
        self._stopping.set()
        self._wanted.set()
        await self._end(timeout_s, hurry)

    async def _end(self, timeout_s: float, hurry: asyncio.Event | None = None) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        began = time.monotonic()
        process.terminate()
        ended = asyncio.create_task(process.wait(), name=f"wait for {self.name}")
        await first_of(ended, *([hurry] if hurry else []), timeout_s=timeout_s)
        if not ended.done():
            after_s = round(time.monotonic() - began, 1)
            log.warning("child_killed", child=self.name, after_s=after_s)
            process.kill()
        await ended

    async def _run_once(self) -> tuple[int, str]:
        """Start the process and wait for its end. Returns its exit status and last output.

        Raises:
            OSError, SubprocessError: it cannot be started.
        """
        self.started_at = timestamp()
        with ChildOutput(self._render) as output:
            exit_status = await self._start(output)
        return exit_status, output.last_output

    async def _start(self, output: ChildOutput) -> int:
        # Logs of children go to stderr, since stdout is for the line `ready`. Each child has a
        # session of its own, so that Ctrl-C reaches only this process, which stops them in order.
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
            self._process.terminate()  # it was stopped before the process existed
        return await self._process.wait()

    def _set_up(self) -> None:
        """Runs in the child before the command."""
        self._die_with_parent()
        if self._cpus is not None:
            os.sched_setaffinity(0, self._cpus)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass


def _reason(error: Exception, file: str) -> str:
    """Why the command could not be executed."""
    if isinstance(error, FileNotFoundError) and Path(file).exists():
        return "the interpreter or dynamic loader that it names does not exist"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error)
