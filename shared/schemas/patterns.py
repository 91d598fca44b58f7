"""Patterns of JSON Schema, which are JavaScript's, for llguidance, whose patterns are Rust's."""

_MORE_SPACE = r"\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
SPACE = r"\t\n\x0b\x0c\r " + _MORE_SPACE
"""White space in JavaScript; Rust's has U+0085 instead of U+FEFF."""
ESCAPES = {"s": f"[{SPACE}]", "S": f"[^{SPACE}]"}
ANY = r"[^\n\r\x{2028}\x{2029}]"
"""What a dot matches in JavaScript; in Rust it matches more ends of lines."""


def rust_pattern(pattern: str) -> str:
    """``pattern`` with the same meaning in Rust. `\\d` and `\\w` are left to llguidance.

    Raises:
        ValueError: it has a class without characters, which Rust cannot write.
    """
    written: list[str] = []
    in_class = False
    position = 0
    while position < len(pattern):
        one, following = pattern[position], pattern[position + 1 : position + 2]
        if one == "\\" and following:
            written.append(ESCAPES.get(following, one + following))
            position += 2
            continue
        if in_class:
            # Rust has classes in classes, and operators on them: &&, -- and ~~.
            written.append("\\" + one if one in "[&~" or one == following == "-" else one)
            in_class = one != "]"
        elif one == "[":
            start = "[^" if following == "^" else "["
            if pattern.startswith(start + "]", position):
                raise ValueError("it has an empty class")
            written.append(start)
            position += len(start) - 1
            in_class = True
        else:
            written.append(ANY if one == "." else one)
        position += 1
    return "".join(written)
