"""OpenAI's response bodies, whole and streamed, made from Sluice's."""

import codecs
from collections.abc import Sequence
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, to_builtins

from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.events import Tokens
from shared.answers.calls import Call, tool_call
from shared.answers.reader import AnswerReader, Content, Part, Reasoning
from shared.timestamps import parse_timestamp
from shared.wire.api import JobChoice, JobResult
from shared.wire.logprobs import TokenLogprob, TopLogprob
from shared.wire.results import Completed, FinishReason, PromptTokensDetails, Usage

CONTINUATION, CONTINUATION_BITS = 0b1100_0000, 0b1000_0000
"""How the bytes of a UTF-8 character after its first byte begin."""


class Choice(Struct, frozen=True, kw_only=True):
    index: int = 0
    message: dict[str, Any] | UnsetType = UNSET
    delta: dict[str, Any] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: dict[str, Any] | None = None
    finish_reason: FinishReason | Literal["tool_calls"] | None


class Answer(Struct, frozen=True, kw_only=True):
    """A completion, or a chunk of a streamed completion, for a chat or a prompt."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET


def completion(
    jobs: Sequence[AcceptedJob], results: Sequence[Completed], echoed: Sequence[str]
) -> Answer:
    """The response to a request without a stream, whose ``jobs`` have these ``results``. The texts
    of each job begin with its item of ``echoed``."""
    choices: list[Choice] = []
    for job, result, prompt in zip(jobs, results, echoed, strict=True):
        choices += _choices(job, result, prompt, len(choices))
    kind = "chat.completion" if jobs[0].task == "chat" else "text_completion"
    return _answer(jobs[0], kind, choices, usage_of([result.usage for result in results]))


def usage_of(usages: Sequence[Usage]) -> Usage:
    """The usage of several jobs together."""
    cached = sum(one.prompt_tokens_details.cached_tokens for one in usages)
    return Usage(
        prompt_tokens=sum(one.prompt_tokens for one in usages),
        completion_tokens=sum(one.completion_tokens for one in usages),
        total_tokens=sum(one.total_tokens for one in usages),
        prompt_tokens_details=PromptTokensDetails(cached),
    )


def _choices(accepted: AcceptedJob, result: Completed, echoed: str, first: int) -> list[Choice]:
    """The choices of one job; the index of the first one is ``first``."""
    choices = []
    for index, one in enumerate(JobChoice.all_of(result), first):
        logprobs = None
        if one.logprobs is not UNSET:
            logprobs = logprobs_of(accepted, one.logprobs, TextOffsets())
        reason = one.finish_reason
        if one.message is not UNSET:
            message = {"refusal": None, **to_builtins(one.message)}
            choice = Choice(index=index, message=message, logprobs=logprobs, finish_reason=reason)
        else:
            text = echoed + one.text
            choice = Choice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
        choices.append(choice)
    return choices


class Chunks:
    """The chunks of one job with ``n`` answers, in a streamed response. With ``include_usage``,
    ``usage`` is null in all but the last."""

    def __init__(
        self,
        accepted: AcceptedJob,
        n: int,
        include_usage: bool,
        echoed: str,
        head: AcceptedJob,
        first: int = 0,
    ) -> None:
        """The response has the id of ``head``. The first answer has the index ``first``."""
        self._accepted = accepted
        self._n = n
        self._include_usage = include_usage
        self._echoed = echoed
        self._head = head
        self._first = first
        self._choices: dict[int, _ChoiceChunks] = {}

    def opening(self) -> list[Answer]:
        """The first chunk of each answer."""
        return [self._choice(index).opening() for index in range(self._n)]

    def text(self, tokens: Tokens) -> list[Answer]:
        """The chunks for the next tokens of the model."""
        return self._choice(tokens.choice).text(tokens.text, tokens.logprobs)

    def end(self, result: JobResult) -> list[Answer]:
        """The last chunks of all answers."""
        reasons = [result.finish_reason or None]
        if result.choices is not UNSET:
            reasons = [one.finish_reason for one in result.choices]
        chunks: list[Answer] = []
        for index, reason in enumerate(reasons):
            chunks += self._choice(index).end(reason)
        return chunks

    def _choice(self, index: int) -> "_ChoiceChunks":
        if index not in self._choices:
            self._choices[index] = _ChoiceChunks(
                self._accepted,
                index,
                self._include_usage,
                self._echoed,
                self._head,
                self._first + index,
            )
        return self._choices[index]


def usage_chunk(head: AcceptedJob, usages: Sequence[Usage]) -> Answer:
    """The last chunk of a response with ``include_usage``."""
    return _answer(head, _chunk_kind(head), [], usage_of(usages))


class _ChoiceChunks:
    """The chunks of one answer."""

    def __init__(
        self,
        accepted: AcceptedJob,
        index: int,
        include_usage: bool,
        echoed: str,
        head: AcceptedJob,
        shown_index: int,
    ) -> None:
        self._accepted = accepted
        self._index = index
        self._head = head
        self._shown_index = shown_index
        self._include_usage = include_usage
        self._echoed = echoed
        self._offsets = TextOffsets()
        self._reader = AnswerReader(accepted.format)
        self._calls = 0

    def opening(self) -> Answer:
        """The first chunk."""
        if self._accepted.task != "chat":
            return self._chunk(text=self._echoed)
        return self._chunk(delta={"role": "assistant", "content": ""})

    def text(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Answer]:
        """The chunks for the next text of the model."""
        known = logprobs_of(self._accepted, logprobs, self._offsets) if logprobs else None
        if self._accepted.task != "chat":
            return [self._chunk(text=text, logprobs=known)]
        deltas = self._deltas(self._reader.add(text)) or ([{}] if known else [])
        return [
            self._chunk(delta=delta, logprobs=None if number else known)
            for number, delta in enumerate(deltas)
        ]

    def end(self, reason: str | None) -> list[Answer]:
        """The last chunks, with the reason why the answer ended."""
        if self._accepted.task == "chat":
            left = self._deltas(self._reader.finish())
            chunks = [self._chunk(delta=delta) for delta in left]
            chunks.append(self._chunk(delta={}, finish_reason=reason))
        else:
            chunks = [self._chunk(text="", finish_reason=reason)]
        return chunks

    def _deltas(self, parts: list[Part]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for part in parts:
            match part:
                case Reasoning(text):
                    deltas.append({"reasoning_content": text})
                case Content(text):
                    deltas.append({"content": text})
                case Call():
                    call = tool_call(part, self._accepted.id, self._calls, self._index)
                    delta = {"index": self._calls, **to_builtins(call)}
                    deltas.append({"tool_calls": [delta]})
                    self._calls += 1
        return deltas

    def _chunk(self, *, finish_reason: Any = None, **content: Any) -> Answer:
        choice = Choice(index=self._shown_index, finish_reason=finish_reason, **content)
        usage = None if self._include_usage else UNSET
        return _answer(self._head, _chunk_kind(self._accepted), [choice], usage)


class TextOffsets:
    """Counts the characters of an answer, token by token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def next(self, piece: bytes) -> int:
        """The offset of the next token, whose bytes are ``piece``."""
        if piece and piece[0] & CONTINUATION != CONTINUATION_BITS:
            # The bytes before did not form a character.
            self._characters += len(self._decoder.decode(b"", final=True))
        begin = self._characters
        self._characters += len(self._decoder.decode(piece))
        return begin


def logprobs_of(
    accepted: AcceptedJob, logprobs: Sequence[TokenLogprob], offsets: TextOffsets
) -> dict[str, Any]:
    """The log probabilities in the format of the route that the client used."""
    if accepted.task == "chat":
        content = [
            {**openai_logprob(one), "top_logprobs": [openai_logprob(other) for other in one.top]}
            for one in logprobs
        ]
        return {"content": content, "refusal": None}
    tokens = [one.token for one in logprobs]
    tops = [{other.token: other.logprob for other in one.top} for one in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": [offsets.next(one.piece) for one in logprobs],
    }


def openai_logprob(one: TopLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "bytes": list(one.piece)}


def _chunk_kind(accepted: AcceptedJob) -> str:
    return "chat.completion.chunk" if accepted.task == "chat" else "text_completion"


def _answer(
    accepted: AcceptedJob, kind: str, choices: list[Choice], usage: Usage | UnsetType | None
) -> Answer:
    prefix = "chatcmpl" if accepted.task == "chat" else "cmpl"
    return Answer(
        id=f"{prefix}-{accepted.id}",
        object=kind,
        created=int(parse_timestamp(accepted.queued_at).timestamp()),
        model=accepted.model,
        choices=choices,
        usage=usage,
    )
