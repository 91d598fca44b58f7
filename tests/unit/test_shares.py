"""`sluice up`: how many inferers, and who may run on which CPUs."""

import pytest

from cli.exit_status import EXIT_USAGE, CommandError
from cli.up.scale import Scale, cpu_shares, parse_scale, split_cpus
from shared.cpus import own_cpus, usable_cpus


@pytest.mark.parametrize("inferers", [1, 2, 3, 5])
def test_shares_are_disjoint_equal_and_complete(inferers: int) -> None:
    """No CPU twice, none left over, no share larger than another by more than one."""
    cpus = [0, 1, 4, 5, 9]
    shares = split_cpus(cpus, inferers)
    assert len(shares) == inferers
    assert sorted(cpu for share in shares for cpu in share) == cpus
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_more_inferers_than_cpus_are_refused() -> None:
    """With a sentence that says why, and the status for wrong use."""
    with pytest.raises(CommandError, match="3 inferers on 2 CPUs") as refused:
        split_cpus([0, 1], 3)
    assert refused.value.exit_status == EXIT_USAGE


def test_a_stack_without_inferers_needs_no_cpus() -> None:
    assert split_cpus([0], 0) == []


@pytest.mark.parametrize(
    ("inferers", "least", "most", "meant"),
    [
        (None, None, None, (1, 1)),
        (2, None, None, (2, 2)),
        (0, None, None, (0, 0)),
        (None, 0, 3, (0, 3)),
        (None, None, 3, (1, 3)),
        (None, None, 0, (0, 0)),
        (None, 0, None, (0, usable_cpus())),
        (None, 999, None, (999, 999)),
    ],
)
def test_missing_numbers_of_inferers_are_filled_in(
    inferers: int | None, least: int | None, most: int | None, meant: tuple[int, int]
) -> None:
    """One is always there; there are never more than CPUs, unless more were asked for."""
    assert parse_scale(inferers, least, most, 60) == Scale(*meant, 60)


def test_numbers_are_those_of_each_model() -> None:
    """By default as many as each model's share of the CPUs, but one at least."""
    cpus = usable_cpus()
    assert parse_scale(2, None, None, 60, models=3) == Scale(2, 2, 60)
    assert parse_scale(None, 0, None, 60, models=cpus) == Scale(0, 1, 60)
    assert parse_scale(None, 0, None, 60, models=cpus + 1) == Scale(0, 1, 60)


def test_the_inferers_of_all_models_share_the_cpus() -> None:
    """One inferer alone is not pinned; those of several models are, and more than CPUs refused."""
    cpus = own_cpus()[: usable_cpus()]
    assert cpu_shares(Scale(1, 1, 60), models=1) == [None]
    shares = cpu_shares(Scale(0, 1, 60), models=len(cpus))
    assert shares == ([[cpu] for cpu in cpus] if len(cpus) > 1 else [None])
    with pytest.raises(CommandError, match=f"give at most {len(cpus)} in all"):
        cpu_shares(Scale(0, 1, 60), models=len(cpus) + 1)
