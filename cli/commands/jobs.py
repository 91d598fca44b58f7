"""``sluice ask``, ``submit``, ``follow``, ``status`` and ``cancel``."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import httpx2
import msgspec
import typer

from cli.client import Client
from cli.countdown import countdown
from cli.exit_status import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    CommandError,
)
from cli.interrupts import interrupted_afterwards, interrupted_by_signals
from cli.options import (
    DEFAULT_URL,
    Adapter,
    Answers,
    JobId,
    Json,
    MaxTokens,
    Model,
    PriorityOption,
    Raw,
    Schema,
    Seed,
    Stop,
    System,
    Temperature,
    TimeoutS,
    TopP,
    Url,
    submission,
)
from cli.output import (
    discard_stdout,
    err,
    error_line,
    print_error,
    print_json,
    print_status,
    print_text,
    print_tokens,
    timings_line,
)
from cli.selection import (
    AtMost,
    Ids,
    Metadata,
    ModelFilter,
    PriorityFilter,
    Since,
    State,
    Until,
    end_with_report,
    metadata_of,
    selection,
    states_of,
    time_of,
)
from shared.wire.api import JobStatus
from shared.wire.events import StateEvent

UNKNOWN_JOB = "interrupted before the gateway responded; the job may run: see sluice queue"


def ask(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    model: Model = None,
    adapter: Adapter = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    n: Answers = None,
    stop: Stop = None,
    schema: Schema = None,
    system: System = None,
    raw: Raw = False,
    timeout_s: TimeoutS = None,
    priority: PriorityOption = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Ask, and print the answer as it is generated. Ctrl-C cancels the job."""
    body = submission(
        _text(prompt),
        model=model,
        adapter=adapter,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        n=n,
        stop=stop,
        schema=schema,
        system=system,
        raw=raw,
        timeout_s=timeout_s,
        priority=priority,
    )
    with Client(url) as client, interrupted_by_signals():
        job_id = None
        try:
            with interrupted_afterwards():
                job_id = client.submit(body).id
            status = _follow(client, job_id, show=not as_json)
        except (KeyboardInterrupt, BrokenPipeError) as interrupt:
            if isinstance(interrupt, BrokenPipeError):
                discard_stdout()
            _cancel_interrupted(client, job_id)
            raise typer.Exit(EXIT_INTERRUPTED) from None
    _print_end(status, as_json=as_json)


