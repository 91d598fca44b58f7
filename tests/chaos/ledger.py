"""What was accepted, what clients were answered, and what was published, against what is stored."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from services.inferer.worker.retry_policy import is_retried
from shared.broker.results import decode_stored
from shared.wire.api import JobStatus
from shared.wire.codecs import encode
from shared.wire.results import Completed, Failed, Result
from tests.chaos.errands import EXPECTED_FAILURES, POISONED, Errand
from tests.chaos.store import Store
from tests.chaos.strike import Strike

ELECTION_S = 15.0
"""How long after a node is back announcements may still be missed."""


@dataclass(frozen=True)
class Problem:
    """Why the ledger does not balance. ``kind`` is one word, to search for."""

    kind: str
    text: str


@dataclass
class Ledger:
    """Filled while the run goes on; the last three fields at its end."""

    seed: int
    accepted: dict[str, Errand] = field(default_factory=dict)
    """By the ids that clients were given. A submit that got no answer counts for nothing."""
    answers: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """Every ended state any client saw: of which job, where, and its words."""
    texts: dict[str, str] = field(default_factory=dict)
    """What readers of events had in the end, from tokens alone."""
    strikes: list[Strike] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    """What nobody should see: ids that are not known, errors, processes that die by themselves."""
    unanswered: list[str] = field(default_factory=list)
    repeated: Counter[str] = field(default_factory=Counter)
    """Calls that clients had to make again, by what they got."""
    readings: int = 0
    announced: dict[str, set[tuple[int, bytes]]] = field(default_factory=dict)
    store: Store = field(default_factory=lambda: Store({}, 0, [], {}))
    finishes: Counter[str] = field(default_factory=Counter)
    """How many inferers say of a job that they finished it."""

    def accept(self, errand: Errand, job_id: str) -> None:
        """Once for each answer that says so; all those to one errand should name one job."""
        self.accepted[job_id] = errand

    def gave_up(self, errand: Errand, job_id: str | None) -> None:
        self.unanswered.append(f"errand {errand.number} ({errand.kind}), job {job_id}")

    @property
    def results(self) -> dict[str, Result]:
        """The first stored result of each job."""
        return {
            job_id: decode_stored(stored[0].subject, stored[0].data, datetime.now(UTC))
            for job_id, stored in self.store.results.items()
        }

    def problems(self) -> list[Problem]:
        """Nothing when the ledger balances."""
        return [
            *self._lost(),
            *self._doubled(),
            *self._announced_otherwise(),
            *self._missed(),
            *self._told_otherwise(),
            *self._read_otherwise(),
            *self._buried_otherwise(),
            *self._failed_otherwise(),
            *(Problem("unanswered", text) for text in self.unanswered),
            *(Problem("odd", text) for text in self.oddities),
        ]

    def _lost(self) -> Iterator[Problem]:
        """Every accepted job has a result, and the queue is empty."""
        for job_id, errand in self.accepted.items():
            if job_id not in self.store.results and job_id not in self.store.queued:
                yield Problem(
                    "lost", f"{job_id} (errand {errand.number}, {errand.kind}): accepted, no result"
                )
        for job_id in self.store.queued:
            yield Problem("stuck", f"{job_id} is still in the queue")

    def _doubled(self) -> Iterator[Problem]:
        """No job ever had a second stored result, not even for a moment."""
        now = sum(len(stored) for stored in self.store.results.values())
        if self.store.ever_stored != now:
            yield Problem(
                "doubled",
                f"{self.store.ever_stored} results were stored, only {now} are there: "
                "some were replaced",
            )
        for job_id, stored in self.store.results.items():
            if len(stored) > 1:
                yield Problem("doubled", f"{job_id} has {len(stored)} stored results")
        jobs_of = Counter(errand.number for errand in self.accepted.values())
        for number, count in jobs_of.items():
            if count > 1 and number >= 0:
                yield Problem("doubled", f"errand {number} was given {count} jobs")

    def _announced_otherwise(self) -> Iterator[Problem]:
        """What was announced of a job is its stored result, byte for byte, and nothing else."""
        for job_id, announcements in self.announced.items():
            sequences = sorted(sequence for sequence, _ in announcements)
            if len(announcements) > 1:
                yield Problem("doubled", f"{job_id} was announced with sequences {sequences}")
            stored = {(one.sequence, one.data) for one in self.store.results.get(job_id, [])}
            if not announcements <= stored:
                yield Problem(
                    "differs", f"{job_id}: announced with {sequences}, but that is not stored"
                )

    def _missed(self) -> Iterator[Problem]:
        """A job that was never announced is excused only by trouble at a node."""
        troubles = [
            (strike.at - 1, strike.ended + ELECTION_S)
            for strike in self.strikes
            if strike.of_broker and strike.at and strike.ended
        ]
        for job_id in self.unheard():
            at = self.store.results[job_id][0].at
            if not any(began <= at <= ended for began, ended in troubles):
                yield Problem("missed", f"{job_id} was stored and not announced")

    def unheard(self) -> list[str]:
        return [job_id for job_id in self.store.results if job_id not in self.announced]

    def _told_otherwise(self) -> Iterator[Problem]:
        """Every answer that any client saw says what the stored result says."""
        should = {
            job_id: json.loads(encode(JobStatus.of(result)))
            for job_id, result in self.results.items()
        }
        for job_id, where, answer in self.answers:
            if answer != should.get(job_id):
                yield Problem(
                    "differs", f"{job_id}: {where} said {answer}, stored is {should.get(job_id)}"
                )

    def _read_otherwise(self) -> Iterator[Problem]:
        """The text that a stream's reader ended with is the stored one."""
        results = self.results
        for job_id, text in self.texts.items():
            result = results.get(job_id)
            if isinstance(result, Completed) and text != result.text:
                yield Problem(
                    "text differs",
                    f"{job_id}: read {len(text)} characters, stored are {len(result.text)}; "
                    f"the first difference is at {_first_difference(text, result.text)}",
                )

    def _buried_otherwise(self) -> Iterator[Problem]:
        """A job that was given up is among the dead letters, with that reason."""
        for job_id, result in self.results.items():
            if isinstance(result, Failed) and is_retried(result.code):
                letter = self.store.letters.get(job_id)
                if letter is None or letter.code != result.code:
                    yield Problem("unburied", f"{job_id} is {result.code}, its letter: {letter}")

    def _failed_otherwise(self) -> Iterator[Problem]:
        struck = {strike.job_id for strike in self.strikes}
        for job_id, result in self.results.items():
            code = result.code if isinstance(result, Failed) else "completed"
            failure = f"{job_id}: {code}: {getattr(result, 'message', '')}"
            if self._is_poisoned(job_id):
                if code != "worker_lost":
                    yield Problem("unnamed", f"{failure}: it kills inferers")
            elif isinstance(result, Failed) and code not in EXPECTED_FAILURES:
                yield Problem("failed", failure)
            elif code == "worker_lost" and job_id not in struck:
                yield Problem("blamed", f"{failure}: nothing struck it but what was beside it")

    def _is_poisoned(self, job_id: str) -> bool:
        errand = self.accepted.get(job_id)
        return errand is not None and errand.kind == POISONED


def _first_difference(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
