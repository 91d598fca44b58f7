"""Descriptors 0, 1 and 2, which a process may have been started without."""

import os


def open_standard_descriptors() -> None:
    """Open those that are missing, to nowhere. Otherwise another file or a socket gets the number:
    what is printed goes there, and libuv aborts when it is closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It takes the lowest number that is free; and child processes are to have it as well.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
