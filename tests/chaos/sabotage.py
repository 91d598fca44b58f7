"""``python -m tests.chaos.sabotage <which>``: an inferer that breaks one of the rules that keep
jobs from being lost or doubled, to show that the ledger finds out."""

import os
import signal
import sys
from contextlib import ExitStack

from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy

import services.inferer.worker.job_store as records
import services.inferer.worker.worker as worker
from services.inferer import serve
from services.inferer.crash.flight_recorder import FlightRecorder
from services.inferer.worker.delivery import Job
from services.inferer.worker.lease import acknowledge
from shared.broker.connection import Broker
from shared.broker.streams import streams
from shared.process.lifecycle import run_process
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.results import Result
from shared.wire.trace import NO_TRACE, Trace
from tests.chaos.site import Site

DIES_AT_JOB = 3


async def allow_second_results(site: Site) -> None:
    """Take the rule off the stream, too; until the next gateway starts, which mends it."""
    (results,) = (s for s in streams(site.topology) if s.name == subjects.RESULTS)
    results.discard, results.discard_new_per_subject = DiscardPolicy.OLD, False
    await site.cluster.broker.js.update_stream(results)


def store_second_results() -> None:
    """The last write wins: a result is stored whether or not there is one."""

    async def store_result(
        broker: Broker, result: Result, patience_s: float, trace: Trace = NO_TRACE
    ) -> Result:
        await broker.publish_stored(
            subjects.result(result.model, result.id), encode(result), {}, patience_s
        )
        return result

    vars(records)["store_result"] = store_result


def acknowledge_first() -> None:
    """The message leaves the queue before its result is stored; now and then death comes between
    the two."""
    jobs = iter(range(1, sys.maxsize))

    class Hasty(worker.Worker):
        async def _settle(self, job: Job, result: Result, held: ExitStack) -> None:
            await acknowledge(job.message)
            if next(jobs) == DIES_AT_JOB:
                os.kill(os.getpid(), signal.SIGKILL)
            await super()._settle(job, result, held)

    async def acknowledged_before(message: Msg) -> None:
        """The client refuses to do it twice."""

    vars(serve)["Worker"] = Hasty
    vars(worker)["acknowledge"] = acknowledged_before


SABOTAGES = {function.__name__: function for function in (store_second_results, acknowledge_first)}

if __name__ == "__main__":
    SABOTAGES[sys.argv[1]]()
    sys.exit(run_process("inferer", lambda: serve.main(FlightRecorder())))
