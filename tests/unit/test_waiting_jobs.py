"""Jobs on the queue, counted without the broker."""

from bisect import bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.state.waiting_jobs import SequenceIndex
from shared.wire.subjects import RequestSubject

QUEUE = ("tiny", "normal")


def request(number: int, priority: str = "normal") -> RequestSubject:
    return RequestSubject("tiny", priority, "public", f"job-{number}")


def index_of(*numbers: int) -> SequenceIndex:
    """Jobs whose sequences are their numbers."""
    index = SequenceIndex()
    for number in numbers:
        index.add(request(number), number)
    return index


def test_only_waiting_jobs_before_a_job_are_counted() -> None:
    index = index_of(3, 5, 8, 9, 20)
    assert index.count(QUEUE, after=5, before=20, waiting=3) == 2
    assert index.count(QUEUE, after=5, before=8, waiting=3) == 0


def test_queues_are_counted_apart() -> None:
    index = index_of(1, 2, 3)
    index.add(request(4, "high"), 4)
    assert index.count(QUEUE, after=0, before=3, waiting=3) == 2
    assert index.count(("tiny", "high"), after=0, before=4, waiting=1) == 0
    assert index.count(("other", "normal"), after=0, before=5, waiting=0) is None


def test_jobs_of_two_models_may_have_the_same_id() -> None:
    """Put on the queue by hand: an end of the one is not that of the other."""
    index = index_of(1, 2)
    index.add(RequestSubject("other", "normal", "public", "job-1"), 3)
    assert index.count(QUEUE, after=0, before=2, waiting=2) == 1
    index.remove("other", "job-1")
    assert index.count(QUEUE, after=0, before=2, waiting=2) == 1
    assert index.queues == [QUEUE, ("other", "normal")]


def test_the_first_jobs_are_those_after_the_last_delivered() -> None:
    index = index_of(3, 5, 8, 9, 20)
    assert index.first(QUEUE, after=3, limit=2) == [request(5), request(8)]
    assert index.first(QUEUE, after=9, limit=2) == [request(20)]
    assert index.first(QUEUE, after=20, limit=2) == []
    assert index.first(("other", "normal"), after=0, limit=2) == []


def test_a_sequence_that_is_used_again_is_that_of_the_newer_job() -> None:
    """The stream was deleted and created again: its sequences begin anew."""
    index = index_of(7)
    newer = RequestSubject("tiny", "normal", "public", "newer")
    index.add(newer, 7)
    index.remove("tiny", "job-7")
    assert index.first(QUEUE, after=0, limit=2) == [newer]


def test_a_number_that_differs_from_the_brokers_is_not_believed() -> None:
    """An announcement was missed; or a retry is back on the queue, which is not announced."""
    index = index_of(1, 2, 3)
    assert index.count(QUEUE, after=0, before=3, waiting=4) is None
    assert index.count(QUEUE, after=0, before=3, waiting=2) is None


def test_a_job_that_is_not_known_has_no_position() -> None:
    """The numbers may agree although an announcement and an end were missed: of 8 and 9."""
    assert index_of(5, 8).count(QUEUE, after=4, before=9, waiting=2) is None


@pytest.mark.parametrize("sequence", [-1, 0, 2**64])
def test_what_is_not_a_sequence_changes_nothing(sequence: int) -> None:
    index = index_of(1, 2, 3)
    with pytest.raises(ValueError, match="not a sequence"):
        index.add(request(2), sequence)
    assert index.count(QUEUE, after=0, before=3, waiting=3) == 2


def test_delivered_jobs_are_forgotten() -> None:
    """Their ends are not announced to this gateway where their ids are not of a gateway."""
    index = index_of(*range(1, 1001))
    index.forget(QUEUE, 999)
    assert (len(index), index.queues) == (1, [QUEUE])
    assert index.count(QUEUE, after=999, before=1000, waiting=1) == 0
    index.forget(QUEUE, 1000)
    assert (len(index), index.queues) == (0, [])


def test_an_announcement_that_comes_late_or_twice_changes_nothing() -> None:
    index = index_of(5, 9, 7, 9, 5)
    assert index.count(QUEUE, after=0, before=9, waiting=3) == 2


def test_a_job_that_has_ended_does_not_wait() -> None:
    index = index_of(1, 2, 3)
    for _ in range(2):
        index.remove("tiny", "job-2")
    assert index.count(QUEUE, after=0, before=3, waiting=2) == 1
    assert len(index) == 2


@given(
    st.lists(st.integers(1, 200), unique=True, min_size=1),
    st.sets(st.integers(1, 200)),
    st.lists(st.integers(0, 200)),
)
def test_counts_and_first_jobs_are_those_of_a_plain_list(
    accepted: list[int], ended: set[int], delivered: list[int]
) -> None:
    """However the jobs come and go, and whatever was asked before."""
    index = index_of(*accepted)
    for number in ended:
        index.remove("tiny", f"job-{number}")
    left = sorted(set(accepted) - ended)
    for after in sorted(delivered):
        waiting = len(left) - bisect_right(left, after)
        for before in (after + 1, after + 50, *left):
            if before <= after:
                continue
            ahead = sum(after < number < before for number in left)
            expected = ahead if before in left else None
            assert index.count(QUEUE, after, before, waiting) == expected
        following = [number for number in left if number > after][:3]
        assert index.first(QUEUE, after, limit=3) == [request(number) for number in following]
        index.forget(QUEUE, after)
