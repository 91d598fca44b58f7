"""What pages take for granted: files, and jobs in a certain state."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import httpx2

from shared.broker.connection import Broker
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.requests import InferenceRequest
from shared.wire.results import DeadLetter
from tests.docs.shell import Shell
from tests.support.hub import Hub
from tests.support.lora import write_lora
from tests.support.pooled_models import write_bert

REQUEST = InferenceRequest(task="complete", prompt="hi", max_tokens=2)
LONG = {"prompt": "hi", "max_tokens": 3000, "ignore_eos": True}
"""Seconds of work."""
PLACEHOLDERS = (
    "019c13ec-9e00-73e8-9c90-bbeed056cd24",
    "01a21095-ac1b-7a2d-babd-f6d9b69dcf71",
    "019c13ec",
)
"""Ids on pages. Each stands for one of the page's stage."""


def files(folder: Path, tiny: Path, hub: Hub) -> None:
    """Those that pages name, in the reader's clone and home."""
    home_models = folder / "models"
    home_models.mkdir()
    for name in (
        "base.gguf",
        "larger-q4_0.gguf",
        "smaller-q8_0.gguf",
        "models/mine.gguf",
        "models/coder.gguf",
    ):
        shutil.copy(tiny, folder / name)
    (folder / "adapters").mkdir()
    for seed, name in enumerate(("legal", "support-v2")):
        write_lora(folder / f"adapters/{name}.gguf", seed=seed)
    write_bert(folder / "all-minilm-l6-v2.gguf", gguf.PoolingType.MEAN)
    write_bert(folder / "bge-reranker.gguf", gguf.PoolingType.RANK)
    hub.repositories["owner/repo"] = {"model-Q4_K_M.gguf": tiny.read_bytes()}


def a_job_that_ended(shell: Shell) -> str:
    job = _submit(shell, {"prompt": "hi", "max_tokens": 3}, prefer="wait=60")
    return str(job["id"])


def a_dead_letter(shell: Shell) -> str:
    return asyncio.run(_bury(shell.nats_url))


def waiting_jobs(shell: Shell) -> str:
    """Three jobs wait while one runs; the id of the second of them."""
    jobs = [_submit(shell, LONG) for _ in range(4)]
    return str(jobs[2]["id"])


def jobs_without_inferer(shell: Shell) -> str:
    shell.start_stack("sluice up --inferers 0 --data without-inferer")
    jobs = [_submit(shell, {"prompt": "hi", "model": "smollm2"}) for _ in range(2)]
    return str(jobs[0]["id"])


def jobs_that_wait(shell: Shell) -> str:
    shell.start_stack("sluice up --data waiting")
    return waiting_jobs(shell)


def broker_away(shell: Shell) -> str:
    shell.end_stack()
    return ""


STAGES: dict[tuple[str, str], Callable[[Shell], str]] = {
    ("docs/how-to/find-jobs.md", "sluice job "): a_job_that_ended,
    ("docs/how-to/find-jobs.md", "curl http://127.0.0.1:5001/dead/drop"): a_dead_letter,
    ("docs/how-to/failed-jobs.md", "dead list"): a_dead_letter,
    ("docs/how-to/failed-jobs.md", "dead drop"): a_dead_letter,
    ("docs/how-to/nats-cli.md", "nats consumer ls"): a_job_that_ended,
    ("docs/troubleshooting.md", "sluice status"): waiting_jobs,
    ("docs/troubleshooting.md", "sluice queue"): jobs_without_inferer,
    ("docs/troubleshooting.md", "nats consumer report"): jobs_that_wait,
    ("docs/troubleshooting.md", "broker: no answer"): broker_away,
}
"""By the page and a part of the command, or of what it shows, before which it is prepared. The id
that it returns takes the place of `PLACEHOLDERS` and of ``$id`` from there on."""


def _submit(shell: Shell, body: dict[str, object], prefer: str = "") -> dict[str, object]:
    headers = {"Prefer": prefer} if prefer else {}
    answer = httpx2.post(f"{shell.url}/jobs", json=body, headers=headers, timeout=90)
    answer.raise_for_status()
    found: dict[str, object] = answer.json()
    return found


async def _bury(nats_url: str) -> str:
    broker = Broker(BrokerSettings(url=nats_url), "test")
    await broker.connect()
    letter = DeadLetter(
        id=new_job_id(),
        model="smollm2",
        code="model_error",
        message="llama.cpp failed",
        attempts=3,
        at=timestamp(),
        request=encode(REQUEST).decode(),
    )
    await broker.js.publish(subjects.dead("smollm2", letter.id), encode(letter))
    await broker.close()
    return letter.id
