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
from services.inferer.engine.prompt_cache import SavedState
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Sequence, State
from services.inferer.engine.speculation import MAX_DRAFTS


@dataclass(frozen=True)
class Ending:
    """How one answer ended."""

    finish_reason: Literal["stop", "length"]
    completion_tokens: int


@dataclass(frozen=True)
class Generation:
    """How a generation ended, and where its time went (milliseconds)."""

    endings: list[Ending]
    """Of each answer."""
    prompt_tokens: int
    cached_tokens: int
    """Those of the prompt that were not computed again."""
    completion_tokens: int
    """Of all answers."""
    prompt_ms: float
    generation_ms: float
    prompt_delay_ms: float = 0.0
    """How much of that is due to other sequences, as estimated."""
    generation_delay_ms: float = 0.0

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Of the first answer."""
        return self.endings[0].finish_reason


class GenerationSequence(Sequence):
    """One prompt and its answers, which are generated one after another: after each the sequence
    goes back to its prompt, which is not computed again. The callbacks are called on other
    threads."""

    def __init__(
        self,
        prepare: Callable[[], tuple[list[int], list[Sampler]]],
        max_tokens: int,
        stop: list[str],
        on_text: Callable[[str], None],
        on_end: Callable[[Generation | Exception], None],
        on_phase: Callable[[Phase], None] = lambda _: None,
        stop_tokens: Collection[int] = (),
        shown_tokens: Mapping[int, bytes] = MappingProxyType({}),
    ) -> None:
        """``prepare`` returns the prompt's tokens and a sampler for each answer, which the engine
        closes. It may take a long time, and is not interrupted when the sequence is aborted.
        ``max_tokens`` is that of each answer.

        ``on_text`` gets the text that each token adds, possibly empty; together they are the
        answer ``choice``. ``stop_tokens`` end it, besides those of the model, and add none.
        ``shown_tokens`` are control tokens that add a text. ``on_phase`` gets each phase before it
        begins.
        ``on_end`` is called once: with a `Generation`, with `Aborted`, or with the `SluiceError`
        that ended the sequence.
        """
        super().__init__()
        self.prepare = prepare
        self.max_tokens = max_tokens
        self._stop = stop
        self._stop_tokens = frozenset(stop_tokens)
        self._shown_tokens = shown_tokens
        self.on_text = on_text
        self.on_end = on_end
        self.on_phase = on_phase
        self.prompt_tokens = 0
        """Written, as the samplers, by a preparation thread before the compute thread gets it."""
        self.samplers: list[Sampler] = []
        """One for each answer."""
        self.choice = 0
        """The number of the answer that is generated, counted from 0."""
        self.start: SavedState | None = None
        """What the context had before the prompt's last token, where it could not be cut to that
        afterwards."""
        self.lookup: Lookup | None = None
        """Guesses of the sequence's tokens; None if nothing is to be guessed. Written likewise."""
        self.cached_tokens = 0
        self.last_token: int | None = None
        """The one whose text `on_text` gets; None if what is left is passed without one."""
        self.completion_tokens = 0
        """Of all answers so far. Written by the compute thread, read by any."""
        self._choice_tokens = 0
        """Of the answer that is generated."""
        self._endings: list[Ending] = []
        self.started = 0.0
        """`time.perf_counter`, as ``prompt_done``."""
        self.prompt_done = 0.0
        self._prompt_delay_s = 0.0
        self._detokenizer = Detokenizer(stop)

    @property
    def sampler(self) -> Sampler:
        """That of the answer that is generated."""
        return self.samplers[self.choice]

    @property
    def is_last_choice(self) -> bool:
        """Whether no answer follows the one that is generated."""
        return self.choice == len(self.samplers) - 1

    @property
    def prompt_tokens_left(self) -> int | None:
        """How many tokens of its prompt are still to be computed; None before it has a slot. May be
        read from any thread."""
        if self.prompt_done:
            return 0
        # Never negative, although a batch may end between the two that are subtracted.
        return max(self.remaining, 0) if self.state is State.RUNNING else None

    def advance(self, model: Model, context: object, row: int) -> bool:
        """Sample a token from the logits in ``row`` of the batch that ``context`` computed last.
        Either the token is added to the sequence, or the answer has ended: then the result is True.

        Raises:
            InvalidRequest: the schema allows no token, or takes too much work to follow.
        """
        token = self.sampler.sample(context, row)
        if not self.prompt_done:
            self.prompt_done = time.perf_counter()
            self._prompt_delay_s = self.delay_s
            self.on_phase(Phase.TOKENS)
        is_right = False
        if self.draft:
            is_right = token == self.draft[0]
            self.guesses.append((self.streak, is_right))
        self.streak = self.streak + 1 if is_right else 0
        piece = model.piece(token)
        if piece is None or token in self._stop_tokens:
            self.last_token = None
            return self._ended("stop", "")
        self.completion_tokens += 1
        self._choice_tokens += 1
        self.last_token = token
        text = self._detokenizer.push(piece or self._shown_tokens.get(token, b""))
        if self._detokenizer.stopped:
            return self._ended("stop", text)
        if self._choice_tokens >= self.max_tokens:
            return self._ended("length", text)
        self.tokens.append(token)
        if self.lookup is not None:
            self.lookup.add(token)
            self._guess()
        self.on_text(text)
        return False

    def _guess(self) -> None:
        assert self.lookup is not None
        # The token after the last one that is right comes without a guess.
        wanted = self.max_tokens - self._choice_tokens - 1
        self.draft = self.lookup.continuation(min(MAX_DRAFTS, wanted))

    def _ended(self, reason: Literal["stop", "length"], text: str) -> bool:
        text += self._detokenizer.flush()
        if text or self.last_token is not None:
            self.on_text(text)
        self._endings.append(Ending(reason, self._choice_tokens))
        return True

    def begin_next_choice(self) -> None:
        """Go back to the prompt, after an answer that is not the last."""
        self.choice += 1
        self._choice_tokens = self.streak = 0
        del self.tokens[self.prompt_tokens :]
        self._detokenizer = Detokenizer(self._stop)
        if self.lookup is not None:
            self.lookup.begin_next_answer()
            self._guess()

    def generation(self) -> Generation:
        """How it ended, after the last answer."""
        return Generation(
            endings=self._endings,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            prompt_ms=(self.prompt_done - self.started) * 1000,
            generation_ms=(time.perf_counter() - self.prompt_done) * 1000,
            prompt_delay_ms=self._prompt_delay_s * 1000,
            generation_delay_ms=(self.delay_s - self._prompt_delay_s) * 1000,
        )

    def close(self) -> None:
        """Free the samplers."""
        for sampler in self.samplers:
            sampler.close()
