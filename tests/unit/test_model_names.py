"""What users call a model, and the token that subjects hold."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as some

from shared import model_names
from shared.model_names import MAX_NAME_CHARS, is_name, is_token, name_of, token_of
from shared.wire import subjects


@pytest.mark.parametrize("name", ["a", "7b", "smollm2", "gemma3-270m", "a_b-", "x" * 64])
def test_a_name_that_can_be_a_token_is_it(name: str) -> None:
    """Small letters, digits, - and _, up to 64: as all names of earlier versions."""
    assert is_name(name)
    assert token_of(name) == name


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("qwen2.5:1.5b", "qwen2-5-1-5b"),
        ("org/name", "org-name"),
        ("Org/Name", "org-name"),
        ("Llama 3 (test) *", "llama-3-test"),
        ("模型", "model"),
        ("a.b.>", "a-b"),
        ("-a", "a"),
        ("x" * 128, "x" * 48),
    ],
)
def test_any_other_gets_one_that_can_be_read(name: str, slug: str) -> None:
    """Its readable part and a hash, always the same; names that look alike have different ones."""
    assert is_name(name)
    token = token_of(name)
    assert is_token(token)
    assert token.rpartition("-")[0] == slug
    assert token_of(token) == token
    assert token != token_of(name + "!")


def test_tokens_do_not_change_between_versions() -> None:
    """Another version must derive the same, or jobs wait in a queue that nobody serves."""
    assert token_of("qwen2.5:1.5b") == "qwen2-5-1-5b-46a7fdad"
    assert token_of("org/name") == "org-name-7e624f06"


@pytest.mark.parametrize(
    "text",
    ["", " a", "a ", "a\n", "a\x00b", "\x1b[2J", "\x7f", "a\u202eb", "\ud800", "x" * 129],
)
def test_what_is_not_a_name_is_refused(text: str) -> None:
    """Nothing that a terminal obeys, that cannot be seen, or that is too long."""
    assert not is_name(text)


@given(some.text(max_size=MAX_NAME_CHARS + 1))
def test_every_name_has_a_token(text: str) -> None:
    """One part of a subject, whatever the name."""
    assert is_token(token_of(text))
    assert subjects.parse_consumer(subjects.consumer(text, "high")) == (token_of(text), "high")


def test_what_is_not_a_name_is_not_remembered() -> None:
    """Clients may send any number of them, of megabytes each."""
    before = model_names._token_of.cache_info().currsize
    for number in range(10):
        assert is_token(token_of(f"{number}/" + "x" * MAX_NAME_CHARS))
    assert model_names._token_of.cache_info().currsize == before


def test_a_name_is_the_same_however_it_is_composed() -> None:
    """One host writes é as one character, another as two."""
    assert token_of(unicodedata.normalize("NFD", "café")) == token_of("café")


def test_a_claimed_name_must_be_true() -> None:
    """What stands in a request or in a consumer's metadata may have been written by hand."""
    token = token_of("org/name")
    assert name_of(token, "org/name") == "org/name"
    for claimed in (None, "", "other/name", "org/name ", "\x1b"):
        assert name_of(token, claimed) == token
