"""Checks the schemas and grammars of a submission before its job is queued (decisions 45, 53)."""

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from msgspec import UNSET, Raw

from services.gateway.validation.schema_size import read_schema
from shared.bounded.process import LimitExceeded
from shared.errors import InvalidRequest, Overloaded
from shared.logs import logger
from shared.schemas.trials import SchemaTrials
from shared.wire.api import Submission
from shared.wire.codecs import encode
from shared.wire.requests import GrammarFormat, JsonSchema, RegexFormat

TRIAL_S = 2.0
"""The time limit for one schema, which typically takes milliseconds. CPU time is limited, too."""

TURN_S = 2.0
"""How long a schema may wait until others have been tried."""

TRIALS_AT_ONCE = 2
"""Each needs a process of about 40 MB, which is kept."""

REMEMBERED = 1024
"""Outcomes that are cached. An application has few schemas, and sends them again and again."""

log = logger()


class Schemas:
    """Tries each schema as an inferer will, in a process with limits, and remembers the outcome."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        """``remembered`` is the number of schemas whose outcome is kept."""
        self._remembered = remembered
        self._trials = SchemaTrials(TRIAL_S)
        self._threads = ThreadPoolExecutor(TRIALS_AT_ONCE, "schema")
        self._closing = threading.Event()
        self._turns = asyncio.Semaphore(TRIALS_AT_ONCE)
        self._outcomes: OrderedDict[bytes, str | None] = OrderedDict()
        """By digest: why the schema is refused, or None."""
        self._running: dict[bytes, asyncio.Task[str | None]] = {}

    async def check(self, submission: Submission) -> None:
        """Refuse schemas that cannot be enforced: the answer's schema or grammar, and the argument
        schemas of ``strict`` tools. Takes at most `TRIAL_S` and `TURN_S` for each, and almost
        no time for one that was sent before.

        Raises:
            InvalidRequest: a schema is not valid, cannot be enforced, or takes too long.
            Overloaded: it cannot be tried now.
        """
        if isinstance(submission.response_format, JsonSchema):
            named = submission.response_format.json_schema
            await self._check(named.source, lambda: named.schema, "response_format")
        if isinstance(form := submission.response_format, GrammarFormat | RegexFormat):
            await self._check_language(form)
        for number, tool in enumerate(submission.offered_tools):
            function = tool.function
            if function.strict and function.parameters is not UNSET:
                param = f"tools[{number}].function.parameters"
                await self._check(function.parameters, lambda: function.schema, param)  # noqa: B023

    async def _check(self, source: Raw, read: Callable[[], dict[str, Any]], param: str) -> None:
        def trial() -> Callable[[], str | None]:
            schema = read_schema(source, read, param)
            return partial(self._trials.error, schema, self._closing)

        await self._refuse(hashlib.sha256(source).digest(), trial, param)

    async def _check_language(self, form: GrammarFormat | RegexFormat) -> None:
        digest = hashlib.sha256(encode(form)).digest()
        error = partial(self._trials.language_error, form, self._closing)
        await self._refuse(digest, lambda: error, "response_format")

    async def _refuse(
        self, digest: bytes, trial: Callable[[], Callable[[], str | None]], param: str
    ) -> None:
        """Raises: InvalidRequest: the ``trial`` of the schema with this ``digest`` failed."""
        if digest in self._outcomes:
            self._outcomes.move_to_end(digest)
            refused = self._outcomes[digest]
        else:
            running = self._running.get(digest) or self._start(digest, trial())
            # If this client disconnects, others may still wait for the outcome.
            refused = await asyncio.shield(running)
        if refused is not None:
            raise InvalidRequest(f"{param}: {refused}", param)

    def close(self) -> None:
        """End the processes."""
        self._closing.set()
        self._trials.close()
        self._threads.shutdown(wait=False)

    def _start(self, digest: bytes, error: Callable[[], str | None]) -> asyncio.Task[str | None]:
        def forget(trial: asyncio.Task[str | None]) -> None:
            del self._running[digest]
            if not trial.cancelled():
                trial.exception()  # all clients may have disconnected

        trial = asyncio.create_task(self._try(digest, error), name="try a schema")
        self._running[digest] = trial
        trial.add_done_callback(forget)
        return trial

    async def _try(self, digest: bytes, error: Callable[[], str | None]) -> str | None:
        try:
            async with asyncio.timeout(TURN_S):
                await self._turns.acquire()
        except TimeoutError:
            raise Overloaded(
                "too many other schemas are being checked; nothing was accepted, try again"
            ) from None
        try:
            refused = await asyncio.get_running_loop().run_in_executor(self._threads, error)
        except LimitExceeded as exceeded:
            # Not remembered: it may be due to what else the machine was doing.
            return str(exceeded)
        except OSError as failure:
            log.warning("schema_not_tried", error=str(failure))
            raise Overloaded(
                "the schema cannot be checked now; nothing was accepted, try again"
            ) from None
        finally:
            self._turns.release()
        self._outcomes[digest] = refused
        if len(self._outcomes) > self._remembered:
            self._outcomes.popitem(last=False)
        return refused
