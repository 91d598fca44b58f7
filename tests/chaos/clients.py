"""Clients that do not give up: refused or cut off at one gateway, they go to the other."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from itertools import cycle
from typing import Any, Self

import httpx2
from nats.micro.request import ERROR_CODE_HEADER

from shared.broker.connection import Broker
from shared.broker.refusals import TRANSIENT
from shared.config import BrokerSettings
from shared.wire import subjects
from shared.wire.api import JobStatus
from shared.wire.codecs import decode_result, encode
from tests.chaos.errands import EXPECTED_FAILURES, Errand
from tests.chaos.ledger import Ledger
from tests.chaos.store import queued

AT_ONCE = 60
PATIENCE_S = 100.0
"""How long an errand may take after its job has left the queue: some elections."""
QUEUED_S = 600.0
"""How long its job may be in the queue: that depends on the machine, above all for low priority."""
LOOK_EVERY_S = 1.0

READ_TIMEOUT_S = 45.0
"""Longer than a gateway waits for a broker that elects."""

COME_AGAIN = (429, 503)
NATS_TIMEOUT_S = 20.0
PAUSE_S = 0.2
ENDED = ("SUCCESS", "FAILURE", "REVOKED")
CHANGES_TRAINS = 0.05
"""How likely a reader of events hangs up after any of them, to go on at the other gateway."""


def _now() -> float:
    return asyncio.get_running_loop().time()


class Unserved(Exception):
    """A client got an answer that it should not get; the ledger has it."""


class Clients:
    """Run errands against the gateways, and write into the ledger whatever they answer."""

    def __init__(self, urls: list[str], nats_url: str, ledger: Ledger) -> None:
        self._urls = urls
        self._ledger = ledger
        self._places = asyncio.Semaphore(AT_ONCE)
        self._waiting: dict[Client, tuple[asyncio.Timeout, float]] = {}
        """Their timeouts, and how far these may be extended."""
        self._nats = Broker(BrokerSettings(url=nats_url), "clients")
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(READ_TIMEOUT_S, connect=5),
            limits=httpx2.Limits(),  # none
        )

    async def __aenter__(self) -> Self:
        await self._nats.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._nats.close()
        await self._http.aclose()

    async def run(self, errands: Iterator[Errand]) -> None:
        async with asyncio.TaskGroup() as outer:
            extending = outer.create_task(self._extend_patience())
            async with asyncio.TaskGroup() as group:
                for errand in errands:
                    group.create_task(self._run(errand))
            extending.cancel()

    def client(self, errand: Errand) -> "Client":
        return Client(self._http, self._nats, self._urls, self._ledger, errand)

    async def _run(self, errand: Errand) -> None:
        await asyncio.sleep(errand.starts_at_s)
        async with self._places:
            client = self.client(errand)
            try:
                async with asyncio.timeout(PATIENCE_S) as patience:
                    self._waiting[client] = patience, _now() + QUEUED_S
                    await getattr(client, errand.kind)()
            except Unserved:
                pass
            except TimeoutError:
                self._ledger.gave_up(errand, client.job_id)
            finally:
                del self._waiting[client]

    async def _extend_patience(self) -> None:
        """Have those wait whose jobs are in the queue; a caller over NATS does not know its job."""
        while True:
            jobs = set(await queued(self._nats))
            for client, (patience, latest) in self._waiting.items():
                is_queued = bool(jobs) if client.job_id is None else client.job_id in jobs
                if is_queued and not patience.expired():
                    patience.reschedule(min(_now() + PATIENCE_S, latest))
            await asyncio.sleep(LOOK_EVERY_S)


class Client:
    """One errand; the kinds of errands are its public methods."""

    def __init__(
        self,
        http: httpx2.AsyncClient,
        nats: Broker,
        urls: list[str],
        ledger: Ledger,
        errand: Errand,
    ) -> None:
        self.job_id: str | None = None
        self._http = http
        self._nats = nats
        self._ledger = ledger
        self._errand = errand
        self._random = errand.random
        # Each starts at either gateway, and goes to the other one with every call.
        self._gateways = cycle(self._random.sample(urls, len(urls)))

    async def waits(self) -> None:
        await self._submit(Prefer=f"respond-async, wait={self._random.randint(1, 15)}")
        await self._poll()

    async def reads(self) -> None:
        await self._submit()
        await self._follow()

    async def polls(self) -> None:
        await self._submit()
        await self._poll()

    async def cancels(self) -> None:
        await self._submit()
        await asyncio.sleep(self._random.expovariate(1))
        answer = await self._call("DELETE", f"/jobs/{self.job_id}")
        if answer.status_code == 200:
            self._heard("DELETE", answer.json())
        elif answer.status_code != 409:
            raise self._refused("DELETE", answer)
        await self._poll()

    async def hurries(self) -> None:
        await self.polls()

    async def asks_too_much(self) -> None:
        await self.polls()

    async def repeats(self) -> None:
        """The same key at both gateways at once, and again later: always the same job."""
        await asyncio.gather(*(self._submit(**self._key) for _ in range(2)))
        await asyncio.sleep(self._random.uniform(0, 3))
        await self._submit(**self._key)
        other = self._errand.body | {"seed": 1}
        answer = await self._call("POST", "/jobs", json=other, headers=self._key)
        if answer.status_code != 422:
            raise self._refused("another request under the same key", answer)
        await self._poll()

    async def completes(self) -> None:
        """In OpenAI's words, with a key to come back with."""
        chat = "messages" in self._errand.body
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = {name: self._errand.body[name] for name in self._errand.body if name != "priority"}
        answer = await self._call("POST", path, json=body, headers=self._key)
        if answer.status_code != 200:
            if answer.json()["error"]["code"] in EXPECTED_FAILURES:
                return
            raise self._refused(path, answer)
        completion = answer.json()
        self._accepted(completion["id"].partition("-")[2])
        self._ledger.readings += 1
        (choice,) = completion["choices"]
        self._read_all(choice["message"]["content"] if chat else choice["text"])

    async def asks(self) -> None:
        """Request and reply over NATS, with a key to ask again with."""
        name = "chat" if "messages" in self._errand.body else "complete"
        while True:
            try:
                answer = await self._nats.nc.request(
                    f"infer.{name}",
                    json.dumps(self._errand.body).encode(),
                    NATS_TIMEOUT_S,
                    headers=self._key,
                )
            except TRANSIENT as error:
                self._ledger.repeated[f"NATS {type(error).__name__}"] += 1
            else:
                code = (answer.headers or {}).get(ERROR_CODE_HEADER)
                if code is None:
                    break
                if int(code) not in COME_AGAIN:
                    raise self._odd(f"infer.{name}", f"{code} {answer.headers}")
                self._ledger.repeated[f"NATS {code}"] += 1
            await asyncio.sleep(PAUSE_S)
        result = decode_result(answer.data)
        self._accepted(result.id)
        self._heard(f"infer.{name}", json.loads(encode(JobStatus.of(result))))

    async def leaves(self) -> None:
        """Nobody learns the id; what became of the job shows in the results."""
        with contextlib.suppress(TimeoutError, httpx2.TransportError):
            async with asyncio.timeout(self._random.uniform(0.1, 1.5)):
                await self._http.post(
                    f"{next(self._gateways)}/jobs",
                    json=self._errand.body,
                    headers={"Prefer": "wait=30"},
                )

    @property
    def _key(self) -> dict[str, str]:
        return {subjects.HEADER_IDEMPOTENCY_KEY: f"errand {self._errand.number}"}

    async def _submit(self, **headers: str) -> None:
        """Until one is accepted. One whose answer was lost may run too: nobody knows its id."""
        headers = {"Prefer": "respond-async"} | headers
        answer = await self._call("POST", "/jobs", json=self._errand.body, headers=headers)
        if answer.status_code not in (200, 202):
            raise self._refused("POST", answer)
        self._accepted(answer.json()["id"])
        if answer.status_code == 200:
            self._heard("POST", answer.json())

    def _accepted(self, job_id: str) -> None:
        self.job_id = job_id
        self._ledger.accept(self._errand, job_id)

    async def _poll(self) -> None:
        while True:
            answer = await self._call("GET", f"/status/{self.job_id}")
            if answer.status_code != 200:
                raise self._refused("/status", answer)
            if answer.json()["state"] in ENDED:
                self._heard("/status", answer.json())
                return
            await asyncio.sleep(self._random.uniform(0.1, 1))

    async def _follow(self) -> None:
        text, last_id = "", ""
        while True:
            url = f"{next(self._gateways)}/jobs/{self.job_id}/events"
            headers = {"Last-Event-ID": last_id} if last_id else {}
            with contextlib.suppress(httpx2.TransportError):
                async with self._http.stream("GET", url, headers=headers) as response:
                    if response.status_code == 200:
                        self._ledger.readings += 1
                        async for event in httpx2.EventSource(response, max_event_size=None):
                            text, last_id = self._read(event, text), event.id
                            if event.event == "result":
                                return
                            if self._random.random() < CHANGES_TRAINS:
                                break
                    elif response.status_code not in COME_AGAIN:
                        await response.aread()
                        raise self._refused("/events", response)
            await asyncio.sleep(PAUSE_S)

    def _read(self, event: httpx2.ServerSentEvent, text: str) -> str:
        """The answer so far, after one more event."""
        if event.event == "tokens":
            return text + str(json.loads(event.data)["text"])
        if event.event == "retrying":
            return ""
        if event.event == "result":
            self._heard("/events", json.loads(event.data))
            self._read_all(text)
        return text

    async def _call(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        """The first answer of any gateway that is not "come again"."""
        while True:
            url = next(self._gateways) + path
            try:
                answer = await self._http.request(method, url, **arguments)
            except httpx2.TransportError as error:
                self._ledger.repeated[f"{method} {type(error).__name__}"] += 1
            else:
                if answer.status_code not in COME_AGAIN:
                    return answer
                self._ledger.repeated[f"{method} {answer.status_code}"] += 1
            await asyncio.sleep(PAUSE_S)

    def _heard(self, where: str, status: dict[str, Any]) -> None:
        assert self.job_id is not None
        self._ledger.answers.append((self.job_id, where, status))

    def _read_all(self, text: str) -> None:
        assert self.job_id is not None
        self._ledger.texts[self.job_id] = text

    def _refused(self, where: str, answer: httpx2.Response) -> Unserved:
        return self._odd(where, f"{answer.status_code}: {answer.text[:200]}")

    def _odd(self, where: str, answer: str) -> Unserved:
        """No client should get this answer; one that does leaves."""
        self._ledger.oddities.append(
            f"errand {self._errand.number} ({self._errand.kind}), job {self.job_id}: {where} "
            f"answered {answer}"
        )
        return Unserved()
