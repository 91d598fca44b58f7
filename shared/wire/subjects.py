"""Every subject, stream, bucket and header of the wire, version 2.

A job's subjects contain its model and end in its id: permissions can be granted for a model, and
the broker itself can answer what became of a job. In place of a model's name they contain the token
that is derived from it (`shared/model_names.py`).

Code that knows a job's model reads by the one subject. Code that knows an id alone reads by a
wildcard (the functions whose names end in ``_of``).
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from shared.model_names import is_token as is_model_token
from shared.model_names import token_of

WIRE_VERSION = "2"

REQUESTS = "REQUESTS"
STATES = "STATES"
EVENTS = "EVENTS"
RESULTS = "RESULTS"
DEAD = "DEAD"
KEPT = "KEPT"
INFERERS = "INFERERS"
IDEMPOTENCY = "IDEMPOTENCY"

PRIORITIES = ("high", "normal", "low")
"""The priorities, in the order in which they are served."""
NORMAL = "normal"

PUBLIC = "public"
"""The owner of every job, as long as there are no keys."""

# The broker renames the message's own reply field when it stores it, so the subject that waits
# for the answer travels in a header.
HEADER_REPLY_TO = "Reply-To"
HEADER_IDEMPOTENCY_KEY = "Idempotency-Key"
HEADER_DEADLINE = "Deadline"
HEADER_TRACEPARENT = "traceparent"
HEADER_TRACESTATE = "tracestate"
HEADER_VERSION = "Sluice-Version"
HEADER_NEAREST = "Sluice-Nearest"
HEADER_HANDED_OVER = "Sluice-Handed-Over"
HEADER_ACK = "Sluice-Ack"
HEADER_OFFER_ENDS = "Sluice-Offer-Ends"
HEADER_BUSY = "Sluice-Busy"
HEADER_SCHEDULE = "Nats-Schedule"
HEADER_SCHEDULE_TARGET = "Nats-Schedule-Target"
HEADER_SCHEDULER = "Nats-Scheduler"
HEADER_MSG_ID = "Nats-Msg-Id"
HEADER_EXPECTED_LAST = "Nats-Expected-Last-Subject-Sequence"
BROKERS_HEADERS = "nats-"
"""What the broker's own headers begin with, in lower case."""

# Every pull carries the group from the first version on: a consumer cannot change it later
# without the inferers changing at the same moment.
PRIORITY_GROUP = "g"

REQUESTS_WILDCARD = "infer.requests.*.*.*.*"
REQUESTS_STORED = [f"infer.requests.*.{priority}.*.*" for priority in PRIORITIES]
"""No consumer delivers what has another priority, so the stream does not take it."""
SCHEDULES_WILDCARD = "infer.schedule.*.*.*.*"
REQUESTS_V1_WILDCARD = "infer.requests.*.*.*"
"""Where clients of wire version 1 publish."""
STATES_WILDCARD = "infer.states.*.*"
DEATHS_WILDCARD = "infer.deaths.*.*"
EVENTS_WILDCARD = "infer.events.*.*.*"
RESULTS_WILDCARD = "infer.results.*.*"
FINISHED_WILDCARD = "infer.finished.*.*"
KEPT_WILDCARD = "infer.kept.*.*"
DEAD_WILDCARD = "infer.dead.*.*"
RETRY_WILDCARD = "infer.retry.*.*"
ACCEPTED_WILDCARD = "infer.accepted.*.*"
ORPHANS_WILDCARD = f"$KV.{IDEMPOTENCY}.orphan.*.*"
INFERERS_WILDCARD = f"$KV.{INFERERS}.*.*"
STREAM_ADVISORIES = "$JS.EVENT.ADVISORY.STREAM.*.*"
"""The broker says that a stream was created, deleted or changed. The name of the stream is last."""
CONSUMER_ADVISORIES = [
    f"$JS.EVENT.ADVISORY.CONSUMER.{change}.{REQUESTS}.*" for change in ("CREATED", "DELETED")
]

LONGEST_ID = 256
"""Bytes of an id from outside: the broker limits the length of subjects made of it."""

_TOKEN = re.compile(r"[^\s.*>]+")


def is_token(text: str) -> bool:
    """Whether ``text`` can be one token of a subject."""
    return _TOKEN.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Whether ``text`` can be the id of a job, or an owner."""
    return is_token(text) and len(text.encode()) <= LONGEST_ID


class RequestSubject(NamedTuple):
    """What the subject of a request says, or that of a request whose retry is scheduled."""

    model: str
    """Its token."""
    priority: str
    owner: str
    job_id: str
    is_scheduled: bool = False

    @classmethod
    def parse(cls, subject: str) -> "RequestSubject":
        """Raises: ValueError: the subject is not of that form."""
        parts = subject.split(".")
        is_request = len(parts) == 6 and parts[0] == "infer" and parts[1] in _KINDS
        # The broker stores messages on subjects with wildcards too, and reads those as patterns.
        if not (is_request and is_model_token(parts[2]) and all(map(is_id, parts[4:]))):
            raise ValueError(f"not the subject of a request: {subject[:LONGEST_ID]}")
        model, priority, owner, job_id = parts[2:]
        return cls(model, priority, owner, job_id, parts[1] == "schedule")

    @property
    def request(self) -> str:
        """Where the request waits in its queue."""
        return f"infer.requests.{self.model}.{self.priority}.{self.owner}.{self.job_id}"

    @property
    def schedule(self) -> str:
        """Where the request waits for its retry; then the broker puts it back on the queue."""
        return f"infer.schedule.{self.model}.{self.priority}.{self.owner}.{self.job_id}"


_KINDS = ("requests", "schedule")


def request(model: str, job_id: str, priority: str = NORMAL, owner: str = PUBLIC) -> str:
    return RequestSubject(token_of(model), priority, owner, job_id).request


def request_of(job_id: str) -> str:
    return f"infer.requests.*.*.*.{job_id}"


def model_requests(model: str, priority: str = NORMAL) -> str:
    return f"infer.requests.{token_of(model)}.{priority}.*.*"


def schedule_of(job_id: str) -> str:
    return f"infer.schedule.*.*.*.{job_id}"


def retry(model: str, job_id: str) -> str:
    """Asks a gateway to schedule the job's next attempt; answered once that is stored."""
    return f"infer.retry.{token_of(model)}.{job_id}"


