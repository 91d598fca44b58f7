"""Runs one job on the engine, publishes its tokens, and stops it if necessary."""

import asyncio
import threading
import zlib

from msgspec.structs import replace

from services.inferer.crash.flight_recorder import Entry, Phase
from services.inferer.engine.chat import ChatPrompt
from services.inferer.engine.constraint import constraint, response_schema
from services.inferer.engine.control_tokens import Piece, Prompt
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.sampler import Logprobs, Sampler
from services.inferer.worker.delivery import Job
from services.inferer.worker.engine_outcome import EngineOutcome
from services.inferer.worker.token_publisher import TokenPublisher
from shared.answers.reader import read_answer
from shared.background import start
from shared.broker.connection import Broker
from shared.errors import InvalidAnswer, InvalidRequest, PromptTooLong
from shared.token_ids import require_known
from shared.wire import subjects
from shared.wire.logprobs import TokenLogprob, TopLogprob
from shared.wire.replies import is_inbox


class Inference:
    """One job on the engine."""

    def __init__(self, broker: Broker, engine: Engine, job: Job, entry: Entry) -> None:
        """``entry`` records what the inference is doing, for reports of crashes."""
        self._engine = engine
        self._entry = entry
        self._cancelled = threading.Event()
        self._job = job
        self._outcome = EngineOutcome[Generation]()
        targets = [subjects.token_events(job.model, job.id)]
        if job.request.stream and job.reply_to is not None and is_inbox(job.reply_to):
            targets.append(job.reply_to)
        self._tokens = TokenPublisher(
            broker,
            targets,
            job.trace,
            self._logprob_of if job.request.logprobs else None,
            choices=job.request.n,
        )
        format = engine.model.answer_format(job.request)
        self._shown_tokens = engine.model.shown_tokens(format)
        self._sequence = GenerationSequence(
            prepare=self._prepare,
            max_tokens=job.request.max_tokens or engine.n_ctx,
            stop=job.request.stop_strings,
            on_text=self._add,
            on_end=self._outcome.set,
            on_phase=entry.enter,
            stop_tokens=job.request.stop_token_ids or (),
            shown_tokens=self._shown_tokens,
        )
        self._sequence.owner = "" if engine.shares_cache else job.owner
        self._sequence.adapter = job.request.adapter or ""
        # The cache may have made the first attempt fail, so the next one computes everything.
        self._sequence.is_cold = not job.request.cache_prompt or job.attempt > 1
        self._sequence.is_repeatable = job.request.seed is not None
        job.count_tokens = self._count_tokens

    async def run(self) -> tuple[Generation, TokenPublisher]:
        """Generate the job's answers. When this returns, all of their tokens were published.

        Raises:
            Interrupted: see ``job.interruption``.
            InvalidRequest, PromptTooLong: the model cannot take this request.
            ModelError: llama.cpp failed.
            InvalidAnswer: an answer does not match the requested format.
        """
        self._engine.submit(self._sequence)
        publishing = start(self._tokens.run(self._job.attempt), "publish tokens")
        try:
            await self._outcome.wait(self._job, self._abort)
        finally:
            publishing.cancel()
        await self._tokens.flush(self._job.attempt)
        outcome = self._outcome.value
        for ending, written in zip(outcome.endings, self._tokens.written, strict=True):
            if ending.finish_reason == "stop":
                await self._check_answer(written.text)
        return outcome, self._tokens

    def _count_tokens(self) -> tuple[int, int | None]:
        return self._sequence.completion_tokens, self._sequence.prompt_tokens_left

    def _abort(self) -> None:
        self._engine.abort(self._sequence)
        # After the abort: a preparation that fails because of this must find that it is aborted.
        self._cancelled.set()

    async def _check_answer(self, text: str) -> None:
        """Raises: InvalidAnswer: the answer does not match the requested format."""
        model, request = self._engine.model, self._job.request
        schema = response_schema(request)
        if schema is None:
            return
        answer = read_answer(text, model.answer_format(request))
        if answer.calls and not answer.content:
            return
        wrong = await asyncio.to_thread(model.vocabulary.answer_error, schema, answer.content)
        if wrong is not None:
            remedy = "try another `seed` or prompt" + (
                ", or leave out `stop`" if request.stop else ""
            )
            raise InvalidAnswer(f"the answer does not match `response_format`: {wrong}; {remedy}")

    def _add(self, text: str) -> None:
        """Publish the text and log probability of one more token; called on the compute thread."""
        sequence = self._sequence
        self._tokens.add(text, sequence.last_token, sequence.sampler.logprobs, sequence.choice)

    def _logprob_of(self, token: int, logprobs: Logprobs) -> TokenLogprob:
        def read(one: int) -> bytes:
            return self._engine.model.read_piece(one) or self._shown_tokens.get(one, b"")

        top = [TopLogprob.of(read(one), logprob) for one, logprob in logprobs.top]
        return replace(TokenLogprob.of(read(token), logprobs.logprob), top=top)

    def _prepare(self) -> tuple[list[int], list[Sampler]]:
        request, model, n_ctx = self._job.request, self._engine.model, self._engine.n_ctx
        if request.messages is not None:
            self._entry.enter(Phase.TEMPLATE)
            written = model.chat_prompt(request, self._cancelled)
        else:
            written = ChatPrompt(Prompt([Piece(request.prompt or "")]))
        self._entry.enter(Phase.TOKENIZING)
        if request.prompt_tokens is not None:
            require_known(request.prompt_tokens, model.vocabulary.size, "prompt_tokens")
            prompt = request.prompt_tokens
        else:
            prompt = model.tokenize_prompt(written.prompt)
        if not prompt:
            raise InvalidRequest("the prompt has no tokens for this model", "prompt")
        if len(prompt) >= n_ctx:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the context of {self._job.model} only "
                f"{n_ctx}; at least one must be left for the answer"
            )
        # A job without a seed must still give the same answer in its next attempt.
        seed = zlib.crc32(self._job.id.encode()) if request.seed is None else request.seed
        self._entry.enter(Phase.SCHEMA)
        grammar = constraint(
            model,
            request,
            opened=written.opened != "",
            is_closed=written.is_closed,
            cancelled=self._cancelled,
        )
        samplers = [
            Sampler(model, request, seed + number, prompt, grammar and grammar.copy())
            for number in range(request.n)
        ]
        if written.opened:
            # Each answer continues what the prompt has begun, so it can only be parsed with it.
            self._tokens.open(written.opened)
        return prompt, samplers
