"""``python -m services.inferer``: runs the inferer as a child process, and reports its crash.

Nothing can catch a crash in native code from within. This process only waits and takes 14 MB. It
passes signals on, publishes a report if the child dies, and then ends as the child ended.
"""

import os
import resource
import signal
import subprocess
import sys
from types import FrameType

from services.inferer.crash.flight_recorder import SIZE, FlightRecorder
from shared.process.parent_death import die_with_parent
from shared.process.signals import SHUTDOWN_SIGNALS, block_signals, unblock_signals
from shared.process.standard_descriptors import open_standard_descriptors

FINE = (0, 2)
"""Shut down, or refused to start with an error message: nothing to report."""
EXIT_BY_SIGNAL = 128
"""What a shell adds to the number of the signal that ended a process."""


def main() -> int:
    """Run the inferer to its end. The exit status is the child's; a signal that killed the child
    kills this process as well, if it can."""
    open_standard_descriptors()  # else the recorder could be what the child prints to
    fd = os.memfd_create("sluice-flight-recorder")
    os.ftruncate(fd, SIZE)
    recorder = FlightRecorder(fd)
    block_signals()  # until there is a child to send them to, which starts with them held back
    child = subprocess.Popen(
        [sys.executable, "-m", "services.inferer.serve", str(fd)],
        pass_fds=(fd,),
        preexec_fn=die_with_parent(signal.SIGKILL),
    )

    def pass_on(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    for number in SHUTDOWN_SIGNALS:
        signal.signal(number, pass_on)
    unblock_signals()
    status = child.wait()
    if status in FINE:
        return status
    if -status not in SHUTDOWN_SIGNALS:  # otherwise a second signal ended it
        _report(recorder, status)
    if status > 0:
        return status
    _die_of(-status)
    return EXIT_BY_SIGNAL - status


def _report(recorder: FlightRecorder, status: int) -> None:
    """Publish how the child died, unless the machine has no memory for that: then its jobs come
    back when their leases have expired."""
    try:
        # Imported only now, because it takes about ten times as much memory.
        from services.inferer.crash.report import report

        report(recorder, status)
    except (ImportError, MemoryError, OSError) as error:
        why = str(error) or type(error).__name__
        print(
            f"inferer: the child process died (exit status {status}), and this cannot be "
            f"reported: {why}",
            file=sys.stderr,
        )


def _die_of(number: int) -> None:
    """Die of this signal, without a core dump. Process 1 of a container cannot; then this
    returns."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    sys.exit(main())
