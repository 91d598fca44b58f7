"""How long answers get, learned from some that ended and some that were cut."""

import numpy

from services.gateway.eta.lengths import Lengths
from shared.wire.requests import Work

EVENLY = numpy.linspace(0.001, 0.999, 999)
CHAT = Work(prompt_bytes=100, max_tokens=128, task="chat")


def work(**changes: object) -> Work:
    return Work(**{"prompt_bytes": 100, "max_tokens": 128, "task": "chat", **changes})  # type: ignore[arg-type]


def median(lengths: Lengths, of: Work, beyond: int = 0) -> float:
    return float(numpy.median(lengths.sample(of, beyond, EVENLY)))


def test_before_the_first_answer_lengths_are_assumed() -> None:
    """Short ones, long ones, and none beyond what was asked for."""
    assert max(Lengths().sample(CHAT, 0, EVENLY)) == 128
    assert 100 < median(Lengths(), work(max_tokens=4096)) < 200
    assert numpy.mean(Lengths().sample(work(max_tokens=4096), 0, EVENLY) > 100) > 0.5
    assert 3100 < median(Lengths(), work(max_tokens=4096), beyond=3000) < 3200


def test_answers_that_ended_give_their_own_distribution() -> None:
    """Each of ten lengths comes up in a tenth of the draws, none beyond them."""
    lengths = Lengths()
    for tokens in range(10, 110, 10):
        lengths.observe(CHAT, tokens, was_cut=False)
    drawn = lengths.sample(CHAT, 0, EVENLY)
    values, counts = numpy.unique(drawn, return_counts=True)
    assert list(values) == list(range(10, 110, 10))
    assert all(abs(count - 100) <= 1 for count in counts)


def test_cut_answers_are_not_taken_for_short_ones() -> None:
    """Half of the answers were cut at 20 where the others went on: Kaplan and Meier's estimate."""
    lengths = Lengths()
    for _ in range(10):
        lengths.observe(CHAT, 20, was_cut=True)
        lengths.observe(CHAT, 60, was_cut=False)
        lengths.observe(CHAT, 100, was_cut=False)
    assert set(lengths.sample(CHAT, 0, EVENLY)) == {60, 100}
    drawn = lengths.sample(CHAT, 0, EVENLY)
    assert abs((drawn == 60).mean() - 0.5) < 0.01


def test_after_an_answer_that_was_cut_the_rest_is_assumed() -> None:
    """Nobody knows how long it would have been: not as long as the context, but the longer, the
    more were cut."""
    lengths = Lengths()
    lengths.observe(CHAT, 50, was_cut=True)
    assert 150 < median(lengths, work(max_tokens=8192)) < 250
    for _ in range(19):
        lengths.observe(CHAT, 50, was_cut=True)
    assert min(lengths.sample(CHAT, 0, EVENLY)) > 50
    assert median(lengths, CHAT) == 128
    assert 800 < median(lengths, work(max_tokens=8192)) < 1000
    lengths.observe(work(task="complete", max_tokens=4096), 4096, was_cut=True)
    assert min(lengths.sample(work(max_tokens=512), 0, EVENLY)) < 100


def test_an_answer_under_way_is_at_least_as_long_as_it_is() -> None:
    """What has been written already rules the short ones out."""
    lengths = Lengths()
    for tokens in (10, 20, 70, 90):
        lengths.observe(CHAT, tokens, was_cut=False)
    assert set(lengths.sample(CHAT, 20, EVENLY)) == {70, 90}
    assert min(lengths.sample(CHAT, 95, EVENLY)) > 95


def test_max_tokens_is_the_end() -> None:
    lengths = Lengths()
    for _ in range(20):
        lengths.observe(work(max_tokens=1000), 500, was_cut=False)
    assert median(lengths, work(max_tokens=1000)) == 500
    assert median(lengths, work(max_tokens=300)) == 300


def test_requests_that_are_alike_count_most() -> None:
    """The same max_tokens, a prompt of the same magnitude, the same form."""
    lengths = Lengths()
    for _ in range(20):
        lengths.observe(work(max_tokens=100, prompt_bytes=50), 5, was_cut=False)
        lengths.observe(work(max_tokens=200, prompt_bytes=50), 150, was_cut=False)
        lengths.observe(work(max_tokens=200, prompt_bytes=6400), 80, was_cut=False)
        lengths.observe(work(max_tokens=200, prompt_bytes=50, task="complete"), 199, was_cut=False)
    assert median(lengths, work(max_tokens=100, prompt_bytes=50)) == 5
    assert median(lengths, work(max_tokens=200, prompt_bytes=60)) == 150
    assert median(lengths, work(max_tokens=200, prompt_bytes=5000)) == 80
    assert median(lengths, work(max_tokens=200, prompt_bytes=50, task="complete")) == 199
