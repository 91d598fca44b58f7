"""Jobs over HTTP, whose ends are waited for."""

import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.attacks.attack import attack
from tests.fuzz.inputs.bodies import openai_requests, submissions
from tests.fuzz.inputs.schemas import schemas
from tests.fuzz.inputs.texts import texts
from tests.fuzz.inputs.values import mangled, values
from tests.fuzz.target import Target


@attack(submissions())
def submit(target: Target, body: dict[str, Any]) -> None:
    """Whatever is accepted ends, and says how."""
    job_id = target.submit(body, f"submit {body!r}")
    if job_id is not None:
        target.end_of(job_id)


@attack(mangled(submissions()))
def submit_bytes(target: Target, body: bytes) -> None:
    job_id = target.submit(body, f"submit_bytes {body!r}")
    if job_id is not None:
        target.end_of(job_id)


@attack(schemas(), count=30)
def schema(target: Target, wanted: Any) -> None:
    """A schema is refused, or its job ends: it kills nobody."""
    body = {
        "prompt": "x",
        "max_tokens": 8,
        "timeout_s": 20,
        "response_format": {"type": "json_schema", "json_schema": {"schema": wanted}},
    }
    job_id = target.submit(body, f"schema {wanted!r}")
    if job_id is not None:
        target.end_of(job_id)


@attack(st.tuples(texts(), st.booleans()))
def prompt(target: Target, case: tuple[str, bool]) -> None:
    """A text is answered, as a prompt or as a conversation, and its events can be read."""
    text, chat = case
    asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    job_id = target.submit({**asked, "max_tokens": 3, "timeout_s": 30}, f"prompt {text[:400]!r}")
    if job_id is not None:
        target.end_of(job_id)
        target.events_of(job_id)


@attack(st.tuples(st.sampled_from(("chat/completions", "completions")), openai_requests()))
def openai(target: Target, case: tuple[str, dict[str, Any]]) -> None:
    path, body = case
    target.call("POST", f"/v1/{path}", content=json.dumps(body).encode())


@attack(values(), count=10)
def metadata(target: Target, value: Any) -> None:
    """Comes back as it was sent."""
    job_id = target.submit({"prompt": "a", "max_tokens": 1, "metadata": {"a": value}}, "metadata")
    if job_id is not None:
        target.end_of(job_id)
