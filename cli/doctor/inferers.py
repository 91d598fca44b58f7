"""The live inferers: those that hang, are in each other's way, or are of another version."""

from collections.abc import Iterator

from cli.doctor.finding import Finding, look, ok, wrong
from shared.broker.inferers import OVERLAP_ADVICE, Live, find_overlaps
from shared.wire.inferers import EXTRA_BUFFERS

COMPILE_ADVICE = "compile llama.cpp on that machine, or for it: docs/compiling.md"


def hung(before: list[Live], now: list[Live], between_s: float) -> Iterator[Finding]:
    """``before`` is what they said some seconds ago: each speaks every second."""
    told_at = {one.entry.id: one.told_at for one in before}
    tokens = {job.id: job.completion_tokens for one in before for job in one.entry.jobs}
    for one in now:
        name = f"inferer {one.entry.id}"
        if told_at.get(one.entry.id) == one.told_at:
            yield wrong(
                name,
                f"has said nothing for at least {between_s:.0f} s",
                "it is dead, stopped, hung or cut off: end its process, and its job goes to "
                "another",
            )
            continue
        for job in one.entry.jobs:
            if tokens.get(job.id) == job.completion_tokens:
                yield look(
                    name,
                    f"no new token of {job.id} for {between_s:.0f} s, {job.completion_tokens} yet",
                    "a long prompt takes its time; if it stays so, end the process: the job goes "
                    "to another",
                )


def computing(live: list[Live]) -> Iterator[Finding]:
    """With what of its CPU each computes, and whether it could do better."""
    for entry in (one.entry for one in live):
        if not entry.cpu:
            continue  # of an earlier version
        name = f"inferer {entry.id}"
        found = f"{entry.cpu}; llama.cpp was compiled for {', '.join(entry.cpu_features)}"
        if entry.warning is not None:
            unused = ", ".join(name for name in entry.cpu_features if name in EXTRA_BUFFERS)
            yield look(name, f"{found}, and does not use {unused}: {entry.warning}", COMPILE_ADVICE)
        elif entry.cpu_features_missing:
            missing = ", ".join(entry.cpu_features_missing)
            yield look(name, f"{found}; this CPU also has {missing}", COMPILE_ADVICE)
        else:
            yield ok(name, f"{found}, and uses all of it")


def overlapping(live: list[Live]) -> Iterator[Finding]:
    entries = {one.entry.id: one.entry for one in live}
    pairs = [
        (entries[first], entries[second])
        for first, others in find_overlaps(entries.values()).items()
        for second in others
        if first < second
    ]
    for first, second in pairs:
        yield wrong(
            "CPUs",
            f"{first.id} and {second.id} on {first.host} share CPUs: {first.threads} and "
            f"{second.threads} threads on {len(set(first.cpus) | set(second.cpus))}",
            OVERLAP_ADVICE,
        )
    if live and not pairs:
        yield ok("CPUs", "no two inferers are in each other's way")


def versions(gateway: str | None, live: list[Live]) -> Iterator[Finding]:
    """Of the gateway, None if it does not answer, and of the inferers."""
    fleet = sorted({one.entry.version for one in live})
    told = [f"gateway {gateway}"] if gateway else []
    told += [f"inferers {', '.join(fleet)}"] if fleet else []
    if len({*fleet, gateway} - {None}) > 1:
        yield look("versions", "; ".join(told), "finish the update")
    elif told:
        yield ok("versions", "; ".join(told))
