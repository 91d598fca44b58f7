"""``make schemathesis``: the gateway of a real stack against its own OpenAPI document.

Schemathesis sends what the document allows, what it almost allows and what it does not, in sequence
too, and holds every answer against the document. Exit status 0 if it has found nothing.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

from tests.support.processes import ROOT, Stack, end_on_sigterm
from tests.support.tiny_model import write_tiny_model

COMMAND = ROOT / ".venv/schemathesis/bin/schemathesis"
CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
N_CTX = 128
"""Tokens: no job takes long, also one that asks for as many as there may be."""
REQUEST_TIMEOUT_S = 120
SLACK_S = 240
"""What the run may take beyond its time, to end what it has begun."""
RESPONSES = 20
DELETED_RESPONSES = 200
"""As many as may be deleted one by one; they are not among the others."""


def examine(url: str, folder: Path, seconds: int, seed: int) -> "subprocess.CompletedProcess[str]":
    """Run Schemathesis against the gateway at ``url`` for about so long. It leaves what it keeps
    in ``folder``."""
    assert COMMAND.exists(), f"{COMMAND} is missing: run `make .venv/schemathesis/.ready`"
    configuration = Path(shutil.copy(CONFIGURATION, folder))
    with _open_slots(url):
        _write_dictionaries(url, folder)
        return subprocess.run(
            [
                *(str(COMMAND), "--config-file", str(configuration)),
                *("run", f"{url}/schema/openapi.json", "--no-color", "--continue-on-failure"),
                *("--max-time", str(seconds), "--seed", str(seed)),
                *("--request-timeout", str(REQUEST_TIMEOUT_S)),
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds + SLACK_S,
        )


def _write_dictionaries(url: str, folder: Path) -> None:
    """The ids of jobs and responses that there are, since no random one would be. The
    configuration names the files."""
    body = {"input": "a", "max_output_tokens": 4}
    with httpx2.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False) as http:

        def response() -> str:
            return str(http.post("/v1/responses", json=body).raise_for_status().json()["id"])

        responses = [response() for _ in range(RESPONSES)]
        cancelled = http.post("/v1/responses", json={**body, "background": True})
        responses.append(cancelled.raise_for_status().json()["id"])
        http.post(f"/v1/responses/{responses[-1]}/cancel")
        deleted = [response() for _ in range(DELETED_RESPONSES)]
    jobs = [id.removeprefix("resp_") for id in responses]
    for name, ids in (("responses", responses), ("deleted", deleted), ("jobs", jobs)):
        (folder / f"{name}.dict").write_text("".join(f'"{id}"\n' for id in ids))


@contextmanager
def _open_slots(url: str) -> Iterator[None]:
    """`PUT /concurrency` may close the only slot, and the next request would wait for ever: open it
    again all the time."""
    ended = threading.Event()

    def keep_open() -> None:
        with httpx2.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False) as http:
            while not ended.wait(1):
                with suppress(httpx2.HTTPError):
                    http.put("/concurrency", json={"concurrency": 1})

    opener = threading.Thread(target=keep_open)
    opener.start()
    try:
        yield
    finally:
        ended.set()
        opener.join()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make schemathesis", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sluice-schemathesis-") as name:
        folder = Path(name)
        with Stack(folder) as stack:
            stack.start_gateway()
            stack.start_inferer(write_tiny_model(folder / "tiny.gguf"), INFERER_N_CTX=str(N_CTX))
            stack.wait_until_served("tiny")
            ended = examine(stack.url, folder, round(options.minutes * 60), options.seed)
            crashes = stack.gateways[0].events("request_crashed")
    print(ended.stdout)
    for crash in crashes:
        print(f"the gateway crashed at {crash['path']}: {crash}")
    return ended.returncode or bool(crashes)


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
