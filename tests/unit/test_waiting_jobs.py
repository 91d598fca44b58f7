"""Jobs on the queue, counted without the broker."""

from bisect import bisect_right

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
    assert index.count(QUEUE, after=0, before=5, waiting=3) == 3
    assert index.count(("tiny", "high"), after=0, before=5, waiting=1) == 1
    assert index.count(("other", "normal"), after=0, before=5, waiting=0) == 0


def test_next_subjects_are_those_before_a_job() -> None:
    index = index_of(3, 5, 8, 9, 20)
    assert index.next_subjects(QUEUE, after=3, before=20, limit=2) == [
        "infer.requests.tiny.normal.public.job-5",
        "infer.requests.tiny.normal.public.job-8",
    ]
    assert index.next_subjects(QUEUE, after=9, before=20, limit=2) == []
    assert index.next_subjects(("other", "normal"), after=0, before=20, limit=2) == []


def test_a_sequence_that_is_used_again_is_that_of_the_newer_job() -> None:
    """The stream was deleted and created again: its sequences begin anew."""
    index = index_of(7)
    index.add(RequestSubject("tiny", "normal", "public", "newer"), 7)
    index.remove("job-7")
    newer = ["infer.requests.tiny.normal.public.newer"]
    assert index.next_subjects(QUEUE, after=0, before=20, limit=2) == newer


def test_a_number_that_differs_from_the_brokers_is_not_believed() -> None:
    """An announcement was missed; or a retry is back on the queue, which is not announced."""
    index = index_of(1, 2, 3)
    assert index.count(QUEUE, after=0, before=3, waiting=4) is None
    assert index.count(QUEUE, after=0, before=3, waiting=2) is None


def test_an_announcement_that_comes_late_or_twice_changes_nothing() -> None:
    index = index_of(5, 9, 7, 9, 5)
    assert index.count(QUEUE, after=0, before=9, waiting=3) == 2


def test_a_job_that_has_ended_does_not_wait() -> None:
    index = index_of(1, 2, 3)
    for _ in range(2):
        index.remove("job-2")
    assert index.count(QUEUE, after=0, before=3, waiting=2) == 1
    assert len(index) == 2


@given(
    st.lists(st.integers(1, 200), unique=True, min_size=1),
    st.sets(st.integers(1, 200)),
    st.lists(st.integers(0, 200)),
)
def test_counts_and_next_subjects_are_those_of_a_plain_list(
    accepted: list[int], ended: set[int], delivered: list[int]
) -> None:
    """However the jobs come and go, and whatever was asked before."""
    index = index_of(*accepted)
    for number in ended:
        index.remove(f"job-{number}")
    left = sorted(set(accepted) - ended)
    for after in sorted(delivered):
        waiting = len(left) - bisect_right(left, after)
        for before in (after + 1, after + 50, 201):
            expected = sum(after < number < before for number in left)
            assert index.count(QUEUE, after, before, waiting) == expected
            following = [number for number in left if after < number < before][:3]
            names = [request(number).request for number in following]
            assert index.next_subjects(QUEUE, after, before, limit=3) == names
