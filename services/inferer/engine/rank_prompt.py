"""How a model that ranks is given a query and a document: as llama.cpp's own server does it."""

import re

import llama_cpp

from services.inferer.engine.control_tokens import Prompt
from services.inferer.engine.model import Model

PLACE = re.compile(r"\{(query|document)\}")
NO_TOKEN = -1


class RankPrompt:
    """One query, and how it goes with a document: by the template for it in the GGUF, if there is
    one; otherwise one after the other, with the model's special tokens between them."""

    def __init__(self, model: Model, query: str) -> None:
        """Raises: PromptTooLong: the query is longer than any text may be."""
        self._model = model
        self._query = query
        template = llama_cpp.llama_model_chat_template(model.handle, b"rerank")
        self._template = template.decode("utf-8", "replace") if template else None
        self._before: list[int] = []
        self._after: list[int] = []
        if self._template is None:
            self._join(model.vocab)

    def _join(self, vocab: object) -> None:
        end = int(llama_cpp.llama_vocab_eos(vocab))
        separator = int(llama_cpp.llama_vocab_sep(vocab))
        ends = [separator if end == NO_TOKEN else end]
        ends = ends if llama_cpp.llama_vocab_get_add_eos(vocab) else []
        if llama_cpp.llama_vocab_get_add_bos(vocab):
            self._before.append(int(llama_cpp.llama_vocab_bos(vocab)))
        self._before += self._text_tokens(self._query) + ends
        if llama_cpp.llama_vocab_get_add_sep(vocab):
            self._before.append(separator)
        self._after += ends

    def tokens(self, document: str) -> list[int]:
        """The tokens of the query with ``document``. Control tokens in them are text.

        Raises:
            PromptTooLong: they are longer than any text may be.
        """
        if self._template is None:
            return self._before + self._text_tokens(document) + self._after
        literals = self._model.control_tokens.literals()
        texts = {"query": literals.hide(self._query), "document": literals.hide(document)}
        prompt = PLACE.sub(lambda place: texts[place[1]], self._template)
        return self._model.tokenize_prompt(Prompt(literals.pieces(prompt), add_special=False))

    def _text_tokens(self, text: str) -> list[int]:
        return self._model.tokenize(text, add_special=False, parse_special=False)
