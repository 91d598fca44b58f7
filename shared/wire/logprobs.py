"""How likely the tokens of an answer were, and which others were likely in their place."""

from typing import Self

from msgspec import Struct

Bytes = bytes  # a field has that name


class TopLogprob(Struct, frozen=True, omit_defaults=True):
    """``logprob`` is the natural logarithm of the probability that the model gave the token, before
    any option of the request changed it. ``bytes`` are those of ``token`` where they are not
    UTF-8: half of a character, for example."""

    token: str
    logprob: float
    bytes: list[int] | None = None

    @classmethod
    def of(cls, piece: Bytes, logprob: float) -> Self:
        """``piece`` is what the token adds to a text."""
        text = piece.decode("utf-8", "replace")
        is_whole = text.encode("utf-8") == piece
        return cls(text, round(logprob, 6), None if is_whole else list(piece))

    @property
    def piece(self) -> Bytes:
        """What it adds to a text."""
        return self.token.encode("utf-8") if self.bytes is None else Bytes(self.bytes)


class TokenLogprob(TopLogprob, frozen=True, omit_defaults=True):
    """A token of the answer. ``top`` are the likeliest in its place, the likeliest first."""

    top: list[TopLogprob] = []
