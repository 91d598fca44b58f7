"""Which adapters a gateway offers."""

import msgspec
import pytest

from services.gateway.validation.limits import check_submission
from shared.errors import InvalidRequest
from shared.wire.api import JobSubmission
from shared.wire.inferers import InfererEntry, ModelFacts
from shared.wire.requests import SamplingDefaults

ENTRY = InfererEntry(
    id="i",
    model="m",
    slots=1,
    host="h",
    threads=1,
    n_ctx=512,
    tasks=["chat", "complete"],
    started_at="2026-01-31T12:00:00.000000Z",
    version="1",
    vocabulary=100,
)
LATER = "2026-01-31T12:00:01.000000Z"


def entry(*adapters: str, **fields: object) -> InfererEntry:
    return msgspec.structs.replace(ENTRY, adapters=list(adapters), **fields)


@pytest.mark.parametrize(
    ("inferers", "offered"),
    [
        ([entry()], []),
        ([entry("b", "a")], ["a", "b"]),
        ([entry("a", "b"), entry("b", "c")], ["b"]),
        ([entry("a"), entry()], []),
    ],
)
def test_those_that_all_inferers_have_are_offered(
    inferers: list[InfererEntry], offered: list[str]
) -> None:
    """In an order that is the same at each gateway."""
    assert ModelFacts.of(inferers).adapters == offered
    assert ModelFacts.of(inferers[::-1]).adapters == offered


def test_other_facts_are_those_of_the_youngest() -> None:
    hot = SamplingDefaults(temperature=1.5)
    facts = ModelFacts.of([entry("a"), entry("a", started_at=LATER, sampling_defaults=hot), ENTRY])
    assert (facts.sampling_defaults, facts.adapters) == (hot, [])


@pytest.mark.parametrize(("inferers", "most"), [([8], 8), ([8, 1], 1), ([1, 8], 1), ([8, 4], 4)])
def test_several_answers_need_inferers_that_all_give_them(inferers: list[int], most: int) -> None:
    """One of an older version does not say how many it gives, which is one: it would ignore `n`."""
    entries = [
        entry(started_at=at, max_choices=count)
        for at, count in zip((ENTRY.started_at, LATER), inferers, strict=False)
    ]
    facts = ModelFacts.of(entries)
    assert facts.max_choices == most
    if most == 1:
        with pytest.raises(InvalidRequest):
            check_submission(JobSubmission(prompt="x", n=2), facts)
    assert ENTRY.max_choices == 1


def test_only_what_all_inferers_accept_is_accepted() -> None:
    entries = [entry(accepts=["b", "a"]), entry(started_at=LATER, accepts=["b", "c"])]
    assert ModelFacts.of(entries).accepts == ["b"]
    assert ModelFacts.of([*entries, ENTRY]).accepts == []


def test_an_unknown_one_is_refused_by_name_with_what_there_is() -> None:
    wanted = JobSubmission(prompt="x", adapter="c")
    for facts, has in (
        (ModelFacts.of([entry("a", "b")]), "a, b"),
        (ModelFacts.of([entry()]), "none"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            check_submission(wanted, facts)
        assert refused.value.message == f"adapter: this model has no adapter c; it has: {has}"
        assert refused.value.param == "adapter"
    check_submission(wanted, ModelFacts.of([entry("c")]))
    check_submission(wanted, None)