def accepted(model: str, job_id: str) -> str:
    """Where the broker announces each request that it has stored, without its body."""
    return f"infer.accepted.{token_of(model)}.{job_id}"


def consumer(model: str, priority: str) -> str:
    """The durable that holds a model's jobs of one priority: for the normal one the model's token
    itself."""
    token = token_of(model)
    return token if priority == NORMAL else f"{token}+{priority}"


def parse_consumer(name: str) -> tuple[str, str]:
    """``(token of the model, priority)`` of a consumer of REQUESTS.

    Raises:
        ValueError: it is not a model's.
    """
    model, plus, priority = name.partition("+")
    priority = priority if plus else NORMAL
    if not is_model_token(model) or priority not in PRIORITIES or name != consumer(model, priority):
        raise ValueError(f"not a model's consumer: {name}")
    return model, priority


def state(model: str, job_id: str) -> str:
    """Where the job's last state before its result is stored; see `StateEvent`."""
    return f"infer.states.{token_of(model)}.{job_id}"


def state_of(job_id: str) -> str:
    return f"infer.states.*.{job_id}"


def death(model: str, inferer_id: str) -> str:
    """How an inferer died."""
    return f"infer.deaths.{token_of(model)}.{inferer_id}"


def state_events(model: str, job_id: str) -> str:
    """Each event of a job's life, in order with its tokens, for those who follow it."""
    return f"infer.events.{token_of(model)}.{job_id}.state"


def token_events(model: str, job_id: str) -> str:
    return f"infer.events.{token_of(model)}.{job_id}.tokens"


def state_events_of(job_id: str) -> str:
    return f"infer.events.*.{job_id}.state"


def events(model: str, job_id: str) -> str:
    return f"infer.events.{token_of(model)}.{job_id}.*"


def events_of(job_id: str) -> str:
    return f"infer.events.*.{job_id}.*"


def result(model: str, job_id: str) -> str:
    return f"infer.results.{token_of(model)}.{job_id}"


def result_of(job_id: str) -> str:
    return f"infer.results.*.{job_id}"


def finished(model: str, job_id: str) -> str:
    """Where the broker announces the result it *stored*; a refused second one never shows here."""
    return f"infer.finished.{token_of(model)}.{job_id}"


def cancel(model: str, job_id: str) -> str:
    return f"infer.cancel.{token_of(model)}.{job_id}"


def cancels(model: str) -> str:
    return f"infer.cancel.{token_of(model)}.*"


def control(model: str, inferer_id: str) -> str:
    """Commands to one inferer, each answered."""
    return f"infer.control.{token_of(model)}.{inferer_id}"


def without_brokers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that may be sent on: the broker takes some of its own as commands."""
    return {
        name: value
        for name, value in headers.items()
        if not name.lower().startswith(BROKERS_HEADERS)
    }


def handover(model: str, inferer_id: str) -> str:
    """Offers of jobs that another inferer has pulled, and whose prefix this one has in its cache.
    The answer says whether it takes the job."""
    return f"infer.handover.{token_of(model)}.{inferer_id}"


def overlap(model: str, inferer_id: str) -> str:
    """Which other inferers share CPUs with this one, as a gateway has found."""
    return f"infer.overlap.{token_of(model)}.{inferer_id}"


def inferer(model: str, inferer_id: str) -> str:
    """The key of an inferer's entry."""
    return f"$KV.{INFERERS}.{token_of(model)}.{inferer_id}"


def dead(model: str, job_id: str) -> str:
    return f"infer.dead.{token_of(model)}.{job_id}"


def dead_of(job_id: str) -> str:
    return f"infer.dead.*.{job_id}"


def kept(model: str, job_id: str) -> str:
    """A copy of the request, for those who look at the job when it has ended."""
    return f"infer.kept.{token_of(model)}.{job_id}"


def kept_of(job_id: str) -> str:
    return f"infer.kept.*.{job_id}"


def idempotency(key_hash: str) -> str:
    """A key's entry; hashed, as a key may be anything and a token of a subject may not."""
    return f"$KV.{IDEMPOTENCY}.{key_hash}"


def orphan(request_hash: str, job_id: str) -> str:
    """The entry of a job whose client reached its timeout and may send the request again."""
    return f"$KV.{IDEMPOTENCY}.orphan.{request_hash}.{job_id}"


def orphans(request_hash: str) -> str:
    """The jobs that one request and owner left."""
    return orphan(request_hash, "*")


def model_and_id(subject: str) -> tuple[str, str]:
    """``(token of the model, id)`` of the subject of a result, a state, a dead letter, a death, an
    announcement, a command or an inferer's entry: of all that end in both."""
    model, job_id = subject.rsplit(".", 2)[-2:]
    return model, job_id
