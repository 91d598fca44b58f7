"""JSON of any kind, and bytes that are nearly JSON."""

import json
from typing import Any

from hypothesis import strategies as st

HUGE = (2**31, 2**53, 2**63, 2**64, 10**400, -(2**63) - 1)


def values() -> st.SearchStrategy[Any]:
    """What ``json.dumps`` writes, with numbers that overflow and strings of every kind."""
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from(HUGE),
        st.floats(),
        st.text(max_size=20),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=10,
    )


@st.composite
def mangled(draw: st.DrawFn, originals: st.SearchStrategy[Any]) -> bytes:
    """An original as JSON, mostly with something wrong with it."""
    original = draw(originals)
    if isinstance(original, dict) and original and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(original)))
        original = {**original, name: draw(values())}
    data = json.dumps(original).encode()
    match draw(st.integers(0, 7)):
        case 0:
            return draw(st.binary(max_size=200))
        case 1:
            return data[: draw(st.integers(0, len(data)))]
        case 2:
            at = draw(st.integers(0, len(data)))
            return data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at:]
        case 3:
            return data.replace(b'": "', b'": "\xff\xfe', 1)
        case 4:
            depth = draw(st.sampled_from((10, 5_000, 100_000)))
            return b"[" * depth + data + b"]" * draw(st.sampled_from((0, depth)))
        case 5:
            return data.replace(b"0", b"1" + b"0" * 400, 1)
        case _:
            return data
