"""One `sluice up` at a time on a data folder, counting what an earlier one has left behind."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cli.exit_status import EXIT_USAGE, CommandError
from shared.logs import logger

LEFT_OVER_END_S = 8.0
"""What processes of a `sluice up` that was killed get to end by the SIGTERM that they were sent."""
POLL_S = 0.05

log = logger()


@contextmanager
def locked(data: Path) -> Iterator[int]:
    """Hold ``data`` for this process and the children that get the descriptor this gives.

    The lock lasts until the last of them has ended. So when `sluice up` itself was killed, its
    broker, frozen perhaps, still has the folder: a second broker on it would destroy the streams.
    What was left over in this way is ended first.

    Raises:
        CommandError: another `sluice up` runs on it, or the folder cannot be used.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(data / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unusable(data, error) from None
    try:
        try:
            _take(descriptor, data)
        except OSError as error:
            raise _unusable(data, error) from None
        yield descriptor
    finally:
        os.close(descriptor)


def _unusable(data: Path, error: OSError) -> CommandError:
    why = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
    return CommandError(
        f"cannot use the folder {data}: {why}; choose another with --data", EXIT_USAGE
    )


def _take(descriptor: int, data: Path) -> None:
    left_over: set[int] | None = None
    give_up_at = time.monotonic() + LEFT_OVER_END_S
    while not _try(descriptor):
        holders = _holders(descriptor)
        owner = _owner(descriptor)
        if owner in holders:
            raise CommandError(
                f"another `sluice up` (process {owner}) runs on {data}; stop it, or choose another "
                "folder with --data",
                EXIT_USAGE,
            )
        if left_over is None:
            left_over = holders
            log.warning("left_over_processes_end", pids=sorted(holders), folder=str(data))
        elif time.monotonic() > give_up_at:
            # Only those that were there from the beginning: nobody else may have come since.
            if not left_over & holders:
                raise CommandError(
                    f"the folder {data} is used by a process that cannot be seen from here, in "
                    "another container perhaps; stop it, or choose another folder with --data",
                    EXIT_USAGE,
                )
            for pid in left_over & holders:
                log.warning("left_over_process_killed", pid=pid, after_s=LEFT_OVER_END_S)
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            give_up_at = time.monotonic() + LEFT_OVER_END_S
            left_over = left_over - holders
        time.sleep(POLL_S)


def _try(descriptor: int) -> bool:
    """Take the lock, and write down for whom; False if it is taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return True


def _owner(descriptor: int) -> int | None:
    """The `sluice up` that has taken the lock last."""
    text = os.pread(descriptor, 20, 0)
    return int(text) if text.isdigit() else None


def _holders(descriptor: int) -> set[int]:
    """The processes that hold the lock on the open file ``descriptor``, as far as we may see."""
    inode = os.fstat(descriptor).st_ino
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is somebody else's
            for entry in (process / "fd").iterdir():
                with suppress(OSError):
                    if entry.stat().st_ino != inode:
                        continue
                    # Without a lock it is one that waits, as this process does.
                    if "FLOCK" in (process / "fdinfo" / entry.name).read_text():
                        found.add(int(process.name))
    return found - {os.getpid()}
