"""Examines live inferers: hung ones, shared CPUs, unused CPU features, mixed versions."""

from collections.abc import Iterator

from cli.doctor.finding import Finding, error, ok, warning
from shared.broker.inferers import OVERLAP_ADVICE, Live, find_overlaps
from shared.wire.inferers import EXTRA_BUFFERS, RunningJob

COMPILE_ADVICE = "compile llama.cpp on that machine, or for it: docs/compiling.md"


def hung(before: list[Live], now: list[Live], between_s: float) -> Iterator[Finding]:
    """Inferers without a heartbeat, and jobs without progress, since ``before``."""
    last_heartbeat = {one.entry.id: one.heartbeat_at for one in before}
    progress = {job.id: _progress(job) for one in before for job in one.entry.jobs}
    for one in now:
        name = f"inferer {one.entry.id}"
        if last_heartbeat.get(one.entry.id) == one.heartbeat_at:
            yield error(
                name,
                f"no heartbeat for at least {between_s:.0f} s",
                "it is dead, stopped, hung or disconnected: end its process, and its job is "
                "redelivered to another one",
            )
            continue
        for job in one.entry.jobs:
            if progress.get(job.id) == _progress(job):
                yield warning(
                    name,
                    f"no progress on {job.id} for {between_s:.0f} s, "
                    f"{job.completion_tokens} tokens so far",
                    "normal while a slow model computes a part of a prompt; if it lasts, end the "
                    "process, and the job is redelivered to another one",
                )


def _progress(job: RunningJob) -> tuple[int, int | None]:
    return job.completion_tokens, job.prompt_tokens_left


def computing(live: list[Live]) -> Iterator[Finding]:
    """Which CPU features each inferer uses, and which it could use."""
    for entry in (one.entry for one in live):
        if not entry.cpu:
            continue  # of an earlier version
        name = f"inferer {entry.id}"
        found = f"{entry.cpu}; llama.cpp was compiled for {', '.join(entry.cpu_features)}"
        if entry.warning is not None:
            unused = ", ".join(name for name in entry.cpu_features if name in EXTRA_BUFFERS)
            yield warning(
                name, f"{found}, and does not use {unused}: {entry.warning}", COMPILE_ADVICE
            )
        elif entry.cpu_features_missing:
            missing = ", ".join(entry.cpu_features_missing)
            yield warning(name, f"{found}; this CPU also has {missing}", COMPILE_ADVICE)
        else:
            yield ok(name, f"{found}, all that the CPU has")


def overlapping(live: list[Live]) -> Iterator[Finding]:
    entries = {one.entry.id: one.entry for one in live}
    pairs = [
        (entries[first], entries[second])
        for first, others in find_overlaps(entries.values()).items()
        for second in others
        if first < second
    ]
    for first, second in pairs:
        yield error(
            "CPUs",
            f"{first.id} and {second.id} on {first.host} share CPUs: {first.threads} and "
            f"{second.threads} threads on {len(set(first.cpus) | set(second.cpus))}",
            OVERLAP_ADVICE,
        )
    if live and not pairs:
        yield ok("CPUs", "no inferers share CPUs")


def versions(gateway: str | None, live: list[Live]) -> Iterator[Finding]:
    """The versions of the gateway, None if it does not respond, and of the inferers."""
    fleet = sorted({one.entry.version for one in live})
    found = [f"gateway {gateway}"] if gateway else []
    found += [f"inferers {', '.join(fleet)}"] if fleet else []
    if len({*fleet, gateway} - {None}) > 1:
        yield warning("versions", "; ".join(found), "finish the update")
    elif found:
        yield ok("versions", "; ".join(found))
