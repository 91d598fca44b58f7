"""Examines the queue of one model: its inferers, its limit, jobs in flight and waiting."""

from collections.abc import Iterator
from datetime import datetime
from shlex import quote

from cli.doctor.finding import Finding, error, ok, warning
from shared.broker.consumers import ModelConsumers
from shared.broker.inferers import Live, find_blockage
from shared.counts import counted
from shared.timestamps import milliseconds_between, timestamp
from shared.wire import subjects


def examine_queue(
    before: ModelConsumers | None,
    now: ModelConsumers,
    live: list[Live],
    *,
    at: datetime,
    oldest_s: float | None,
    some_died: bool,
) -> Iterator[Finding]:
    """``before`` is the queue some seconds ago; ``live`` are the model's inferers at ``at``, the
    broker's time."""
    model, inferers = now.name, [one.entry for one in live]
    blockage = find_blockage(model, inferers)
    waits = f"{now.waiting} waiting" + (f", the oldest for {oldest_s:.0f} s" if oldest_s else "")
    queue = f"{waits}, {now.in_flight} in flight, limit {now.limit}"
    if not inferers and now.waiting + now.in_flight == 0:
        yield warning(
            model,
            "no live inferer and no jobs",
            "normal with `sluice up --min 0`, where the next job starts one",
        )
        return
    if not inferers:
        yield error(
            model,
            f"no live inferer; {queue}",
            # The entry of one that hangs expires like that of a dead one.
            "end the process of one that hangs, so that it is restarted; if there is none, start "
            f"one that serves {model}: sluice up --model …, or INFERER_ALIAS={quote(model)} "
            "INFERER_MODEL=… python -m services.inferer",
        )
        return
    slots = sum(entry.slots for entry in inferers)
    yield ok(model, f"live inferers: {len(inferers)}, slots: {slots}; {queue}")
    if blockage is not None:
        yield error(model, *blockage)
    jobs = [job for entry in inferers for job in entry.jobs]
    yield from _limit(now, slots, unreported=max(0, now.in_flight - len(jobs)))
    if jobs:
        since = min(job.started_at for job in jobs)
        seconds = milliseconds_between(since, timestamp(at)) / 1000
        yield ok(model, f"the longest-running job started {seconds:.0f} s ago")
    if now.in_flight > len(jobs) + (0 if some_died else slots):
        yield warning(
            model,
            f"{counted(now.in_flight, 'job')} in flight, the live inferers report {len(jobs)}",
            "the jobs of a dead inferer are redelivered when the lease expires, after 12 s at most "
            "(30 s on a cluster)",
        )
    if before is not None and _is_stalled(before, now, slots):
        yield error(
            model,
            f"{now.waiting} waiting although a slot is free, and none was delivered for seconds",
            "see the logs of the inferers; end the process of one that does not pull "
            f"(nats consumer info {subjects.REQUESTS} {now.token}: Waiting Pulls)",
        )
    if now.redelivered:
        yield warning(
            model,
            f"{counted(now.redelivered, 'job')} delivered more than once",
            "requeued because the slot had received another job, or the inferer died or shut down "
            "while running it: see the inferers' logs",
        )


def _limit(consumers: ModelConsumers, slots: int, unreported: int) -> Iterator[Finding]:
    """The limit should be the number of live slots, for every priority; and for a while one more
    for each job in flight of a dead inferer, which none of the live ones reports."""
    limits = {info.config.max_ack_pending or 1 for info in consumers.by_priority.values()}
    if len(limits) == 1 and max(1, slots) <= min(limits) <= max(1, slots) + unreported:
        return
    yield error(
        consumers.name,
        f"the limit is {' or '.join(map(str, sorted(limits)))}, the live slots are {slots}",
        "a gateway sets it within seconds: is one running?",
    )


def _is_stalled(before: ModelConsumers, now: ModelConsumers, slots: int) -> bool:
    return (
        min(before.waiting, now.waiting) > 0
        and max(before.in_flight, now.in_flight) < slots
        and before.delivered == now.delivered
    )
