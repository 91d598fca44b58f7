"""Token frames, from the compute thread to the broker: the first at once, the rest every 100 ms.
All jobs publish at the same time, so their frames go out in one write and wake the broker and the
gateway once."""

import asyncio
from collections.abc import Callable
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from services.inferer.engine.sampler import Logprobs
from shared.broker.connection import Broker
from shared.broker.refusals import TRANSIENT
from shared.wire.codecs import encode
from shared.wire.events import TokenFrame
from shared.wire.logprobs import TokenLogprob

FRAME_S = 0.1
"""One message a token costs up to 15 % of the speed, frames of 50 ms 0.7 % (decision 0009)."""


class Written:
    """One answer, as far as it was published."""

    def __init__(self, has_logprobs: bool) -> None:
        self.opened = ""
        """What the prompt has begun of the text."""
        self._parts: list[str] = []
        self._logprobs: list[TokenLogprob] | None = [] if has_logprobs else None

    def add(self, texts: list[str], logprobs: list[TokenLogprob | None] | None) -> None:
        """Take what was added by some tokens. The text of the first is made to follow
        ``opened``."""
        if not self._parts:
            texts[0] = self.opened + texts[0]
        self._parts += texts
        if self._logprobs is not None:
            self._logprobs += filter(None, logprobs or ())

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Those of the tokens that are part of the text; None if they are not asked for."""
        if self._logprobs is None:
            return None
        left, kept = len(self.text.encode("utf-8")) - len(self.opened.encode("utf-8")), []
        for logprob in self._logprobs:
            if left <= 0:  # of a stop string
                break
            left -= len(logprob.piece)
            kept.append(logprob)
        return kept


class _Token(NamedTuple):
    choice: int
    text: str
    token: int | None
    logprobs: Logprobs | None


class TokenPublisher:
    """Publishes one attempt's tokens to ``subjects``. Frames may be lost: the result has all."""

    def __init__(
        self,
        broker: Broker,
        subjects: list[str],
        trace: dict[str, str],
        logprob_of: Callable[[int, Logprobs], TokenLogprob] | None = None,
        choices: int = 1,
    ) -> None:
        """``logprob_of`` is called on the event loop, if the request asks for log probabilities;
        ``choices`` is for how many answers it asks."""
        self._logprob_of = logprob_of
        self._broker = broker
        self._subjects = subjects
        self._headers = trace or None
        self._index = 0
        self._new: list[_Token] = []
        self.written = [Written(logprob_of is not None) for _ in range(choices)]
        """Everything published so far: all answers, after the last flush."""
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._idle = False

    def open(self, text: str) -> None:
        """Have each answer begin with ``text``; called before the first `add`."""
        for written in self.written:
            written.opened = text

    def add(self, text: str, token: int | None, logprobs: Logprobs | None, choice: int) -> None:
        """Take the text of one more token of an answer; called on the compute thread. Without a
        ``token``, it is what is left of the text. Answers come one after another."""
        self._new.append(_Token(choice, text, token, logprobs))
        if self._idle:
            self._idle = False
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def run(self, attempt: int) -> None:
        """Publish frames until cancelled."""
        while True:
            # Set before the list is read: a token that is added in between is either seen
            # here, or wakes us.
            self._idle = True
            if not self._new:
                await self._arrived.wait()
            self._idle = False
            self._arrived.clear()
            await self.flush(attempt)
            pause_s = FRAME_S - self._loop.time() % FRAME_S
            if pause_s < FRAME_S / 2:  # a frame now would have a token or two
                pause_s += FRAME_S
            await asyncio.sleep(pause_s)

    async def flush(self, attempt: int) -> None:
        """Publish what has come since the last frame."""
        new = self._new[:]
        del self._new[: len(new)]
        by_choice = groupby(new, key=attrgetter("choice"))
        # All of them before any is published: then this may be cancelled.
        payloads = [encode(self._frame(attempt, choice, [*tokens])) for choice, tokens in by_choice]
        for payload in payloads:
            for subject in self._subjects:
                try:
                    await self._broker.nc.publish(subject, payload, headers=self._headers)
                except TRANSIENT:
                    return

    def _frame(self, attempt: int, choice: int, tokens: list[_Token]) -> TokenFrame:
        texts = [token.text for token in tokens]
        logprobs = None
        if self._logprob_of is not None:
            logprobs = [
                None
                if one.token is None or one.logprobs is None
                else self._logprob_of(one.token, one.logprobs)
                for one in tokens
            ]
        self.written[choice].add(texts, logprobs)
        index, self._index = self._index, self._index + len(texts)
        return TokenFrame(
            attempt=attempt, index=index, tokens=texts, logprobs=logprobs, choice=choice
        )
