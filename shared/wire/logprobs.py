"""How likely the tokens of an answer were, and which others were likely in their place."""

import math
from typing import Annotated, Self

from msgspec import Meta, Struct

Bytes = bytes  # a field has that name

UNLIKELY = -9999.0
"""OpenAI's number for what JSON cannot express: a model may compute infinities."""


class TopLogprob(Struct, frozen=True, omit_defaults=True):
    """``logprob`` is the natural logarithm of the probability that the model gave the token, before
    any option of the request changed it. ``bytes`` are those of ``token`` where they are not
    UTF-8: half of a character, for example."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Meta(ge=0, le=255)]] | None = None

    @classmethod
    def of(cls, piece: Bytes, logprob: float) -> Self:
        """``piece`` is what the token adds to a text."""
        text = piece.decode("utf-8", "replace")
        is_whole = text.encode("utf-8") == piece
        known = round(logprob, 6) if math.isfinite(logprob) else UNLIKELY
        return cls(text, known, None if is_whole else list(piece))

    @property
    def piece(self) -> Bytes:
        """What it adds to a text."""
        return self.token.encode("utf-8") if self.bytes is None else Bytes(self.bytes)


class TokenLogprob(TopLogprob, frozen=True, omit_defaults=True):
    """A token of the answer. ``top`` are the likeliest in its place, the likeliest first."""

    top: list[TopLogprob] = []
