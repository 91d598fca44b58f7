"""From frames that were lost, repeated or of several attempts, to text in its order."""

import random
from itertools import pairwise
from zlib import crc32

import pytest

from services.gateway.jobs.token_merger import (
    UNKNOWN,
    Added,
    Restarted,
    Sent,
    Step,
    TokenReader,
)
from shared.wire.events import TokenFrame
from shared.wire.logprobs import TokenLogprob
from shared.wire.requests import MAX_CHOICES
from shared.wire.results import Choice


def frame(attempt: int, index: int, *tokens: str) -> TokenFrame:
    return TokenFrame(attempt=attempt, index=index, tokens=list(tokens))


def whole(text: str, logprobs: list[TokenLogprob] | None = None) -> list[Choice]:
    """What the result of a job with one answer says."""
    return [Choice(text=text, finish_reason="stop", completion_tokens=0, logprobs=logprobs)]


def read(*frames: TokenFrame) -> tuple[TokenReader, list[Step]]:
    """A reader that has read ``frames``, and what it sent on."""
    reader = TokenReader()
    return reader, [step for given in frames for step in reader.add(given)]


def shown(steps: list[Step]) -> str:
    """What a client shows that starts again whenever it is asked to."""
    return shown_of_each(steps, 1)[0]


def shown_of_each(steps: list[Step], choices: int) -> list[str]:
    """The same for each of several answers."""
    texts = [""] * choices
    for step in steps:
        if isinstance(step, Restarted):
            texts = [""] * choices
        else:
            texts[step.choice] += step.text
    return texts


def test_frames_in_their_order_are_sent_on() -> None:
    """Each with the index of its first token; the result then has nothing to add."""
    reader, steps = read(frame(1, 0, "a", "b"), frame(1, 2, "c"))
    assert steps == [Added(1, 0, "ab"), Added(1, 2, "c")]
    assert reader.finish(1, whole("abc")) == []


def test_repeated_frames_are_dropped() -> None:
    """Also in part: of a frame that overlaps only the new tokens are sent on."""
    _, steps = read(
        frame(1, 0, "a", "b"), frame(1, 0, "a", "b"), frame(1, 1, "b", "c"), frame(1, 0, "a")
    )
    assert steps == [Added(1, 0, "ab"), Added(1, 2, "c")]


def test_tokens_without_text_are_counted() -> None:
    """One that adds nothing yet belongs to the text that follows, and sends nothing."""
    _, steps = read(frame(1, 0, "", ""), frame(1, 2, "ab"), frame(1, 3, "c"))
    assert steps == [Added(1, 0, "ab"), Added(1, 3, "c")]
    _, steps = read(frame(1, 0, "a", ""), frame(1, 2, "b"))
    assert steps == [Added(1, 0, "a"), Added(1, 1, "b")]


def test_the_result_fills_a_gap() -> None:
    """Nothing beyond a lost frame is sent on until the result has it all."""
    reader, steps = read(frame(1, 0, "a"), frame(1, 2, "c"), frame(1, 3, "d"))
    assert steps == [Added(1, 0, "a")]
    assert reader.finish(1, whole("abcd")) == [Added(1, 1, "bcd")]


def test_a_gap_is_noticed() -> None:
    """From the first frame beyond it until what is missing has come."""
    reader = TokenReader()
    noticed = []
    for given in (frame(1, 0, "a"), frame(1, 2, "c"), frame(1, 1, "b"), frame(2, 1, "b")):
        reader.add(given)
        noticed.append(reader.has_gap)
    assert noticed == [False, True, False, True]


def test_a_lost_frame_that_comes_late_closes_the_gap() -> None:
    """The reader goes on from where it was, with what comes from then on."""
    _, steps = read(frame(1, 0, "a"), frame(1, 2, "c"), frame(1, 1, "b", "c"), frame(1, 3, "d"))
    assert steps == [Added(1, 0, "a"), Added(1, 1, "bc"), Added(1, 3, "d")]


def test_the_result_fills_the_tail_and_the_whole() -> None:
    """Frames stored after the result, or never: the result alone is enough."""
    reader, _ = read(frame(1, 0, "a"))
    assert reader.finish(1, whole("ab")) == [Added(1, 1, "b")]
    assert TokenReader().finish(1, whole("ab")) == [Added(1, 0, "ab")]
    assert TokenReader().finish(1, whole("")) == []


def test_a_second_attempt_that_repeats_the_first_is_not_seen() -> None:
    """What was sent is not sent again; what follows has the index of its own first token."""
    reader, steps = read(
        frame(1, 0, "a", "b", "c"), frame(2, 0, "a"), frame(2, 1, "b"), frame(2, 2, "c", "d")
    )
    assert shown(steps) == "abcd"
    assert steps == [Added(1, 0, "abc"), Added(2, 3, "d")]
    assert reader.finish(2, whole("abcd")) == []


