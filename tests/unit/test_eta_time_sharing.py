"""How jobs on one inferer share its time: as the inferer's own scheduler has it."""

import random
import statistics
from typing import NamedTuple

import numpy
import pytest

from services.gateway.eta.time_sharing import TimeSharing
from services.inferer.engine.scheduler import Scheduler
from services.inferer.engine.step_times import StepTimes
from tests.unit.test_scheduler import Work, admit

BATCH_TOKENS = 128
PROMPT_TOKEN_S = 0.002
STEP_S = (0.010, 0.016, 0.021, 0.025, 0.029, 0.032, 0.035, 0.038)
"""Of 1, 2, … sequences."""
DRAW = numpy.array([0])


class Job(NamedTuple):
    comes_at_s: float
    prompt_tokens: int
    answer_tokens: int


def sharing(slots: int, at_once: int = len(STEP_S)) -> TimeSharing:
    """``at_once`` sequences are in a batch; more take turns."""
    steps = [(running, min(running, at_once)) for running in range(1, slots + 1)]
    tokens_s = [STEP_S[batch - 1] * running / batch for running, batch in steps]
    slowdown = numpy.array([[token_s / STEP_S[0] for token_s in tokens_s]])
    return TimeSharing(numpy.zeros(slots, dtype=int), slowdown, numpy.array([at_once]), draws=1)


def begin(time: TimeSharing, slot: int, at_s: float, prompt_s: float, answer_s: float) -> None:
    numbers = (numpy.array([number]) for number in (at_s, prompt_s, answer_s))
    time.begin(numpy.array([slot]), DRAW, *numbers)


def ends_s(time: TimeSharing) -> list[float]:
    return [round(float(end_s), 6) for end_s in time.end_s[:, 0]]


def end_first(time: TimeSharing) -> tuple[int, float]:
    """The slot of the job that ends first, and when."""
    slot = int(time.end_s[:, 0].argmin())
    end_s = ends_s(time)[slot]
    time.end(numpy.array([slot]), DRAW)
    return slot, end_s


def test_answers_wait_for_a_prompt() -> None:
    """Each token takes 1.6 times as long beside another."""
    time = sharing(2)
    begin(time, 0, 0.0, 0.1, 1.0)
    assert ends_s(time) == [1.1, numpy.inf]
    begin(time, 1, 0.6, 0.2, 1.0)  # half of the first answer is left
    assert ends_s(time) == [1.6, 2.4]
    assert end_first(time) == (0, 1.6)
    assert ends_s(time) == [numpy.inf, 2.1]


def test_after_a_second_a_long_prompt_has_half_of_the_time() -> None:
    time = sharing(2)
    begin(time, 0, 0.0, 0.0, 2.0)
    begin(time, 1, 0.5, 5.0, 1.0)  # 1.5 s are left of the answer
    assert ends_s(time)[0] == 4.5  # 1 + 2 x 1.5 s later
    assert end_first(time)[0] == 0
    # 2.5 of 5 s are left of the prompt, which is alone now.
    assert ends_s(time)[1] == 8.0


def test_a_short_prompt_comes_before_a_long_one() -> None:
    """But not before one that would have been done already if it were alone."""
    time = sharing(4)
    begin(time, 0, 0.0, 10.0, 0.0)
    begin(time, 1, 1.0, 0.5, 0.0)
    assert ends_s(time)[:2] == [10.5, 1.5]
    begin(time, 2, 1.0, 9.0, 0.0)  # due with the first
    begin(time, 3, 1.0, 8.9, 0.0)
    assert ends_s(time) == [19.4, 1.5, 28.4, 10.4]


def test_a_job_without_an_answer_ends_with_its_prompt() -> None:
    """Whatever begins before it ends."""
    time = sharing(2)
    begin(time, 0, 0.0, 0.3, 0.0)
    begin(time, 1, 0.1, 0.4, 1.0)
    assert ends_s(time) == [0.3, 2.3]
    assert end_first(time) == (0, 0.3)
    assert ends_s(time)[1] == 1.7


def test_jobs_that_run_already_are_like_some_that_begin_now() -> None:
    """On inferers with several slots each, one slot, and none that is used."""
    inferer = numpy.array([0, 0, 0, 1, 2, 2])
    left_s = {0: (0.3, 1.0), 1: (0.0, 2.0), 2: (0.3, 0.0), 3: (0.1, 0.5)}
    slowdown = numpy.array([[1.0, 1.5, 1.8]] * 3)
    per_batch = numpy.array([2, 3, 3])
    together, one_by_one = (TimeSharing(inferer, slowdown, per_batch, draws=1) for _ in range(2))
    prompt_s, answer_s = numpy.array(list(left_s.values())).T[..., None]
    together.resume(numpy.array(list(left_s)), prompt_s, answer_s)
    for slot, left in left_s.items():
        begin(one_by_one, slot, 0.0, *left)
    for time in (together, one_by_one):
        begin(time, 4, 0.2, 0.2, 0.2)
    while numpy.isfinite(one_by_one.end_s).any():
        assert ends_s(together) == ends_s(one_by_one)
        assert together.emptiest == one_by_one.emptiest
        assert end_first(together) == pytest.approx(end_first(one_by_one))


