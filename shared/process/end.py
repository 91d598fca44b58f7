"""How a process ended, in words."""

import signal

EXIT_STALLED = 70
"""Exit status of an inferer that hung: its supervisor starts it again."""
MEANINGS = {EXIT_STALLED: "it hung"}


def ended_by(return_code: int) -> str:
    """``signal 11 (SIGSEGV)`` or ``exit status 1``; ``return_code`` as `subprocess` gives it."""
    if return_code >= 0:
        meaning = MEANINGS.get(return_code)
        return f"exit status {return_code}" + (f" ({meaning})" if meaning else "")
    try:
        return f"signal {-return_code} ({signal.Signals(-return_code).name})"
    except ValueError:
        return f"signal {-return_code}"
