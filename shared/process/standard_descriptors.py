"""Opens the descriptors 0, 1 and 2 if the process was started without them."""

import os


def open_standard_descriptors() -> None:
    """Open missing ones on /dev/null. Otherwise another file or a socket gets the number: printed
    output would go there, and libuv aborts when it is closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # open() returns the lowest free number; child processes inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
