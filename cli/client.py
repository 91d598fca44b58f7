"""The client of a gateway."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlencode

import httpx2
import msgspec

from cli.exit_status import EXIT_FAILED, EXIT_UNREACHABLE, EXIT_USAGE, CommandError
from cli.proxy import proxy_for, via_proxy
from shared.counts import counted
from shared.job_ids import is_job_id
from shared.wire.api import (
    ConcurrencyReport,
    ConcurrencyRequest,
    DeadLetterHead,
    DeadLetterPage,
    FleetReport,
    JobAccepted,
    JobStatus,
    QueueReport,
)
from shared.wire.codecs import encode
from shared.wire.listing import BulkReport, JobDetails, JobPage
from shared.wire.results import DeadLetter

TIMEOUT_S = 30.0
"""Longer than a gateway waits for the election of a leader on a cluster."""
READ_TIMEOUT_S = 60.0
"""A stream sends something every 15 s, so after this time the connection is dead."""
MAX_RECONNECTS = 30
RETRY_S = 1.0
JOB_ID_CHARS = 36
_BEGINNING = re.compile(r"[0-9a-f-]+")
"""Of a job id."""

ON_THE_COMMAND_LINE = {"messages": "--raw", "model": "--model"}
"""Options for parameters that an error of the gateway names."""

T = TypeVar("T")


class Client:
    """Calls one gateway. Errors are raised as `CommandError` with the matching exit status."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        try:
            parsed = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise CommandError(f"{url} is not a URL: {error}", EXIT_USAGE) from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise CommandError(
                f"{url} is not the URL of a gateway: give http://host:port", EXIT_USAGE
            )
        self._proxy = proxy_for(parsed)
        self._host = parsed.host
        self._http = httpx2.Client(
            base_url=parsed,
            timeout=timeout_s,
            proxy=self._proxy,
            verify=httpx2.create_ssl_context(),  # respects SSL_CERT_FILE and SSL_CERT_DIR
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def submit(self, submission: dict[str, Any]) -> JobAccepted:
        try:
            content = encode(submission)
        except UnicodeEncodeError:
            raise CommandError("the prompt is not UTF-8", EXIT_USAGE) from None
        return self._call("POST", "/jobs", JobAccepted, content=content)

    def whole_id(self, beginning: str) -> str:
        """The id of the job whose id begins with ``beginning``, or a whole id as it is.

        Raises:
            CommandError: no job in the list begins so, or several do.
        """
        if len(beginning) >= JOB_ID_CHARS:
            return beginning
        if not _BEGINNING.fullmatch(beginning):
            raise CommandError(f"{beginning!r} is not a job id or the beginning of one", EXIT_USAGE)
        found = self.jobs([("id", beginning), ("limit", "2")])
        if found.total != 1:
            problem = "no job" if not found.total else counted(found.total, "job")
            raise CommandError(f"{problem} with an id that begins with {beginning!r}", EXIT_USAGE)
        return found.jobs[0].id

    def status(self, job_id: str) -> JobStatus:
        _check_id(job_id)
        return self._call("GET", f"/status/{job_id}", JobStatus)

    def cancel(self, job_id: str) -> JobStatus:
        _check_id(job_id)
        return self._call("DELETE", f"/jobs/{job_id}", JobStatus)

    def jobs(self, query: list[tuple[str, str]]) -> JobPage:
        """``query``: the parameters of ``GET /jobs``."""
        return self._call("GET", f"/jobs?{urlencode(query)}", JobPage)

    def job(self, job_id: str) -> JobDetails:
        _check_id(job_id)
        return self._call("GET", f"/jobs/{job_id}", JobDetails)

    def bulk(self, path: str, selected: dict[str, Any]) -> BulkReport:
        """A bulk request. ``selected`` contains ``ids``, or ``where`` with filters."""
        return self._call("POST", path, BulkReport, content=encode(selected))

    def queue(self) -> QueueReport:
        return self._call("GET", "/queue", QueueReport)

    def inferers(self) -> FleetReport:
        return self._call("GET", "/inferers", FleetReport)

    def set_concurrency(self, wanted: ConcurrencyRequest) -> ConcurrencyReport:
        return self._call("PUT", "/concurrency", ConcurrencyReport, content=encode(wanted))

    def dead_letters(self, limit: int, before: int | None) -> DeadLetterPage:
        older = "" if before is None else f"&before={before}"
        return self._call("GET", f"/dead?limit={limit}{older}", DeadLetterPage)

    def dead_letter(self, letter_id: str) -> DeadLetter:
        return self._call("GET", _dead_path(letter_id), DeadLetter)

    def retry_dead_letter(self, letter_id: str) -> JobAccepted:
        return self._call("POST", f"{_dead_path(letter_id)}/retry", JobAccepted)

    def drop_dead_letter(self, letter_id: str) -> DeadLetterHead:
        return self._call("DELETE", _dead_path(letter_id), DeadLetterHead)

    def follow(
        self, job_id: str, on_lost: Callable[[str], None]
    ) -> Iterator[httpx2.ServerSentEvent]:
        """All events of the job, up to its result. Reconnects, and resumes after the last event.
        ``on_lost`` gets the reason when it begins to reconnect."""
        last_event_id, failures = "", 0
        while True:
            try:
                for event in self._events(job_id, last_event_id):
                    failures = 0
                    last_event_id = event.id or last_event_id
                    yield event
                    if event.event == "result":
                        return
            except (httpx2.TransportError, _Unavailable) as error:
                failures += 1
                if failures == 1:
                    is_away = isinstance(error, _Unavailable)
                    on_lost(str(error) if is_away else "the connection was lost")
                if failures >= MAX_RECONNECTS:
                    raise CommandError(
                        f"the connection to {self.url} failed ({error}); the job continues: "
                        f"sluice status {job_id}",
                        EXIT_UNREACHABLE,
                    ) from None
            time.sleep(RETRY_S if failures else 0)

    def _events(self, job_id: str, last_event_id: str) -> Iterator[httpx2.ServerSentEvent]:
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        timeout = httpx2.Timeout(TIMEOUT_S, read=READ_TIMEOUT_S)
        with self._http.sse(
            f"/jobs/{job_id}/events",
            headers=headers,
            timeout=timeout,
            max_event_size=None,  # a result may be larger than the default of 1 MiB
        ) as source:
            if source.response.status_code == 503:
                raise _Unavailable("the broker is away")
            if source.response.is_error:
                source.response.read()
                raise self._error(source.response)
            yield from source

    def _call(self, method: str, path: str, kind: type[T], content: bytes | None = None) -> T:
        with self._reachable():
            response = self._http.request(method, path, content=content)
        if response.is_error:
            raise self._error(response)
        try:
            return msgspec.json.decode(response.content, type=kind)
        except msgspec.DecodeError:
            raise CommandError(f"{self.url} is not a Sluice gateway", EXIT_UNREACHABLE) from None

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.TransportError, httpx2.UnsupportedProtocol) as error:
            raise CommandError(
                f"no gateway at {self.url}{via_proxy(self._proxy, self._host)} ({error}); "
                "start one with: sluice up",
                EXIT_UNREACHABLE,
            ) from None

    def _error(self, response: httpx2.Response) -> CommandError:
        try:
            problem = response.json()
            detail = problem["detail"] if isinstance(problem, dict) else response.text
            if (option := ON_THE_COMMAND_LINE.get(problem.get("param"))) is not None:
                detail += f" (on the command line: {option})"
        except (ValueError, KeyError, AttributeError):
            if self._proxy is not None:
                return CommandError(
                    f"{self.url} responded {response.status_code} {response.reason_phrase}"
                    f"{via_proxy(self._proxy, self._host)}, which is not a response of a gateway",
                    EXIT_UNREACHABLE,
                )
            detail = response.text or response.reason_phrase
        if response.status_code >= 500:
            return CommandError(detail, EXIT_UNREACHABLE)
        return CommandError(detail, EXIT_FAILED if response.status_code == 409 else EXIT_USAGE)


class _Unavailable(Exception):
    """The gateway is reachable, but its broker is away."""


def _dead_path(letter_id: str) -> str:
    # A request that was published by hand may have any id.
    return f"/dead/{quote(letter_id, safe='')}"


def _check_id(job_id: str) -> None:
    if not is_job_id(job_id):
        raise CommandError(f"{job_id!r} is not a job id", EXIT_USAGE)
