"""Generation of text: the kind of sequence that continues a prompt token by token."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from services.inferer.crash.flight_recorder import Phase
from services.inferer.engine.detokenizer import Detokenizer
from services.inferer.engine.lookup import Lookup
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Sequence
from services.inferer.engine.speculation import MAX_DRAFTS

ACCEPTANCE_RATE = 0.15
"""How much the last guess counts. An answer starts and stops copying within a few tokens."""


@dataclass(frozen=True)
class Generation:
    """How a generation ended, and where its time went (milliseconds)."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    """Those of the prompt that were not computed again."""
    completion_tokens: int
    prompt_ms: float
    generation_ms: float
    prompt_delay_ms: float = 0.0
    """How much of that is due to other sequences, as estimated."""
    generation_delay_ms: float = 0.0


class GenerationSequence(Sequence):
    """One prompt and its answer. The callbacks are called on other threads."""

    def __init__(
        self,
        prepare: Callable[[], tuple[list[int], Sampler]],
        max_tokens: int,
        stop: list[str],
        on_text: Callable[[str], None],
        on_end: Callable[[Generation | Exception], None],
        on_phase: Callable[[Phase], None] = lambda _: None,
        stop_tokens: Collection[int] = (),
        shown_tokens: Mapping[int, bytes] = MappingProxyType({}),
    ) -> None:
        """``prepare`` returns the prompt's tokens and a sampler, which the engine closes. It may
        take a long time, and is not interrupted when the sequence is aborted.

        ``on_text`` gets the text that each token adds, possibly empty; together they are the
        answer. ``stop_tokens`` end it, besides those of the model, and add none. ``shown_tokens``
        are control tokens that add a text. ``on_phase`` gets each phase before it begins.
        ``on_end`` is called once: with a `Generation`, with `Aborted`, or with the `SluiceError`
        that ended the sequence.
        """
        super().__init__()
        self.prepare = prepare
        self.max_tokens = max_tokens
        self._stop_tokens = frozenset(stop_tokens)
        self._shown_tokens = shown_tokens
        self.on_text = on_text
        self.on_end = on_end
        self.on_phase = on_phase
        self.prompt_tokens = 0
        """Written, as the sampler, by a preparation thread before the compute thread gets it."""
        self.sampler: Sampler | None = None
        self.lookup: Lookup | None = None
        """Of the sequence's tokens; None if nothing is to be guessed. Written likewise."""
        self.cached_tokens = 0
        self.last_token: int | None = None
        """The one whose text `on_text` gets; None if what is left is passed without one."""
        self.completion_tokens = 0
        """Written by the compute thread, read by any."""
        self.started = 0.0
        """`time.perf_counter`, as ``prompt_done``."""
        self.prompt_done = 0.0
        self._prompt_delay_s = 0.0
        self._detokenizer = Detokenizer(stop)

    def advance(self, model: Model, context: object, row: int) -> Generation | None:
        """Sample a token from the logits in ``row`` of the batch that ``context`` computed last.
        Either the token is added to the sequence, or the generation has ended and is returned.

        Raises:
            InvalidRequest: the schema allows no token, or takes too much work to follow.
        """
        assert self.sampler is not None
        token = self.sampler.sample(context, row)
        if self.completion_tokens == 0:
            self.prompt_done = time.perf_counter()
            self._prompt_delay_s = self.delay_s
            self.on_phase(Phase.TOKENS)
        if self.draft:
            is_right = token == self.draft[0]
            self.acceptance += ACCEPTANCE_RATE * (is_right - self.acceptance)
        piece = model.piece(token)
        if piece is None or token in self._stop_tokens:
            self.last_token = None
            return self._ended("stop", "")
        self.completion_tokens += 1
        self.last_token = token
        text = self._detokenizer.push(piece or self._shown_tokens.get(token, b""))
        if self._detokenizer.stopped:
            return self._ended("stop", text)
        if self.completion_tokens >= self.max_tokens:
            return self._ended("length", text)
        self.tokens.append(token)
        if self.lookup is not None:
            # The token after the last one that is right comes without a guess.
            wanted = self.max_tokens - self.completion_tokens - 1
            self.draft = self.lookup.continuation(min(MAX_DRAFTS, wanted))
        self.on_text(text)
        return None

    def _ended(self, reason: Literal["stop", "length"], text: str) -> Generation:
        text += self._detokenizer.flush()
        if text or self.last_token is not None:
            self.on_text(text)
        return Generation(
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            prompt_ms=(self.prompt_done - self.started) * 1000,
            generation_ms=(time.perf_counter() - self.prompt_done) * 1000,
            prompt_delay_ms=self._prompt_delay_s * 1000,
            generation_delay_ms=(self.delay_s - self._prompt_delay_s) * 1000,
        )

    def close(self) -> None:
        """Free the sampler."""
        if self.sampler is not None:
            self.sampler.close()
