"""Which inferers compete for CPUs."""

import random
import time
from itertools import combinations
from typing import get_args

from shared.broker.inferers import MOST_OVERLAPS, find_overlaps, overlaps
from shared.wire.codecs import encode
from shared.wire.inferers import Cpu, Cpus, InfererEntry, OverlapNotice, OverlappingInferer


def inferer(number: int, host: str, cpus: list[int], threads: int) -> InfererEntry:
    return InfererEntry(
        id=f"inferer-{number}",
        model="tiny",
        slots=1,
        host=host,
        threads=threads,
        n_ctx=4096,
        tasks=["chat", "complete"],
        started_at="2026-01-01T00:00:00Z",
        version="0.1.0",
        cpus=cpus,
    )


def test_overlaps_are_those_of_any_two_inferers() -> None:
    """Grouped by host and by what they ask for, the same pairs are found as one by one."""
    for seed in range(200):
        chance = random.Random(seed)
        fleet = [
            inferer(
                number,
                chance.choice("ab"),
                chance.sample(range(8), chance.randint(0, 8)),
                chance.randint(1, 8),
            )
            for number in range(12)
        ]
        found = find_overlaps(fleet)
        pairs = {(one, other) for one, others in found.items() for other in others}
        expected = {
            (first.id, second.id)
            for pair in combinations(fleet, 2)
            if overlaps(*pair)
            for first, second in (pair, pair[::-1])
        }
        assert pairs == expected, f"seed {seed}"


def test_a_thousand_inferers_on_one_host_are_compared_in_little_time() -> None:
    """Each names some of those that compete with it, never itself."""
    found = find_overlaps(inferer(number, "host", [0, 1], 2) for number in range(1000))
    assert len(found) == 1000
    assert all(len(set(others)) == MOST_OVERLAPS for others in found.values())
    assert not any(one in others for one, others in found.items())


def test_inferers_with_thousands_of_cpus_each_are_compared_in_little_time() -> None:
    """A gateway compares them every two seconds, and serves nothing meanwhile."""
    fleet = [
        inferer(number, "host", [number, *range(100 + number, 4195 + number)], 4000)
        for number in range(64)
    ]
    began = time.process_time()
    found = find_overlaps(fleet)
    assert time.process_time() - began < 0.2
    assert all(len(others) == MOST_OVERLAPS for others in found.values())


def test_the_longest_notice_fits_into_a_message_of_a_megabyte() -> None:
    (_, of_number), (_, of_list) = get_args(Cpu), get_args(Cpus)
    cpus = [of_number.le] * of_list.max_length
    others = [OverlappingInferer("i" * 256, 65_536, cpus) for _ in range(MOST_OVERLAPS)]
    assert len(encode(OverlapNotice(others))) < 1_000_000