@pytest.mark.parametrize("inferer", [[0, 0, 0], [0, 0, 0, 1, 2, 2]])
def test_draws_are_independent(inferer: list[int]) -> None:
    """Jobs that begin and end in all or some of three draws end when they would in one draw."""
    slots, draws = len(inferer), range(3)
    slowdown = numpy.array([[1.0, 1.5, 1.8]] * (max(inferer) + 1))
    per_batch = numpy.full(max(inferer) + 1, 2)
    together = TimeSharing(numpy.array(inferer), slowdown, per_batch, draws=3)
    alone = [TimeSharing(numpy.array(inferer), slowdown, per_batch, draws=1) for _ in draws]
    dice = random.Random(1)
    for event in range(200):
        at = numpy.array(dice.sample(draws, dice.choice((1, 2, 3))))
        at.sort()
        chosen = numpy.array([dice.randrange(slots) for _ in at])
        is_end = event % 3 == 2
        chosen = numpy.where(is_end, together.end_s[:, at].argmin(axis=0), chosen)
        if is_end and not numpy.isfinite(together.end_s[chosen, at]).all():
            continue
        if is_end:
            together.end(chosen, at)
        else:
            numbers = numpy.array([[0.1 * event, dice.random(), dice.random()] for _ in at]).T
            together.begin(chosen, at, *numbers)
        for number, draw in enumerate(at):
            slot = chosen[[number]]
            if is_end:
                alone[draw].end(slot, DRAW)
            else:
                alone[draw].begin(slot, DRAW, *numbers[:, [number]])
        for draw in draws:
            numpy.testing.assert_allclose(together.end_s[:, draw], alone[draw].end_s[:, 0])


def run(
    jobs: list[Job], slots: int, at_once: int
) -> tuple[dict[int, tuple[float, int]], dict[int, float]]:
    """What the scheduler does with ``jobs``, if each step takes as long as it should: when each
    begins, in which slot, and when it ends."""
    scheduler: Scheduler[Work] = Scheduler(slots, BATCH_TOKENS)
    scheduler.step_times = StepTimes(lambda: 0.0)
    begun, ended, numbers, now_s = {}, {}, {}, 0.0
    coming = list(enumerate(jobs))
    while coming or not scheduler.is_idle:
        while coming and coming[0][1].comes_at_s <= now_s:
            number, job = coming.pop(0)
            work = Work(job.prompt_tokens, job.answer_tokens)
            numbers[work] = number
            scheduler.add(work)
        for work in admit(scheduler):
            begun[numbers[work]] = now_s, work.slot
        batch = scheduler.next_batch(at_once)
        if not batch:
            now_s = coming[0][1].comes_at_s
            continue
        generating = sum(chunk.sequence.is_generating for chunk in batch)
        prompt_tokens = sum(chunk.size for chunk in batch) - generating
        step_s = PROMPT_TOKEN_S * prompt_tokens + (STEP_S[generating - 1] if generating else 0)
        now_s += step_s
        for chunk in scheduler.complete(batch, step_s):
            chunk.sequence.advance(chunk.draft)
            if chunk.sequence.remaining == 0:
                scheduler.remove(chunk.sequence)
                ended[numbers[chunk.sequence]] = now_s
    return begun, ended


def predict(
    jobs: list[Job], begun: dict[int, tuple[float, int]], slots: int, at_once: int
) -> dict[int, float]:
    """When each job ends, as predicted while jobs began when they did."""
    time = sharing(slots, at_once)
    running: dict[int, int] = {}
    ended = {}
    for number, (at_s, slot) in sorted(begun.items(), key=lambda one: one[1]):
        while time.end_s.min() <= at_s:
            freed, end_s = end_first(time)
            ended[running.pop(freed)] = end_s
        if slot in running:  # it ended earlier than predicted
            ended[running.pop(slot)] = float(time.end_s[slot, 0])
        _, prompt_tokens, answer_tokens = jobs[number]
        prompt_s, answer_s = PROMPT_TOKEN_S * prompt_tokens, STEP_S[0] * (answer_tokens - 1)
        begin(time, slot, at_s, prompt_s, answer_s)
        running[slot] = number
    while running:
        freed, end_s = end_first(time)
        ended[running.pop(freed)] = end_s
    return ended


@pytest.mark.parametrize(("slots", "at_once"), [(1, 8), (2, 8), (4, 8), (8, 8), (4, 2), (8, 4)])
@pytest.mark.parametrize("longest", [300, 3000])
def test_it_is_what_the_scheduler_does(slots: int, at_once: int, longest: int) -> None:
    """Half of the jobs end within a tenth of their duration of when they were predicted to, with
    prompts of up to 0.6 s and of up to 6 s. The scheduler computes prompts in chunks, and does not
    count how long they made answers wait from the same moment."""
    errors = []
    for seed in range(20):
        dice = random.Random(seed)
        jobs = sorted(
            Job(dice.uniform(0, 10), dice.choice([20, 40, longest]), dice.choice([1, 20, 50, 150]))
            for _ in range(20)
        )
        begun, ended = run(jobs, slots, at_once)
        for number, end_s in predict(jobs, begun, slots, at_once).items():
            took_s = ended[number] - begun[number][0]
            errors.append(abs(end_s - ended[number]) / took_s)
    assert statistics.median(errors) < 0.1
