"""JSON schemas: valid ones, odd ones, and values that are not schemas."""

from typing import Any

from hypothesis import strategies as st

from tests.fuzz.inputs.values import values

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from((1_000, 1_999, 2_000, 20_000, 65_536, 2**31 - 1, 2**31, 2**63, 10**30, -1)),
    st.floats(allow_nan=False, allow_infinity=False),
)

PIECES = (
    *("a", "[a-z]", "[^a]", ".", r"\d", r"\w", r"\s", r"\b", r"\u00e9", r"\p{L}", "é", '"', "\\\\"),
    *("(a|b)", "(?:a)", "(?i)a", "(?=a)", "(?<n>a)", "[ -\uffff]", "[", "(", ")", "|", "^", "$"),
)
REPEATS = ("", "", "?", "*", "+", "{2}", "{0,40}", "{9999}", "{99999999999}", "{3,1}", "*?", "++")


@st.composite
def patterns(draw: st.DrawFn) -> str:
    """Regular expressions, nested and repeated beyond reason."""
    pairs = st.tuples(st.sampled_from(PIECES), st.sampled_from(REPEATS)).map("".join)
    pattern = "".join(draw(st.lists(pairs, max_size=6)))
    for repeat in draw(st.lists(st.sampled_from(REPEATS), max_size=4)):
        pattern = f"({pattern}){repeat}"
    if draw(st.booleans()):
        pattern = f"^{pattern}$"
    return pattern * draw(st.sampled_from((1, 1, 1, 1, 2, 300)))


def schemas() -> st.SearchStrategy[Any]:
    return st.recursive(_leaves(), _nodes, max_leaves=12)


def _leaves() -> st.SearchStrategy[Any]:
    named = st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(
                ("string", "integer", "number", "boolean", "null", "object", "array", "any", 7)
            ),
            "pattern": patterns(),
            "format": st.sampled_from(("date", "date-time", "uuid", "email", "regex", "")),
            "enum": st.lists(values(), max_size=5),
            "const": values(),
            **dict.fromkeys(
                (
                    *("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum"),
                    *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minProperties"),
                ),
                NUMBERS,
            ),
            "$ref": st.sampled_from(("#", "#/$defs/a", "#/x/../y", "http://127.0.0.1:1/x", "")),
        },
    )
    return st.one_of(named, named, named, st.booleans(), values())


def _nodes(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.one_of(st.sampled_from(("a", "b", "$defs", "")), st.text(max_size=8))
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(("object", "array", ["string", "null"], [])),
            "properties": st.dictionaries(names, children, max_size=4),
            "required": st.lists(names, max_size=4),
            "items": st.one_of(children, st.lists(children, max_size=3)),
            "prefixItems": st.lists(children, max_size=3),
            "additionalProperties": children,
            "anyOf": st.lists(children, max_size=4),
            "oneOf": st.lists(children, max_size=4),
            "allOf": st.lists(children, max_size=4),
            "not": children,
            "$defs": st.dictionaries(names, children, max_size=3),
            "maxItems": NUMBERS,
            "minItems": NUMBERS,
        },
    )
