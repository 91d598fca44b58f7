"""Keeps a model's control tokens apart from what users write: `<|im_end|>` in a message is text.

A chat template puts control tokens around the messages, and the tokenizer finds them in the
rendered prompt by their text. So before a conversation is rendered, control tokens in it are
replaced by numbers that occur nowhere else; afterwards, the parts of the prompt that have such
numbers are tokenized as nothing but text.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

MARK_DIGITS, NUMBER_DIGITS = 20, 5
WHITE_SPACE = " \t\n\v\f\r"
"""What llama.cpp strips."""


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
        self.pattern = _any_of(tokens)

    def literals(self) -> "Literals":
        return Literals(self)


class Literals:
    """The control tokens that occur in one conversation, which are text."""

    def __init__(self, control: ControlTokens) -> None:
        self._control = control
        # Digits: templates trim, change the case and write JSON.
        self._mark = str(secrets.randbelow(9 * 10**MARK_DIGITS) + 10**MARK_DIGITS)
        self._marks: dict[str, str] = {}
        """By the control tokens that they stand for."""
        self._texts: dict[str, str] = {}
        """What to write in place of each mark. A mark in it is where it comes in two parts."""

    def hide(self, text: str) -> str:
        """``text`` with marks for the control tokens in it."""
        return self._control.pattern.sub(self._hidden, text)

    def hide_all(self, value: Any) -> Any:
        """A value of JSON with `hide` for all texts in it."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide_all(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide_all(item) for item in value]
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
                text = text.lstrip(WHITE_SPACE) if before.strips_right else text
                text = text.rstrip(WHITE_SPACE) if after.strips_left else text
                pieces.append(Piece(begun))
                pieces += [Piece(one, has_control=False) for one in text.split(self._mark)]
                begun = ""
            if match:
                begun, end, before = begun + match[0], match.end(), after
        return [piece for piece in [*pieces, Piece(begun)] if piece.text]

    def _hidden(self, match: re.Match[str]) -> str:
        text = match[0]
        mark = self._marks.get(text)
        if mark is None:
            mark = self._marks[text] = f"{self._mark}{len(self._marks):0{NUMBER_DIGITS}}"
            is_always_found = self._control.tokens[text].is_always_found
            self._texts[mark] = text[:1] + self._mark + text[1:] if is_always_found else text
        return mark

    def _shown(self, text: str) -> str:
        """``text`` with the control tokens again."""
        if self._mark not in text:
            return text
        # Compiled only where there is a mark: that takes longer than all the rest.
        marked = rf"{self._mark}\d{{{NUMBER_DIGITS}}}"
        return re.sub(marked, lambda match: self._texts.get(match[0], ""), text)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of ``texts``, in a time that hardly depends on how many there are: some
    vocabularies have 6,000 that begin alike."""
    tree: dict[str, Any] = {}
    for text in filter(None, texts):
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}  # one ends here

    def expression(node: dict[str, Any]) -> str:
        longer = [re.escape(first) + expression(rest) for first, rest in node.items() if first]
        if not longer:
            return ""
        return f"(?:{'|'.join(longer)})" + ("?" if "" in node else "")

    return re.compile(expression(tree) or r"(?!)")
