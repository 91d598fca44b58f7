"""Subjects, job ids and times: the names on the wire."""

from datetime import UTC, datetime, timedelta, timezone
from uuid import uuid4

import pytest

from shared.job_ids import accepted_at, has_aged_out, is_job_id, new_job_id
from shared.model_names import is_token
from shared.retention import RESULT_RETENTION
from shared.timestamps import milliseconds_between, parse_timestamp, timestamp
from shared.wire import subjects

ID = "01968a3e-5c00-7abc-8def-0123456789ab"


@pytest.mark.parametrize("name", ["a", "7b", "smollm2", "gemma3-270m", "a_b-", "x" * 64])
def test_a_model_name_that_fits_into_a_subject_is_valid(name: str) -> None:
    """Small letters, digits, - and _, up to 64."""
    assert is_token(name)


@pytest.mark.parametrize(
    "name", ["", "-a", "_a", "A", "a.b", "a b", "a*", "a>", "a+high", "ä", "a\n", "x" * 65]
)
def test_a_model_name_that_does_not_fit_is_refused(name: str) -> None:
    """Nothing that the broker reads as more than one token, or as a wildcard."""
    assert not is_token(name)


def test_subjects_have_the_form_of_the_wire_version() -> None:
    """The wire's names are a contract: written out here, so that no one changes by accident."""
    assert subjects.request("m", ID) == f"infer.requests.m.normal.public.{ID}"
    assert subjects.request("m", ID, "high", "ann") == f"infer.requests.m.high.ann.{ID}"
    assert subjects.request_of(ID) == f"infer.requests.*.*.*.{ID}"
    assert subjects.model_requests("m") == "infer.requests.m.normal.*.*"
    assert subjects.schedule_of(ID) == f"infer.schedule.*.*.*.{ID}"
    assert subjects.retry("m", ID) == f"infer.retry.m.{ID}"
    assert subjects.accepted("m", ID) == f"infer.accepted.m.{ID}"
    assert subjects.state("m", ID) == f"infer.states.m.{ID}"
    assert subjects.state_of(ID) == f"infer.states.*.{ID}"
    assert subjects.death("m", "i-1") == "infer.deaths.m.i-1"
    assert subjects.state_events("m", ID) == f"infer.events.m.{ID}.state"
    assert subjects.token_events("m", ID) == f"infer.events.m.{ID}.tokens"
    assert subjects.events("m", ID) == f"infer.events.m.{ID}.*"
    assert subjects.result("m", ID) == f"infer.results.m.{ID}"
    assert subjects.result_of(ID) == f"infer.results.*.{ID}"
    assert subjects.finished("m", ID) == f"infer.finished.m.{ID}"
    assert subjects.cancel("m", ID) == f"infer.cancel.m.{ID}"
    assert subjects.cancels("m") == "infer.cancel.m.*"
    assert subjects.control("m", "i-1") == "infer.control.m.i-1"
    assert subjects.overlap("m", "i-1") == "infer.overlap.m.i-1"
    assert subjects.inferer("m", "i-1") == "$KV.INFERERS.m.i-1"
    assert subjects.dead("m", ID) == f"infer.dead.m.{ID}"
    assert subjects.dead_of(ID) == f"infer.dead.*.{ID}"


def test_names_are_read_back_from_subjects() -> None:
    """The inverse of the builders."""
    parsed = subjects.RequestSubject.parse(subjects.request("m", ID, "low", "ann"))
    assert parsed == ("m", "low", "ann", ID, False)
    assert parsed.request == f"infer.requests.m.low.ann.{ID}"
    assert parsed.schedule == f"infer.schedule.m.low.ann.{ID}"
    assert subjects.RequestSubject.parse(parsed.schedule) == ("m", "low", "ann", ID, True)
    assert subjects.model_and_id(subjects.cancel("m", ID)) == ("m", ID)
    assert subjects.model_and_id(subjects.inferer("m", "i-1")) == ("m", "i-1")


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "infer.requests",
        "infer.requests.m.normal.public",
        f"infer.requests.m.normal.{ID}",  # of wire version 1
        f"infer.events.m.normal.public.{ID}",
        f"infer.requests.m.normal.public.{ID}.more",
        "infer.requests.m.normal.public." + "x" * 257,
    ],
)
def test_other_subjects_are_not_requests(subject: str) -> None:
    with pytest.raises(ValueError, match="not the subject of a request"):
        subjects.RequestSubject.parse(subject)


