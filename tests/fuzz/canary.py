"""A small job every few seconds, as an innocent user's: it must complete, whatever else is sent."""

import threading
import time
from typing import Self

import httpx2

from tests.fuzz.accepted import Accepted
from tests.fuzz.findings import Findings
from tests.fuzz.site import Site
from tests.fuzz.target import ENDED

EVERY_S = 3.0
COMPLETES_WITHIN_S = 90.0
ACCEPTED_WITHIN_S = 20.0


class Canary:
    """Sings for as long as the block, on a thread of its own."""

    def __init__(self, site: Site, accepted: Accepted, findings: Findings) -> None:
        self.completed = 0
        self.slowest_s = 0.0
        self._clients = [httpx2.Client(base_url=g.url, timeout=30) for g in site.gateways]
        self._accepted = accepted
        self._findings = findings
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._sing, name="canary")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        for client in self._clients:
            client.close()

    def _sing(self) -> None:
        turn = 0
        while not self._ending.wait(EVERY_S):
            turn += 1
            began = time.monotonic()
            try:
                self._complete(self._clients[turn % 2], began)
            except TimeoutError as error:
                self._findings.add("a canary job does not complete", str(error))
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def _complete(self, http: httpx2.Client, began: float) -> None:
        """Raises: TimeoutError."""
        body = {"prompt": "canary", "max_tokens": 3}
        submitted = self._until(http, "POST", "/jobs", 202, began + ACCEPTED_WITHIN_S, json=body)
        job_id = str(submitted["id"])
        self._accepted.add(job_id, "canary")
        while True:
            deadline = began + COMPLETES_WITHIN_S
            status = self._until(http, "GET", f"/status/{job_id}", 200, deadline)
            if status["state"] in ENDED:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job_id}: {status}")
            time.sleep(0.05)
        if status["state"] == "SUCCESS":
            self.completed += 1
        else:
            self._findings.add("a canary job failed", str(status))

    def _until(
        self,
        http: httpx2.Client,
        method: str,
        path: str,
        status: int,
        deadline: float,
        **arguments: object,
    ) -> dict[str, object]:
        """The answer with this status. Raises: TimeoutError."""
        while True:
            try:
                answer = http.request(method, path, **arguments)  # type: ignore[arg-type]
                printed = f"{answer.status_code} {answer.text[:300]}"
                if answer.status_code == status:
                    found: dict[str, object] = answer.json()
                    return found
            except httpx2.TransportError as error:
                printed = repr(error)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{method} {path}: {printed}")
            time.sleep(0.2)
