"""Describes how a process ended."""

import signal

EXIT_STALLED = 70
"""Exit status of an inferer whose computation hung; its supervisor restarts it."""
MEANINGS = {EXIT_STALLED: "it hung"}


def describe_exit(return_code: int) -> str:
    """``signal 11 (SIGSEGV)`` or ``exit status 1``; ``return_code`` as `subprocess` gives it."""
    if return_code >= 0:
        meaning = MEANINGS.get(return_code)
        return f"exit status {return_code}" + (f" ({meaning})" if meaning else "")
    try:
        return f"signal {-return_code} ({signal.Signals(-return_code).name})"
    except ValueError:
        return f"signal {-return_code}"