def test_a_second_attempt_that_ends_before_it_catches_up_is_completed_by_the_result() -> None:
    """The result goes on after what was sent, not after what the attempt repeated of it."""
    reader, _ = read(frame(1, 0, "a", "b", "c"), frame(2, 0, "a"))
    assert reader.finish(2, whole("abcd")) == [Added(2, 3, "d")]


def test_a_second_attempt_that_differs_starts_again() -> None:
    """As soon as it differs; before that it might still be the same."""
    reader, steps = read(frame(1, 0, "a", "b"), frame(2, 0, "a"), frame(2, 1, "x"))
    assert steps == [Added(1, 0, "ab"), Restarted(2), Added(2, 0, "ax")]
    assert reader.finish(2, whole("axy")) == [Added(2, 2, "y")]


@pytest.mark.parametrize("text", ["a", ""])
def test_a_second_attempt_that_is_shorter_starts_again(text: str) -> None:
    """Only its result shows it: the beginning of what was sent is not the answer."""
    reader, steps = read(frame(1, 0, "a", "b"), frame(2, 0, "a"))
    assert steps == [Added(1, 0, "ab")]
    after = reader.finish(2, whole(text))
    assert after[0] == Restarted(2)
    assert shown(steps + after) == text


def test_after_an_unknown_text_everything_begins_anew() -> None:
    """What a client has of a text that nobody knows is void, before anything is added."""
    reader = TokenReader(UNKNOWN)
    assert reader.add(frame(1, 3, "d")) == []
    assert reader.finish(1, whole("abcde")) == [Restarted(1), Added(1, 0, "abcde")]
    reader = TokenReader(UNKNOWN)
    assert reader.add(frame(1, 0, "")) == []
    assert reader.add(frame(1, 1, "ab")) == [Restarted(1), Added(1, 0, "ab")]
    assert reader.add(frame(1, 2, "c")) == [Added(1, 2, "c")]
    assert reader.finish(1, whole("abcd")) == [Added(1, 3, "d")]
    assert TokenReader(UNKNOWN).finish(1, whole("")) == [Restarted(1)]


def test_another_reader_goes_on_where_one_was_cut_off() -> None:
    """Whatever the frames are by then, also if only the result is left."""
    first, _ = read(frame(1, 0, "a", "b"), frame(1, 2, "c"))
    again = TokenReader(first.sent)
    assert again.add(frame(1, 0, "a", "b")) == []
    assert again.add(frame(1, 2, "c", "d")) == [Added(1, 3, "d")]
    assert again.finish(1, whole("abcde")) == [Added(1, 4, "e")]
    assert TokenReader(first.sent).finish(1, whole("abcde")) == [Added(1, 3, "de")]
    assert TokenReader(first.sent).finish(1, whole("abc")) == []


def test_log_probabilities_come_with_their_tokens() -> None:
    """Also to a reader that takes over in the middle, and where the result fills a gap."""
    a, b, c = (TokenLogprob(token, -1.0) for token in "abc")
    frames = [
        TokenFrame(attempt=1, index=0, tokens=["a"], logprobs=[a]),
        TokenFrame(attempt=1, index=1, tokens=[""], logprobs=[b]),
        TokenFrame(attempt=1, index=2, tokens=["bc", "!"], logprobs=[c, None]),
    ]
    _, steps = read(*frames)
    rest = [Added(1, 1, "bc!", (b, c))]
    assert steps == [Added(1, 0, "a", (a,)), *rest]
    first, _ = read(frames[0])
    again = TokenReader(first.sent)
    assert [step for one in frames for step in again.add(one)] == rest
    assert TokenReader(first.sent).finish(1, whole("abc!", [a, b, c])) == rest
    assert first.finish(1, whole("abc!", [a, b, c])) == rest


def test_tokens_of_a_stop_string_have_no_log_probabilities() -> None:
    """They add no text, in whichever frames they come; nor does a frame of another length count."""
    a, b = TokenLogprob("a", -1.0), TokenLogprob("b", -1.0)
    one = TokenFrame(attempt=1, index=0, tokens=["a", "", ""], logprobs=[a, b, b])
    reader, steps = read(one)
    assert steps == [Added(1, 0, "a", (a,))]
    assert reader.position == (1, 3)
    assert reader.finish(1, whole("a", [a])) == []
    _, steps = read(TokenFrame(attempt=1, index=0, tokens=["a", "b"], logprobs=[a]))
    assert steps == [Added(1, 0, "ab")]


def test_a_reader_that_is_cut_off_after_a_restart_gets_nothing_of_the_attempt_before() -> None:
    reader = TokenReader(Sent(2))
    assert reader.add(frame(1, 0, "a", "b")) == []
    assert reader.add(frame(2, 0, "x")) == [Added(2, 0, "x")]