def submit(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    model: Model = None,
    adapter: Adapter = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    n: Answers = None,
    stop: Stop = None,
    schema: Schema = None,
    system: System = None,
    raw: Raw = False,
    timeout_s: TimeoutS = None,
    priority: PriorityOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Submit a job and print its id. The job continues after this command ends."""
    body = submission(
        _text(prompt),
        model=model,
        adapter=adapter,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        n=n,
        stop=stop,
        schema=schema,
        system=system,
        raw=raw,
        timeout_s=timeout_s,
        priority=priority,
    )
    with Client(url) as client, interrupted_by_signals():
        accepted = None
        try:
            with interrupted_afterwards():
                accepted = client.submit(body)
            if not wait:
                print_json(accepted) if as_json else print_text(accepted.id)
                return
            print_error(f"submitted {accepted.id}")
            status = _follow(client, accepted.id, show=False)
        except KeyboardInterrupt:
            if accepted is None:
                print_error(UNKNOWN_JOB)
            else:
                print_error(f"the job continues: sluice status {accepted.id}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    print_json(status) if as_json else print_status(status)
    _end(status, is_printed=True)


def follow(
    job_id: JobId,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Print the answer of a job as it is generated, from its beginning. Ctrl-C ends only this
    command."""
    with Client(url) as client, interrupted_by_signals():
        job_id = client.whole_id(job_id)
        try:
            status = _follow(client, job_id, show=not as_json)
        except KeyboardInterrupt:
            print_error(f"\nthe job is still running; to see its answer: sluice follow {job_id}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    _print_end(status, as_json=as_json)


def status(
    job_id: JobId,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Show the state of a job and its result."""
    with Client(url) as client:
        found = client.status(client.whole_id(job_id))
    print_json(found) if as_json else print_status(found)
    _end(found, is_printed=True)


def cancel(
    ids: Ids = None,
    state: State = None,
    model: ModelFilter = None,
    priority: PriorityFilter = None,
    metadata: Metadata = None,
    since: Since = None,
    until: Until = None,
    at_most: AtMost = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Cancel waiting or running jobs, selected by ids or filters. To preview which jobs the filters
    match, give them to: sluice jobs."""
    where = {
        "state": states.split(",") if (states := states_of(state)) else None,
        "model": model,
        "priority": priority,
        "metadata": metadata_of(metadata),
        "since": time_of(since),
        "until": time_of(until),
    }
    selected = selection(ids, where, at_most)
    with Client(url) as client:
        if ids:
            selected["ids"] = ids = [client.whole_id(one) for one in ids]
        if ids and len(ids) == 1:
            cancelled = client.cancel(ids[0])
            print_json(cancelled) if as_json else print_status(cancelled)
            return
        report = client.bulk("/jobs/cancel", selected)
    end_with_report(report, "cancelled", as_json=as_json)


def _text(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"stdin is not UTF-8: {error.reason} at byte {error.start}", EXIT_USAGE
        ) from None


def _follow(client: Client, job_id: str, *, show: bool) -> JobStatus:
    """Follow a job to its end; with ``show``, print its tokens as they arrive."""
    with countdown(client, job_id) as line, _own_line() as answer:
        choice = 0
        for event in client.follow(job_id, lambda why: line.say(f"{why}; trying again")):
            line.note_event()
            if event.event in ("started", "attempt_failed", "returned"):
                if (setback := _setback(event)) is not None:
                    line.say(setback)
            elif event.event == "retrying" and show:
                print_tokens("\n")
                choice = 0
            elif event.event == "tokens" and show:
                answer.has_begun = True
                line.hide()
                added = msgspec.json.decode(event.data)
                if added.get("choice", 0) > choice:
                    choice = added["choice"]
                    print_tokens(f"\n\nanswer {choice + 1}:\n")
                print_tokens(added["text"])
            elif event.event == "result":
                if answer.has_begun:
                    print_tokens("\n")
                return msgspec.json.decode(event.data, type=JobStatus)
            elif event.event == "error":
                raise CommandError(msgspec.json.decode(event.data)["message"], EXIT_FAILED)
    raise CommandError(f"the events of {job_id} ended without a result", EXIT_UNREACHABLE)


class _Answer:
    has_begun = False
    """Whether a part of it was printed."""


@contextmanager
def _own_line() -> Iterator[_Answer]:
    """The message of an error gets a line of its own below the answer."""
    answer = _Answer()
    try:
        yield answer
    except CommandError:
        if answer.has_begun:
            print_tokens("\n")
        raise


def _setback(event: httpx2.ServerSentEvent) -> str | None:
    """What an event about the state of a job says of its attempts; None for its first start."""
    state = msgspec.json.decode(event.data, type=StateEvent)
    if event.event == "returned":
        why = state.message or f"the inferer {state.inferer} shuts down"
        return f"{why}; the job waits for another one"
    if event.event == "attempt_failed":
        return f"attempt {state.attempt} failed ({state.message}); another one follows"
    return f"attempt {state.attempt} has started" if state.attempt > 1 else None


def _cancel_interrupted(client: Client, job_id: str | None) -> None:
    """Cancel the job of an interrupted command, and report it. A further interrupt gives up."""
    if job_id is None:
        print_error(UNKNOWN_JOB)
        return
    cancelled = False
    with suppress(KeyboardInterrupt), interrupted_afterwards():
        client.cancel(job_id)
        cancelled = True
    print_error(
        f"\ncancelled {job_id}" if cancelled else f"\nnot cancelled: sluice cancel {job_id}"
    )


def _print_end(status: JobStatus, *, as_json: bool) -> None:
    """After an answer that was followed: the whole status, or how long it took."""
    if as_json:
        print_json(status)
    elif err.is_terminal and status.error is None:
        err.print(timings_line(status), style="dim")
    _end(status)


def _end(status: JobStatus, *, is_printed: bool = False) -> None:
    """Exit with status 1 if the job ended without an answer."""
    if status.error is None:
        return
    if not is_printed:
        print_error(f"{status.state}: {error_line(status.error.code, status.error.message)}")
    raise typer.Exit(EXIT_FAILED)