def test_a_new_id_says_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """UUIDv7: unique, in the order of their making, and with the time to the millisecond."""
    # Its clock is ahead if another test has just made more than one id per millisecond.
    monkeypatch.setattr("uuid6._last_v7_timestamp", None)
    before = datetime.now(UTC)
    ids = [new_job_id() for _ in range(1000)]
    assert all(map(is_job_id, ids))
    assert len(set(ids)) == 1000
    assert ids == sorted(ids)
    assert before - timedelta(milliseconds=1) <= accepted_at(ids[0]) <= datetime.now(UTC)


def test_an_id_says_its_age() -> None:
    """An id of RFC 9562's own example is read right; only after the retention it has aged out."""
    example = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"
    assert accepted_at(example) == datetime(2022, 2, 22, 19, 22, 22, tzinfo=UTC)
    minute, now = timedelta(minutes=1), datetime.now(UTC)
    assert has_aged_out(example, now)
    assert not has_aged_out(new_job_id(), now)
    assert has_aged_out(new_job_id(now - RESULT_RETENTION - minute), now)
    assert not has_aged_out(new_job_id(now - RESULT_RETENTION + minute), now)


def test_an_id_says_the_time_it_is_given() -> None:
    """The broker's, where a host's is another; it is as valid and as unique as any."""
    at = datetime(2031, 5, 6, 7, 8, 9, 123000, tzinfo=UTC)
    ids = {new_job_id(at) for _ in range(1000)}
    assert len(ids) == 1000
    assert all(map(is_job_id, ids))
    assert {accepted_at(job_id) for job_id in ids} == {at}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        pytest.param(str(uuid4()), id="version 4"),
        ID.upper(),
        ID.replace("-", ""),
        f"{{{ID}}}",
        f"urn:uuid:{ID}",
        f"{ID}\n",
        f" {ID}",
        ID[:-1],
        ID.replace("-8def-", "-cdef-"),  # the variant is not RFC 9562's
        "*",
    ],
)
def test_what_is_not_a_job_id_is_refused(text: str) -> None:
    """Only the canonical form: an id becomes a token of a subject and a part of a URL."""
    assert is_job_id(ID)
    assert not is_job_id(text)


def test_times_have_a_fixed_width_and_compare_as_strings() -> None:
    """Six decimals also for a whole second, always UTC."""
    whole = datetime(2026, 1, 31, 12, tzinfo=UTC)
    moments = [whole, whole.replace(microsecond=1), whole.replace(microsecond=999_999)]
    texts = [timestamp(moment) for moment in moments]
    assert texts[0] == "2026-01-31T12:00:00.000000Z"
    assert texts == sorted(texts)
    assert [parse_timestamp(text) for text in texts] == moments
    assert timestamp(whole.astimezone(timezone(timedelta(hours=5, minutes=30)))) == texts[0]
    assert len(timestamp()) == len(texts[0])


def test_times_of_others_are_read() -> None:
    """Nanoseconds, as the broker writes them, are cut, not rounded; offsets are honoured."""
    nanoseconds = parse_timestamp("2026-01-31T12:00:00.123456999Z")
    assert nanoseconds == datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
    assert parse_timestamp("2026-01-31T13:00:00+01:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert milliseconds_between("2026-01-31T12:00:00Z", "2026-01-31T12:00:01.5Z") == 1500


@pytest.mark.parametrize("text", ["", "soon", "2026-01-31T12:00:00", "2026-13-01T00:00:00Z"])
def test_what_is_not_a_time_is_refused(text: str) -> None:
    """Above all a time without a zone, which every machine would read differently."""
    with pytest.raises(ValueError, match=r"."):
        parse_timestamp(text)
