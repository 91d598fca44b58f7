"""Exit statuses: 0 success, 1 the job failed, 2 usage error, 3 the gateway cannot be reached."""

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE = 1, 2, 3
EXIT_INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as in shells."""


class CommandError(Exception):
    """Ends the command with a line on stderr and this exit status."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status
