"""How a command ends: 0 all went well, 1 the job failed, 2 used wrongly, 3 unreachable."""

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE = 1, 2, 3
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells say it."""


class CommandError(Exception):
    """Ends the command with one line on stderr."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status
