"""The Celery application, in the environment of the peers: a task that generates text with
llama-cpp-python, and one that does nothing. A task is acknowledged when it has ended, and a process
takes one at a time."""

import os
from typing import Any

from celery import Celery
from celery.signals import worker_process_init
from llama_cpp import Llama

REDIS = os.environ["PEERS_REDIS"]
"""``redis://host:port``."""

app = Celery("peers", broker=f"{REDIS}/0", backend=f"{REDIS}/1")
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    # A process that loads a model is not up within the usual four seconds on a busy machine.
    worker_proc_alive_timeout=60,
    broker_connection_retry_on_startup=True,
)

models: list[Llama] = []
"""The model of this process, if it has one."""


@worker_process_init.connect
def load_model(**_: Any) -> None:
    path = os.environ.get("PEERS_MODEL")
    if path is None:
        return
    threads = int(os.environ["PEERS_THREADS"])
    n_ctx = int(os.environ["PEERS_N_CTX"])
    models.append(
        Llama(
            path,
            n_ctx=n_ctx,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,  # which llama.cpp itself, and so Sluice, uses by default
            verbose=False,
        )
    )


@app.task
def generate(prompt: str, max_tokens: int) -> dict[str, Any]:
    """The most probable text, as OpenAI's completion."""
    answer: dict[str, Any] = models[0].create_completion(
        prompt, max_tokens=max_tokens, temperature=0
    )
    return answer


@app.task
def nothing() -> None:
    pass
