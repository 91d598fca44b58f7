"""The site as an attack sees it: where to send to, and what must hold after each case."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from tests.fuzz.accepted import Accepted
from tests.fuzz.findings import Findings
from tests.fuzz.site import Site
from tests.support.raw_nats import Closed, RawNats, stream_names

ENDS_WITHIN_S = 60.0
BACK_WITHIN_S = 8.0
"""How long a gateway or an inferer that was sent rubbish may take to answer again; it should be a
second, and the machine may be slow."""
ENDED = ("SUCCESS", "FAILURE", "REVOKED")
FAULTS_OF_OURS = ("internal_error", "unreadable_result")
MODEL = "tiny"


class Fault(Exception):
    """An answer that is not allowed; hypothesis searches for the smallest case that causes it."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


class Target:
    """Attacks send through this."""

    def __init__(self, site: Site, accepted: Accepted, findings: Findings) -> None:
        self.site = site
        self.cases = 0
        self._accepted = accepted
        self._findings = findings
        self._streams: list[str] = []
        self._https = [httpx2.Client(base_url=g.url, timeout=ENDS_WITHIN_S) for g in site.gateways]

    @contextmanager
    def case(self, name: str, case: object) -> Iterator[None]:
        """Around one case: nothing may die of it. Raises: Fault."""
        self.cases += 1
        self._findings.sent(f"{name}: {case!r}")
        deaths = len(self.site.deaths)
        yield
        while any(part.has_died for part in self.site.parts):
            time.sleep(0.02)  # it is noted, and started again
        for death in self.site.deaths[deaths:]:
            if not death.name.startswith("inferer"):  # that is judged with the job's end
                kind = f"{death.name.partition('-')[0]} died"
                raise Fault(kind, f"exit status {death.status}\n{death.tail}")

    @property
    def http(self) -> httpx2.Client:
        """A client of one gateway, then of the other."""
        return self._https[self.cases % len(self._https)]

    @property
    def url(self) -> str:
        gateways = self.site.gateways
        return gateways[self.cases % len(gateways)].url

    def nats(self) -> RawNats:
        return RawNats(self.site.node.port)

    def call(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        """Any answer but a crash. Raises: Fault."""
        try:
            answer = self.http.request(method, path, **arguments)
        except httpx2.TransportError as error:
            raise Fault("no answer over HTTP", f"{method} {path[:200]}: {error!r}") from None
        if answer.status_code in (500, 501, 502, 504):
            code = _code(answer)
            if code in FAULTS_OF_OURS or code is None:
                text = f"{method} {path[:200]}: {answer.text[:1000]}"
                raise Fault(f"HTTP {answer.status_code}", text)
        return answer

    def submit(self, body: Any, case: str, **headers: str) -> str | None:
        """The id of the job, if it is accepted."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = self.call("POST", "/jobs", content=data, headers=headers)
        if answer.status_code not in (200, 202):
            return None
        job_id = str(answer.json()["id"])
        self._accepted.add(job_id, case)
        return job_id

    def accepted(self, job_id: str, case: str) -> None:
        """A job whose id a client was given otherwise."""
        self._accepted.add(job_id, case)

    def end_of(self, job_id: str) -> dict[str, Any]:
        """The job's status once it has ended. Raises: Fault."""
        deadline = time.monotonic() + ENDS_WITHIN_S
        while True:
            answer = self.call("GET", f"/status/{job_id}")
            status: dict[str, Any] = answer.json()
            if status.get("state") in ENDED:
                break
            if time.monotonic() > deadline:
                raise Fault("a job does not end", f"{answer.status_code} {answer.text[:500]}")
            time.sleep(0.02)
        code = (status["error"] or {}).get("code")
        if code in (*FAULTS_OF_OURS, "worker_lost"):
            raise Fault(f"a job ended as {code}", json.dumps(status)[:1500])
        return status

    def events_of(self, job_id: str) -> str:
        """All events of a job that has ended, or will soon. Raises: Fault."""
        text = self.call("GET", f"/jobs/{job_id}/events").text
        if "event: result" not in text:
            raise Fault("events without a result", text[-500:])
        return text

    def require_hearing(self) -> None:
        """Both gateways and both inferers answer over NATS, every stream is there, and every page
        can be read. Raises: Fault."""
        deadline = time.monotonic() + BACK_WITHIN_S
        while deaf := self._deaf():
            if time.monotonic() > deadline:
                raise Fault(f"deaf: {deaf}", f"no answer over NATS within {BACK_WITHIN_S} s")
        with self.nats() as connection:
            streams = stream_names(connection)
        before, self._streams = self._streams or streams, streams
        if missing := sorted(set(before) - set(streams)):
            raise Fault("streams are gone", f"before {before}, now {streams}: {missing}")
        for client in self._https:
            for path in ("/readyz", "/queue", "/inferers", "/dead", "/v1/models"):
                self._require_page(client, path, deadline)

    def _require_page(self, client: httpx2.Client, path: str, deadline: float) -> None:
        while True:
            try:
                answer = client.get(path)
            except httpx2.TransportError as error:
                raise Fault("no answer over HTTP", f"GET {path}: {error!r}") from None
            if answer.status_code == 200:
                return
            if answer.status_code != 503 or time.monotonic() > deadline:
                raise Fault(f"{path} {answer.status_code}", answer.text[:500])
            time.sleep(0.1)

    def _deaf(self) -> str:
        """Who does not answer within a second; nobody, mostly."""
        waiting_for: dict[str, tuple[bytes, bytes, int]] = {
            "gateway": (b"$SRV.PING.sluice", b"", len(self.site.gateways))
        }
        for inferer in self.site.inferers:
            subject = f"infer.control.tiny.{inferer.name}".encode()
            waiting_for[inferer.name] = (subject, b'{"concurrency":2}', 1)
        with self.nats() as connection:
            for number, (subject, data, _) in enumerate(waiting_for.values()):
                inbox = b"_INBOX.fuzz.%d" % number
                connection.subscribe(inbox)
                connection.publish(subject, data, inbox)
            for number, (name, (_, _, count)) in enumerate(waiting_for.items()):
                try:
                    answers = connection.wait_for(b"_INBOX.fuzz.%d" % number, count, 1.0)
                except (TimeoutError, Closed):
                    return name
                if any(b" 503" in answer.headers[:20] for answer in answers):
                    time.sleep(0.1)
                    return name
        return ""


def _code(answer: httpx2.Response) -> str | None:
    """The error's code, in either form."""
    try:
        body = answer.json()
        error = body.get("error", body)
        return str(error["code"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
