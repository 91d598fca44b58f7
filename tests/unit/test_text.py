"""From the bytes of tokens to text."""

import random

import pytest

from services.inferer.engine.detokenizer import Detokenizer

Assembled = tuple[list[str], bool]


def assemble(pieces: list[bytes], *stop: str) -> Assembled:
    """What each piece set free, then the flush; and whether a stop string ended it."""
    detokenizer = Detokenizer(list(stop))
    texts = []
    for piece in pieces:
        texts.append(detokenizer.push(piece))
        if detokenizer.stopped:
            break
    return [*texts, detokenizer.flush()], detokenizer.stopped


def test_a_character_waits_for_its_last_byte() -> None:
    """Half a character shows nothing; the piece that completes it shows all of it."""
    euro, smile = "€".encode(), "😀".encode()
    pieces = [b"a", euro[:1], euro[1:] + b"b", smile[:2], smile[2:3], smile[3:]]
    assert assemble(pieces) == (["a", "", "€b", "", "", "😀", ""], False)


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        ([b"a\xffb"], ["a�b", ""]),
        ([b"\xe2\x82", b"a"], ["", "�a", ""]),
        ([b"a\xe2\x82"], ["a", "�"]),
    ],
)
def test_bytes_that_are_not_text_are_replaced(pieces: list[bytes], texts: list[str]) -> None:
    """Invalid bytes, a character broken off in the middle and one at the end: never an error."""
    assert assemble(pieces) == (texts, False)


def test_a_stop_string_split_over_pieces_is_never_shown() -> None:
    """Its beginning is held back, and neither it nor what follows comes out."""
    assert assemble([b"one E", b"N", b"D two"], "END") == (["one ", "", "", ""], True)


def test_what_only_began_like_a_stop_string_is_shown() -> None:
    """Held text comes out with the piece that refutes it, or with the flush."""
    assert assemble([b"E", b"N", b"Q"], "END") == (["", "", "ENQ", ""], False)
    assert assemble([b"one E", b"N"], "END") == (["one ", "", "EN"], False)


def test_a_stop_string_whose_beginning_repeats_is_found() -> None:
    """A failed beginning may hold the true one: both `aab` in `aaab` and `abac` in `ababac`."""
    assert assemble([b"a", b"a", b"a", b"b"], "aab") == (["", "", "a", "", ""], True)
    assert assemble([b"aba", b"bac"], "abac") == (["", "ab", ""], True)


def test_the_first_of_several_stop_strings_counts() -> None:
    """Wherever they stand in the list; the longest beginning of any of them is held back."""
    for stop in (("\n\n", "User:"), ("User:", "\n\n")):
        assert assemble([b"x\n", b"User: \n\n"], *stop) == (["x", "\n", ""], True)
        assert assemble([b"x\n", b"\nUser:"], *stop) == (["x", "", ""], True)
    assert assemble([b"_abc"], "bcd", "abcde") == (["_", "abc"], False)


def test_a_stop_string_of_multi_byte_characters_is_found() -> None:
    """Text is compared, not bytes: a split inside the character changes nothing."""
    stop = "停止"
    data = f"a{stop}b".encode()
    for cut in range(1, len(data)):
        texts, stopped = assemble([data[:cut], data[cut:]], stop)
        assert ("".join(texts), stopped) == ("a", True)


def test_random_splits_add_up() -> None:
    """However the bytes are cut into tokens, the pieces add up to the text before the stop."""
    for seed in range(500):
        chance = random.Random(seed)
        text = "".join(chance.choices("aabbc€😀\n", k=40))
        stop = "".join(chance.choices("aab€", k=chance.randint(1, 4)))
        texts, stopped = assemble(_split(text.encode(), chance), stop)
        assert "".join(texts) == text.partition(stop)[0], f"seed {seed}"
        assert stopped == (stop in text), f"seed {seed}"


def test_random_splits_with_several_stop_strings_add_up() -> None:
    """What is shown is a beginning of the text without any stop string, or all of it."""
    for seed in range(500):
        chance = random.Random(seed)
        text = "".join(chance.choices("abc€", k=30))
        stops = ["".join(chance.choices("abc€", k=chance.randint(2, 5))) for _ in range(3)]
        texts, stopped = assemble(_split(text.encode(), chance), *stops)
        shown = "".join(texts)
        assert stopped == any(stop in text for stop in stops), f"seed {seed}"
        assert text.startswith(shown) if stopped else text == shown, f"seed {seed}"
        assert not any(stop in shown for stop in stops), f"seed {seed}"


def _split(data: bytes, chance: random.Random) -> list[bytes]:
    cuts = sorted(chance.choices(range(len(data) + 1), k=chance.randint(0, 20)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
