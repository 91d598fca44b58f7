"""`sluice up` as a user starts it."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx2

from tests.support.processes import Child, clean_environment, eventually, scripts


class Up(Child):
    """One `sluice up` on free ports, with its stdout apart from its stderr."""

    def __init__(self, data: Path, model: Path | str, *options: str, **environment: str) -> None:
        self.data = data
        data.mkdir(exist_ok=True)
        number = len(list(data.glob("out-*")))
        self._out, log = data / f"out-{number}", data / f"err-{number}"
        command = [str(scripts() / "sluice"), "up", "--data", str(data), "--model", str(model)]
        with self._out.open("wb") as out, log.open("wb") as err:
            popen = subprocess.Popen(
                [*command, "--port", "0", "--nats-port", "0", *options],
                stdout=out,
                stderr=err,
                env={**clean_environment(), "INFERER_THREADS": "1", **environment},
            )
        super().__init__(popen, log)

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self.output()

    def wait_until_ready(self) -> "Up":
        def is_ready() -> bool:
            assert self.popen.poll() is None, self.stderr
            return self.stdout.endswith("\n")

        eventually(is_ready, f"ready\n{self.stderr}")
        word, self.url, self.nats_url = self.stdout.split()
        assert word == "ready"
        self.http = httpx2.Client(base_url=self.url, timeout=60)
        return self

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of this event, of all processes."""
        lines = [line for line in self.stderr.splitlines() if f'"event": "{name}"' in line]
        return [json.loads(line) for line in lines]

    def starts_of(self, child: str) -> list[int]:
        """The process id of each of the child's starts."""
        return [int(e["pid"]) for e in self.events("child_started") if e["child"] == child]

    def pid_of(self, child: str) -> int:
        """The process id of the child's last start."""
        return self.starts_of(child)[-1]

    def submit(self, **body: Any) -> str:
        answer = self.http.post("/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def wait_for_state(self, job_id: str, *states: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            found: dict[str, Any] = self.http.get(f"/status/{job_id}").json()
            return found if found.get("state") in states else None

        return eventually(reached, f"{job_id} is {states}\n{self.stderr}")

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """The exit status, within the promised 30 s."""
        self.popen.send_signal(signal_number)
        return self.popen.wait(30)

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.terminate()
            self.popen.wait(40)
