"""The inputs of models that do not generate text: inputs to embed, documents to rank."""

from typing import Annotated, cast

from msgspec import Meta, Struct

MAX_INPUTS = 2048
"""The most inputs of one request, as in OpenAI's API."""

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
Inputs = Annotated[list[Text | TokenIds], Meta(min_length=1, max_length=MAX_INPUTS)]
"""Texts, or tokens that are used unchanged."""
AnyInput = (
    Text
    | Annotated[
        list[Text | TokenId | TokenIds],
        Meta(min_length=1, description="The tokens of one input; or texts, or the tokens of each."),
    ]
)
"""The forms that clients send: one input, or a list of them."""


TOKEN_BYTES = 4
"""The approximate size of a text per token."""


class Document(Struct, frozen=True, forbid_unknown_fields=True):
    text: Text


Texts = Annotated[list[Text], Meta(min_length=1, max_length=MAX_INPUTS)]
AnyDocuments = Annotated[list[Text | Document], Meta(min_length=1, max_length=MAX_INPUTS)]
TopN = Annotated[int, Meta(ge=1, le=2**31 - 1, description="How many of the best to return.")]


def inputs_of(given: AnyInput, name: str = "input") -> Inputs:
    """The inputs in what a client sent in the field ``name``.

    Raises:
        ValueError: they are too many, or tokens are among whole inputs.
    """
    if isinstance(given, str):
        return [given]
    kinds = set(map(type, given))
    if kinds == {int}:
        return [cast(list[int], given)]
    if int in kinds:
        raise ValueError(f"`{name}` must be a list of tokens, or a list of inputs, not a mixture")
    if len(given) > MAX_INPUTS:
        raise ValueError(f"`{name}` has {len(given)} items, more than {MAX_INPUTS}; send fewer")
    return cast(Inputs, given)


def utf8_bytes(text: str) -> int:
    return len(text.encode("utf-8"))


def input_bytes(one: str | list[int]) -> int:
    """The size of an input, as if it were all text."""
    return utf8_bytes(one) if isinstance(one, str) else TOKEN_BYTES * len(one)


def texts_of(documents: AnyDocuments) -> Texts:
    """The documents as texts."""
    return [one if isinstance(one, str) else one.text for one in documents]
