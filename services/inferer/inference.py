"""One job through the engine: prompt in, tokens out as they come, stopped when it must be."""

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.inferer.engine import Aborted, Engine, Generation, Sequence
from services.inferer.job import TIMED_OUT, Interrupted, Job
from services.inferer.sampler import Sampler
from services.inferer.tokens import TokenPublisher
from shared import subjects
from shared.broker import Broker
from shared.errors import InvalidRequest, PromptTooLong
from shared.logs import logger
from shared.results import is_inbox

log = logger()


class Inference:
    """Runs jobs on ``engine``, which serves the model under the alias ``name``."""

    def __init__(self, broker: Broker, engine: Engine, name: str) -> None:
        self._broker = broker
        self._engine = engine
        self._name = name

    @asynccontextmanager
    async def prepared(self, job: Job) -> AsyncIterator[asyncio.Future[Sequence]]:
        """Tokenize, and compile a schema, during the block; off the event loop, as both take long
        for long inputs. The future raises what `run` says; what is not run is let go of."""
        preparing = asyncio.ensure_future(asyncio.to_thread(self._prepare, job))
        try:
            yield preparing
        finally:
            preparing.add_done_callback(_let_go)

    async def run(self, job: Job, preparing: asyncio.Future[Sequence]) -> tuple[Generation, str]:
        """The job's answer: how it came about, and its text. Its tokens are published meanwhile.

        Raises:
            Interrupted: see ``job.interruption``.
            InvalidRequest, PromptTooLong: the model cannot take this request.
            ModelError: llama.cpp failed.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Generation | Exception] = loop.create_future()
        targets = [subjects.token_events(job.id)]
        if job.request.stream and job.reply_to is not None and is_inbox(job.reply_to):
            targets.append(job.reply_to)
        tokens = TokenPublisher(self._broker, targets, job.attempt)
        sequence = await preparing
        sequence.on_text = tokens.add
        sequence.on_end = lambda outcome: _resolve(loop, ended, outcome)
        publishing = asyncio.create_task(tokens.run())
        try:
            self._engine.submit(sequence)
            async with asyncio.timeout(job.seconds_left):
                await asyncio.wait((ended, job.interrupting), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            job.interrupt(TIMED_OUT)
        finally:
            publishing.cancel()
        if not ended.done():
            self._engine.abort(sequence)
        outcome = await ended
        await tokens.flush()
        if isinstance(outcome, Aborted):
            raise Interrupted
        if isinstance(outcome, Exception):
            raise outcome
        return outcome, tokens.text

    def _prepare(self, job: Job) -> Sequence:
        request, model = job.request, self._engine.model
        if request.messages is not None:
            prompt = model.chat_tokens(request.messages)
        else:
            prompt = model.tokenize(request.prompt or "")
        if not prompt:
            raise InvalidRequest("the prompt has no tokens for this model", "prompt")
        if len(prompt) >= self._engine.n_ctx:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the context of {self._name} only "
                f"{self._engine.n_ctx}; at least one must be left for the answer"
            )
        # Without a seed of its own a job must still come out the same on its next attempt.
        seed = zlib.crc32(job.id.encode()) if request.seed is None else request.seed
        return Sequence(
            prompt=prompt,
            sampler=Sampler(model, request, seed, prompt),
            max_tokens=request.max_tokens or self._engine.n_ctx,
            stop=request.stop_strings,
        )


def _let_go(preparing: asyncio.Future[Sequence]) -> None:
    """Free what was prepared and not run, and look at an error that nobody has seen."""
    if not preparing.cancelled() and preparing.exception() is None:
        sequence = preparing.result()
        if not sequence.submitted:
            sequence.sampler.close()


def _resolve(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[Generation | Exception],
    outcome: Generation | Exception,
) -> None:
    """Hand the outcome from the compute thread to the event loop, if that still runs."""

    def resolve() -> None:
        if not future.done():
            future.set_result(outcome)

    try:
        loop.call_soon_threadsafe(resolve)
    except RuntimeError:
        log.warning("outcome_came_after_the_loop_ended")
