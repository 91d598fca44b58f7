"""Texts that tokenizers, templates and terminals find hard."""

from hypothesis import strategies as st

SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "[INST]",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "{{ messages }}",
    "{% for a in b %}",
    "%s%n",
)

ODD_CHARACTERS = (
    *("\x00", "\x01", "\x1b[31m", "\x7f", "\x85", "\ufeff", "\ufffd", "\uffff"),
    *("\u2028", "\u2029", "\u202e", "\u200d", "\u0301", "\r", "\n", "\t"),
    *("\U0001f468\u200d\U0001f469", "\U0010ffff", "ﷺ", "İ", "ß"),
)


@st.composite
def runs(draw: st.DrawFn, longest: int) -> str:
    """The same few characters again and again, mostly without white space."""
    unit = draw(st.one_of(st.sampled_from(ODD_CHARACTERS), st.text(min_size=1, max_size=4)))
    length = draw(st.one_of(st.integers(1, 200), st.integers(1, longest)))
    return (unit * (length // len(unit) + 1))[:length]


def texts(longest: int = 60_000) -> st.SearchStrategy[str]:
    """Whatever Unicode can be sent as UTF-8."""
    piece = st.one_of(
        st.text(max_size=60),
        st.sampled_from(SPECIAL_TOKENS),
        st.sampled_from(ODD_CHARACTERS),
        runs(longest),
    )
    return st.lists(piece, min_size=1, max_size=5).map("".join)
