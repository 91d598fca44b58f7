"""Which prompts begin alike, by their fingerprints."""

from msgspec.structs import replace

from shared.prompt_prefixes import (
    BLOCK,
    MOST,
    REMEMBERED,
    SHORTEST,
    PromptPrefixes,
    fingerprints,
)
from shared.wire.requests import ChatMessage, ModelRequest

LONG = "x" * SHORTEST


def chat(*texts: str) -> ModelRequest:
    roles = ("system", "user", "assistant")
    return ModelRequest(
        messages=[
            ChatMessage(roles[min(n, 1 + n % 2)], text)  # type: ignore[arg-type]
            for n, text in enumerate(texts)
        ]
    )


def test_a_turn_has_the_fingerprints_of_the_turns_before() -> None:
    first = fingerprints("a", chat(LONG, "one"))
    second = fingerprints("a", chat(LONG, "one", "two", "three"))
    assert second[: len(first)] == first
    assert len(second) == 4
    other = fingerprints("a", chat(LONG, "eleven"))
    assert other[0] == first[0]
    assert other[1] != first[1]


def test_short_beginnings_have_none() -> None:
    assert fingerprints("a", chat("be brief", "one")) == []
    assert len(fingerprints("a", chat("be brief", "one", LONG))) == 1
    assert fingerprints("a", ModelRequest(prompt="x" * (BLOCK - 1))) == []


def test_a_text_has_one_for_each_block() -> None:
    text = "".join(str(n % 7) for n in range(3 * BLOCK))
    found = fingerprints("a", ModelRequest(prompt=text + "and more"))
    assert len(found) == 3
    assert fingerprints("a", ModelRequest(prompt=text[: 2 * BLOCK] + "otherwise")) == found[:2]


def test_owners_have_none_in_common() -> None:
    assert not {*fingerprints("a", chat(LONG))} & {*fingerprints("b", chat(LONG))}


def test_adapters_have_none_in_common() -> None:
    """Nor is an adapter taken for a part of the owner."""
    plain = fingerprints("a", chat(LONG))
    adapted = fingerprints("a", replace(chat(LONG), adapter="b"))
    assert len({*plain, *adapted}) == len(plain) + len(adapted)
    assert adapted != fingerprints("ab", chat(LONG))


def test_a_text_is_not_taken_for_two_messages() -> None:
    assert fingerprints("a", chat(LONG, "b")) != fingerprints("a", chat(LONG + "user:b"))


def test_the_longest_are_kept() -> None:
    all_texts = [LONG, *map(str, range(2 * MOST))]
    found = fingerprints("a", chat(*all_texts))
    assert len(found) == MOST
    assert found[-1] == fingerprints("a", chat(*all_texts))[-1]


def test_an_inferer_remembers_the_last_ones() -> None:
    known = PromptPrefixes()
    assert known.add(map(str, range(REMEMBERED)))
    assert not known.add(["0"])
    assert known.add(["0", "new"])
    assert "1" not in known
    assert {"0", "2", "new"} <= {*known}
    assert len(list(known)) == REMEMBERED
