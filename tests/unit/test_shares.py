"""`sluice up --inferers N`: who may run on which CPUs."""

import pytest

from cli.errors import EXIT_USAGE, CommandError
from cli.scale import share_out


@pytest.mark.parametrize("inferers", [1, 2, 3, 5])
def test_shares_are_disjoint_equal_and_complete(inferers: int) -> None:
    """No CPU twice, none left over, no share larger than another by more than one."""
    cpus = [0, 1, 4, 5, 9]
    shares = share_out(cpus, inferers)
    assert len(shares) == inferers
    assert sorted(cpu for share in shares for cpu in share) == cpus
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_more_inferers_than_cpus_are_refused() -> None:
    """With a sentence that says why, and the status for wrong use."""
    with pytest.raises(CommandError, match="3 inferers: there are 2 CPUs") as refused:
        share_out([0, 1], 3)
    assert refused.value.exit_status == EXIT_USAGE


def test_a_stack_without_inferers_needs_no_cpus() -> None:
    assert share_out([0], 0) == []
