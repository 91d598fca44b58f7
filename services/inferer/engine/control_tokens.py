"""Keeps a model's control tokens apart from what users write: `<|im_end|>` in a message is text.

A chat template puts control tokens around the messages, and the tokenizer finds them in the
rendered prompt by their text. So before a conversation is rendered, control tokens in it are
replaced by numbers that occur nowhere else; afterwards, the parts of the prompt that have such
numbers are tokenized as nothing but text.
"""

import re
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

MARK_DIGITS = 20


class Piece(NamedTuple):
    """A part of a prompt."""

    text: str
    has_control: bool = True
    """Whether control tokens in it are meant as such."""


class Prompt(NamedTuple):
    """A prompt before it is tokenized. ``add_special``: it lacks the tokens that the model expects
    at the beginning."""

    pieces: list[Piece]
    add_special: bool = True


class ControlToken(NamedTuple):
    """How llama.cpp finds it in a text."""

    strips_left: bool = False
    strips_right: bool = False
    """Whether it takes the white space before it, and after it."""
    is_always_found: bool = False
    """Also in a text that is to have no control tokens, unless it comes in two parts."""


class ControlTokens:
    """Those of one model."""

    def __init__(self, tokens: Mapping[str, ControlToken]) -> None:
        """``tokens`` by their text."""
        self.tokens = tokens
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def literals(self) -> "Literals":
        return Literals(self)


class Literals:
    """The control tokens that occur in one conversation, which are text."""

    def __init__(self, control: ControlTokens) -> None:
        self._control = control
        # Digits: templates trim, change the case and write JSON.
        self._mark = str(secrets.randbelow(9 * 10**MARK_DIGITS) + 10**MARK_DIGITS)
        self._texts: dict[str, str] = {}
        """By their marks."""

    def hide(self, value: Any) -> Any:
        """``value``, anything JSON, with marks for the control tokens in all its strings."""
        if isinstance(value, str):
            return self._control.pattern.sub(self._hidden, value)
        if isinstance(value, list):
            return [self.hide(one) for one in value]
        if isinstance(value, dict):
            return {self.hide(name): self.hide(one) for name, one in value.items()}
        return value

    def pieces(self, prompt: str) -> list[Piece]:
        """``prompt``, rendered from what `hide` returned, with the control tokens again."""
        if not self._texts:
            return [Piece(prompt)]
        pieces, begun, before = [], "", ControlToken()
        end = 0
        # Between control tokens of the template the text is tokenized as a whole.
        for match in [*self._control.pattern.finditer(prompt), None]:
            part = prompt[end : match.start() if match else len(prompt)]
            after = self._control.tokens[match[0]] if match else ControlToken()
            text = self._shown(part)
            if text == part:
                begun += part
            else:
                text = text.lstrip() if before.strips_right else text
                text = text.rstrip() if after.strips_left else text
                pieces.append(Piece(begun))
                pieces += [Piece(one, has_control=False) for one in text.split(self._mark)]
                begun = ""
            if match:
                begun, end, before = begun + match[0], match.end(), after
        return [piece for piece in [*pieces, Piece(begun)] if piece.text]

    def _hidden(self, match: re.Match[str]) -> str:
        for mark, text in self._texts.items():
            if text == match[0]:
                return mark
        mark = f"{self._mark}{len(self._texts):04}"
        self._texts[mark] = match[0]
        return mark

    def _shown(self, text: str) -> str:
        """``text`` with the control tokens again, with a mark where one must come in two parts."""
        for mark, literal in self._texts.items():
            if self._control.tokens[literal].is_always_found:
                text = text.replace(mark, literal[:1] + self._mark + literal[1:])
            else:
                text = text.replace(mark, literal)
        return text
