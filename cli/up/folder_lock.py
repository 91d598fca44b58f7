"""Locks the data folder: one `sluice up` at a time, including processes left over from another."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cli.exit_status import EXIT_USAGE, CommandError
from shared.logs import logger

LEFT_OVER_TIMEOUT_S = 8.0
"""How long processes of a killed `sluice up` may take to end after their SIGTERM."""
POLL_S = 0.05

log = logger()


@contextmanager
def locked(data: Path) -> Iterator[int]:
    """Lock ``data`` for this process, and for children that inherit the yielded descriptor.

    The lock lasts until the last of them has ended. If `sluice up` was killed, its broker may still
    use the folder, and a second broker on it would destroy the streams. So left-over processes are
    ended first.

    Raises:
        CommandError: another `sluice up` uses the folder, or it cannot be used.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(data / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unusable(data, error) from None
    try:
        try:
            _acquire(descriptor, data)
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


def _acquire(descriptor: int, data: Path) -> None:
    left_over: set[int] | None = None
    give_up_at = time.monotonic() + LEFT_OVER_TIMEOUT_S
    while not _try_lock(descriptor):
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
            log.warning("left_over_processes_found", pids=sorted(holders), folder=str(data))
        elif time.monotonic() > give_up_at:
            # Only processes that held the lock from the beginning; others are not left over.
            if not left_over & holders:
                raise CommandError(
                    f"the folder {data} is used by a process that is not visible here, perhaps in "
                    "another container; stop it, or choose another folder with --data",
                    EXIT_USAGE,
                )
            for pid in left_over & holders:
                log.warning("left_over_process_killed", pid=pid, after_s=LEFT_OVER_TIMEOUT_S)
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            give_up_at = time.monotonic() + LEFT_OVER_TIMEOUT_S
            left_over = left_over - holders
        time.sleep(POLL_S)


def _try_lock(descriptor: int) -> bool:
    """Try to lock, and record this process as the owner. Returns False if it is locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return True


def _owner(descriptor: int) -> int | None:
    """The process id of the `sluice up` that locked it last."""
    text = os.pread(descriptor, 20, 0)
    return int(text) if text.isdigit() else None


def _holders(descriptor: int) -> set[int]:
    """The processes that hold the lock on the file ``descriptor``, as far as they are visible."""
    inode = os.fstat(descriptor).st_ino
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or belongs to another user
            for entry in (process / "fd").iterdir():
                with suppress(OSError):
                    if entry.stat().st_ino != inode:
                        continue
                    # A process that only waits for the lock has none.
                    if "FLOCK" in (process / "fdinfo" / entry.name).read_text():
                        found.add(int(process.name))
    return found - {os.getpid()}
