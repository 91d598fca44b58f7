"""Token frames, from the compute thread to the broker: the first at once, the rest every 100 ms.
All jobs publish at the same time, so their frames go out in one write and wake the broker and the
gateway once."""

import asyncio
from collections.abc import Callable

from services.inferer.engine.sampler import Logprobs
from shared.broker.connection import Broker
from shared.broker.refusals import TRANSIENT
from shared.wire.codecs import encode
from shared.wire.events import TokenFrame
from shared.wire.logprobs import TokenLogprob

FRAME_S = 0.1
"""One message a token costs up to 15 % of the speed, frames of 50 ms 0.7 % (decision 0009)."""


class TokenPublisher:
    """Publishes one attempt's tokens to ``subjects``. Frames may be lost: the result has all."""

    def __init__(
        self,
        broker: Broker,
        subjects: list[str],
        trace: dict[str, str],
        logprob_of: Callable[[int, Logprobs], TokenLogprob] | None = None,
    ) -> None:
        """``logprob_of`` is called on the event loop, if the request asks for log probabilities."""
        self._logprob_of = logprob_of
        self._broker = broker
        self._subjects = subjects
        self._headers = trace or None
        self._opened = self._unsent = ""
        self._index = 0
        self._new: list[tuple[str, int | None, Logprobs | None]] = []
        self._parts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._idle = False

    def open(self, text: str) -> None:
        """Have the text of the first token follow ``text``; called before the first `add`."""
        self._opened = self._unsent = text

    def add(self, text: str, token: int | None = None, logprobs: Logprobs | None = None) -> None:
        """Take the text of one more token; called on the compute thread. Without a ``token``, it is
        what is left of the text."""
        if self._unsent:
            text, self._unsent = self._unsent + text, ""
        self._new.append((text, token, logprobs))
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
            await asyncio.sleep(FRAME_S - self._loop.time() % FRAME_S)

    async def flush(self, attempt: int) -> None:
        """Publish what has come since the last frame."""
        new = self._new[:]
        del self._new[: len(new)]
        if not new:
            return
        texts = [text for text, *_ in new]
        logprobs = None
        if self._logprob_of is not None:
            logprobs = [
                None if token is None or found is None else self._logprob_of(token, found)
                for _, token, found in new
            ]
            self._logprobs += filter(None, logprobs)
        frame = TokenFrame(attempt=attempt, index=self._index, tokens=texts, logprobs=logprobs)
        self._index += len(texts)
        self._parts += texts
        payload = encode(frame)
        for subject in self._subjects:
            try:
                await self._broker.nc.publish(subject, payload, headers=self._headers)
            except TRANSIENT:
                return

    @property
    def text(self) -> str:
        """Everything published so far: the answer, after the last flush."""
        return "".join(self._parts)

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Those of the tokens that are part of the text; None if they are not asked for."""
        if self._logprob_of is None:
            return None
        left, kept = len(self.text.encode("utf-8")) - len(self._opened.encode("utf-8")), []
        for logprob in self._logprobs:
            if left <= 0:  # of a stop string
                break
            left -= len(logprob.piece)
            kept.append(logprob)
        return kept
