"""Every subject, stream, bucket and header of the wire, version 1.

A job's subjects end in its id, so the broker itself can answer what became of it. Of a model they
hold the token that is derived from its name.
"""

import re

from shared.model_names import is_token as is_model_token
from shared.model_names import token_of

WIRE_VERSION = "1"

REQUESTS = "REQUESTS"
EVENTS = "EVENTS"
RESULTS = "RESULTS"
DEAD = "DEAD"
INFERERS = "INFERERS"
IDEMPOTENCY = "IDEMPOTENCY"

CLASSES = ("high", "normal", "low")
"""The ranks of jobs, in the order in which they are served."""
CLASS_NORMAL = "normal"

# The broker renames the message's own reply field when it stores it, so the subject that waits
# for the answer travels in a header.
HEADER_REPLY_TO = "Reply-To"
HEADER_IDEMPOTENCY_KEY = "Idempotency-Key"
HEADER_DEADLINE = "Deadline"
HEADER_TRACEPARENT = "traceparent"
HEADER_VERSION = "Sluice-Version"
HEADER_SCHEDULE = "Nats-Schedule"
HEADER_SCHEDULE_TARGET = "Nats-Schedule-Target"
HEADER_SCHEDULER = "Nats-Scheduler"
HEADER_MSG_ID = "Nats-Msg-Id"
HEADER_EXPECTED_LAST = "Nats-Expected-Last-Subject-Sequence"
BROKERS_HEADERS = "nats-"
"""What the broker's own headers begin with, in lower case; they are never sent on."""

# Every pull carries the group from the first version on: a consumer cannot change it later
# without the inferers changing at the same moment.
PRIORITY_GROUP = "g"

FINISHED_WILDCARD = "infer.finished.*"
CANCEL_WILDCARD = "infer.cancel.*"
DEAD_WILDCARD = "infer.dead.*.*"
INFERER_DEATH_WILDCARD = "infer.events.*.died"

LONGEST_ID = 256
"""Bytes of an id from outside: the broker limits the length of subjects made of it."""

_TOKEN = re.compile(r"[^\s.*>]+")


def is_token(text: str) -> bool:
    """Whether ``text`` can stand for itself alone as a part of a subject."""
    return _TOKEN.fullmatch(text) is not None


def request(model: str, job_id: str, job_class: str = CLASS_NORMAL) -> str:
    return f"infer.requests.{token_of(model)}.{job_class}.{job_id}"


def request_of(job_id: str) -> str:
    """The filter that finds a waiting request when only its id is known."""
    return f"infer.requests.*.*.{job_id}"


def model_requests(model: str, job_class: str = CLASS_NORMAL) -> str:
    return f"infer.requests.{token_of(model)}.{job_class}.*"


def consumer(model: str, job_class: str) -> str:
    """The durable that holds a model's jobs of one class: the model's own token for the normal."""
    token = token_of(model)
    return token if job_class == CLASS_NORMAL else f"{token}+{job_class}"


def parse_consumer(name: str) -> tuple[str, str]:
    """``(token of the model, class)`` of a consumer of REQUESTS.

    Raises:
        ValueError: it is none of ours.
    """
    model, plus, job_class = name.partition("+")
    job_class = job_class if plus else CLASS_NORMAL
    if not is_model_token(model) or job_class not in CLASSES or name != consumer(model, job_class):
        raise ValueError(f"not a model's consumer: {name}")
    return model, job_class


def parse_request(subject: str) -> tuple[str, str, str]:
    """``(token of the model, class, job id)`` of a request's subject.

    Raises:
        ValueError: the subject is not of that form.
    """
    parts = subject.split(".")
    is_request = len(parts) == 5 and parts[:2] == ["infer", "requests"]
    if not is_request or len(parts[4].encode()) > LONGEST_ID:
        raise ValueError(f"not the subject of a request: {subject}")
    return parts[2], parts[3], parts[4]


def schedule(model: str, job_id: str, job_class: str = CLASS_NORMAL) -> str:
    """Where a request waits for its next attempt; the broker puts it back on the queue then."""
    return f"infer.schedule.{token_of(model)}.{job_class}.{job_id}"


def schedule_of(job_id: str) -> str:
    """The filter that finds a request's schedule when only its id is known."""
    return f"infer.schedule.*.*.{job_id}"


def state_events(job_id: str) -> str:
    return f"infer.events.{job_id}.state"


def token_events(job_id: str) -> str:
    return f"infer.events.{job_id}.tokens"


def events(job_id: str) -> str:
    return f"infer.events.{job_id}.*"


def inferer_death(inferer_id: str) -> str:
    """How an inferer died; kept as long as the events of jobs."""
    return f"infer.events.{inferer_id}.died"


def result(job_id: str) -> str:
    return f"infer.results.{job_id}"


def finished(job_id: str) -> str:
    """Where the broker announces the result it *stored*; a refused second one never shows here."""
    return f"infer.finished.{job_id}"


def cancel(job_id: str) -> str:
    return f"infer.cancel.{job_id}"


def control(inferer_id: str) -> str:
    """Orders to one inferer, each answered."""
    return f"infer.control.{inferer_id}"


def inferer(inferer_id: str) -> str:
    """The key of an inferer's entry."""
    return f"$KV.{INFERERS}.{inferer_id}"


def dead(model: str, job_id: str) -> str:
    return f"infer.dead.{token_of(model)}.{job_id}"


def idempotency(key_hash: str) -> str:
    """A key's entry; hashed, as a key may be anything and a token of a subject may not."""
    return f"$KV.{IDEMPOTENCY}.{key_hash}"


def dead_of(job_id: str) -> str:
    """The filter that finds a dead letter when only its id is known."""
    return f"infer.dead.*.{job_id}"


def last_token(subject: str) -> str:
    """The job id of any subject that ends in one."""
    return subject.rpartition(".")[2]