def test_a_resumed_text_that_comes_out_differently_starts_again() -> None:
    """Also if it is only shorter; and the text of an earlier attempt is not compared with it."""
    sent = Sent(2, 2, 2, crc32(b"xy"))
    reader = TokenReader(sent)
    assert reader.add(frame(1, 0, "a", "b", "c")) == []
    assert reader.add(frame(2, 0, "x", "y", "z")) == [Added(2, 2, "z")]
    assert TokenReader(sent).finish(3, whole("x")) == [Restarted(3), Added(3, 0, "x")]
    reader = TokenReader(sent)
    assert reader.add(frame(3, 0, "x")) == []
    assert reader.add(frame(3, 1, "z")) == [Restarted(3), Added(3, 0, "xz")]


def test_answers_come_one_after_another() -> None:
    """Each with the indices of its own tokens; the frames count on. The tokens of a stop string,
    which are not in the result, and an empty answer change nothing."""
    a, b, c, d = (TokenLogprob(token, -1.0) for token in "abcd")
    frames = [
        TokenFrame(attempt=1, index=0, tokens=["a", ""], logprobs=[a, b]),
        TokenFrame(attempt=1, index=2, tokens=["c"], logprobs=[c], choice=2),
        TokenFrame(attempt=1, index=3, tokens=["d"], logprobs=[d], choice=2),
    ]
    choices = whole("a", [a]) + whole("", []) + whole("cd", [c, d])
    expected = [Added(1, 0, "a", (a,)), Added(1, 0, "c", (c,), 2), Added(1, 1, "d", (d,), 2)]
    reader, steps = read(*frames)
    assert steps == expected
    assert [reader.tokens_of(choice) for choice in range(4)] == [2, 0, 2, 0]
    assert reader.finish(1, choices) == []
    for cut in range(len(frames) + 1):
        first, _ = read(*frames[:cut])
        again = TokenReader(first.sent)
        assert [step for one in frames for step in again.add(one)] == expected[cut:]
    lost, _ = read(frames[0], frames[2])
    assert lost.has_gap
    assert lost.finish(1, choices) == [Added(1, 0, "cd", (c, d), 2)]
    assert TokenReader().finish(1, choices) == [expected[0], Added(1, 0, "cd", (c, d), 2)]


def test_the_same_text_in_other_answers_is_another() -> None:
    """Where one answer ends and the next begins counts, to a client that comes back, too."""
    reader, _ = read(frame(1, 0, "ab"), TokenFrame(attempt=1, index=1, tokens=["c"], choice=1))
    sent = reader.sent
    other = whole("a") + whole("bc")
    restarted = [Restarted(2), Added(2, 0, "a"), Added(2, 0, "bc", (), 1)]
    assert TokenReader(sent).finish(2, other) == restarted
    assert reader.finish(2, other) == restarted
    assert TokenReader(sent).finish(2, whole("abc")) == [Restarted(2), Added(2, 0, "abc")]
    same = whole("ab") + whole("cd") + whole("") + whole("e")
    more = [Added(2, 1, "d", (), 1), Added(2, 0, "e", (), 3)]
    assert TokenReader(sent).finish(2, same) == more


def test_answers_that_a_result_cannot_have_are_no_error() -> None:
    """A frame can be published by anything."""
    reader, steps = read(TokenFrame(attempt=1, index=0, tokens=["a"], choice=2**53))
    (added,) = steps
    assert isinstance(added, Added)
    assert (added.text, added.choice) == ("a", MAX_CHOICES - 1)
    assert reader.add(frame(1, 1, "b")) == [Added(1, 1, "b", (), MAX_CHOICES - 1)]
    assert reader.finish(1, whole("x")) == [Restarted(1), Added(1, 0, "x")]


def test_late_frames_of_an_earlier_attempt_are_dropped() -> None:
    """Once a later attempt was seen, the earlier one says nothing any more."""
    _, steps = read(frame(2, 0, "a"), frame(1, 0, "x"), frame(1, 1, "y"), frame(2, 1, "b"))
    assert steps == [Added(2, 0, "a"), Added(2, 1, "b")]


def test_whatever_is_lost_repeated_or_reordered_the_text_comes_out() -> None:
    """Random frames of two attempts in random order, and a reader that is replaced by another, to
    which the same frames may come: the client ends with the result's text."""
    for seed in range(500):
        chance = random.Random(seed)
        tokens = [chance.choices(["a", "b", "", "cd"], k=12) for _ in range(2)]
        if chance.random() < 0.5:
            tokens[1] = tokens[0]
        ends = chance.choice([[12], [5, 12], [4, 4, 12]])
        frames = []
        for _ in range(15):
            attempt, start = chance.randint(1, 2), chance.randint(0, 11)
            choice = next(number for number, end in enumerate(ends) if start < end)
            some = tokens[attempt - 1][start : min(start + 3, ends[choice])]
            frames.append(TokenFrame(attempt=attempt, index=start, tokens=some, choice=choice))
        reader, steps = read(*frames)
        again = TokenReader(reader.sent)
        steps += [step for given in chance.choices(frames, k=10) for step in again.add(given)]
        texts = ["".join(tokens[1][begin:end]) for begin, end in pairwise([0, *ends])]
        steps += again.finish(2, [choice for text in texts for choice in whole(text)])
        assert shown_of_each(steps, len(texts)) == texts, f"seed {seed}"
