"""The ledger as it is printed."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from statistics import median

from tests.chaos.ledger import Ledger

MOST_PROBLEMS = 25
SLOW_S = 45.0


def report(ledger: Ledger) -> str:
    return "\n".join(
        [*_jobs(ledger), "", *_recovery(ledger), *_slow(ledger), "", *_verdict(ledger)]
    )


def _jobs(ledger: Ledger) -> Iterator[str]:
    results = ledger.results
    claimed = [result for job_id, result in results.items() if job_id in ledger.accepted]
    kinds = Counter(type(result).__name__.lower() for result in claimed)
    codes = Counter((type(r).__name__.lower(), getattr(r, "code", "")) for r in claimed)
    yield f"seed        {ledger.seed}"
    yield f"accepted    {len(ledger.accepted)}"
    for kind in ("completed", "failed", "cancelled", "expired"):
        reasons = ", ".join(f"{code} {n}" for (k, code), n in sorted(codes.items()) if k == kind)
        yield f"{kind:<11} {kinds[kind]}" + (f" ({reasons})" if kind != "completed" else "")
    lost = [problem for problem in ledger.problems() if problem.kind == "lost"]
    yield f"lost        {len(lost)}"
    yield ""
    orphans = results.keys() - ledger.accepted.keys()
    announced = Counter(len(found) for found in ledger.announced.values())
    yield f"jobs that ran although the answer to their submit was lost: {len(orphans)}"
    yield f"results stored, over all time: {ledger.store.ever_stored}, of {len(results)} jobs"
    yield f"announcements for each job: {dict(sorted(announced.items()))}, " + (
        f"missed by the listeners: {len(ledger.unheard())}"
    )
    yield f"answers compared with the stored result: {len(ledger.answers)}"
    yield (
        f"token streams compared: {len(ledger.texts)}, "
        f"taken up again {ledger.readings - len(ledger.texts)} times"
    )
    yield f"calls that clients had to repeat: {dict(sorted(ledger.repeated.items()))}"
    attempts = Counter(result.attempt for result in results.values())
    yield f"attempts: {dict(sorted(attempts.items()))}"
    late = sum(1 for count in ledger.finishes.values() if count > 1)
    yield f"settled by more than one delivery, the later one in vain: {late}"


def _recovery(ledger: Ledger) -> Iterator[str]:
    """From each strike to the next stored result, and to that of the job it struck."""
    times = sorted(stored[0].at for stored in ledger.store.results.values())
    following: dict[str, list[float]] = defaultdict(list)
    own: dict[str, list[float]] = defaultdict(list)
    struck = Counter(strike.kind for strike in ledger.strikes)
    for strike in ledger.strikes:
        if strike.at is None:
            continue
        later = next((at for at in times if at > strike.at), None)
        if later is not None:
            following[strike.kind].append(later - strike.at)
        if strike.job_id in ledger.store.results:
            own[strike.kind].append(ledger.store.results[strike.job_id][0].at - strike.at)
    yield f"{'recovery, s':<18}{'strikes':>8}{'next result p50':>17}{'max':>7}" + (
        f"{'the job it struck p50':>24}{'max':>7}"
    )
    for kind in sorted(struck):
        yield (
            f"{kind:<18}{struck[kind]:>8}{_p50_and_max(following[kind], 17)}"
            f"{_p50_and_max(own[kind], 24)}"
        )


def _slow(ledger: Ledger) -> Iterator[str]:
    """What is known of struck jobs that took longer than a lease on a cluster explains."""
    results = ledger.results
    for strike in ledger.strikes:
        if strike.at is None or strike.job_id not in results:
            continue
        seconds = ledger.store.results[strike.job_id][0].at - strike.at
        if seconds > SLOW_S:
            result = results[strike.job_id]
            struck = [str(other.kind) for other in ledger.strikes if other.job_id == result.id]
            yield (
                f"{seconds:.1f} s: {result.id}, {result.priority}, attempt {result.attempt}, "
                f"ended by {result.inferer}; struck by {', '.join(struck)}"
            )


def _p50_and_max(values: list[float], width: int) -> str:
    if not values:
        return f"{'-':>{width}}{'-':>7}"
    return f"{median(values):>{width}.1f}{max(values):>7.1f}"


def _verdict(ledger: Ledger) -> Iterator[str]:
    problems = ledger.problems()
    if not problems:
        yield "the ledger balances"
        return
    counts = Counter(problem.kind for problem in problems)
    counted = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    yield f"THE LEDGER DOES NOT BALANCE: {counted}"
    for problem in problems[:MOST_PROBLEMS]:
        yield f"  {problem.kind}: {problem.text}"
    if len(problems) > MOST_PROBLEMS:
        yield f"  and {len(problems) - MOST_PROBLEMS} more"
