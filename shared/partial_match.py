"""Text that may be the beginning of something that is looked for."""


def overlap(text: str, wanted: str) -> int:
    """The length of the longest suffix of ``text`` that is a prefix of ``wanted``, not all of
    it."""
    for length in range(min(len(wanted) - 1, len(text)), 0, -1):
        if text.endswith(wanted[:length]):
            return length
    return 0
