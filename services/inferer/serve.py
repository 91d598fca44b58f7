"""Load a model and serve it, one job at a time through each slot.

``python -m services.inferer`` starts this as its child, with the number of the file descriptor of
the flight recorder as argument.
"""

import asyncio
import faulthandler
import os
import socket
import sys
from contextlib import AsyncExitStack

from services.inferer.crash.flight_recorder import FlightRecorder
from services.inferer.engine.fitness import check_fitness
from services.inferer.engine.library import compiled_for, not_compiled_for
from services.inferer.engine.set_up import (
    AnyEngine,
    load_model,
    start_embedding_engine,
    start_engine,
)
from services.inferer.engine.speculation import Speculation
from services.inferer.engine.watchdog import watched
from services.inferer.fleet.control import controlled
from services.inferer.fleet.cpu_overlap import overlaps_logged
from services.inferer.fleet.heartbeat import presence
from services.inferer.settings import InfererSettings
from services.inferer.worker.worker import Worker
from shared import __version__
from shared.broker.connection import Broker
from shared.broker.consumers import require_own_wire
from shared.config import BrokerSettings, load
from shared.cpus import cpu_flags, cpu_model, own_cpus
from shared.logs import configure_logs, drain_logs, logger
from shared.model_files import locate_cancellable
from shared.model_names import served_name
from shared.process.lifecycle import ShutdownRequested, run_process, stop_on_signals, until_stopped
from shared.timestamps import timestamp
from shared.wire.inferers import GRAMMARS, PROMPT_TOKENS, InfererEntry
from shared.wire.requests import MAX_CHOICES


async def main(recorder: FlightRecorder) -> None:
    settings = load(InfererSettings, "INFERER")
    broker_settings = load(BrokerSettings, "NATS")
    alias = served_name(settings.model, settings.alias)
    inferer_id = settings.identity(alias)
    configure_logs("inferer", inferer=inferer_id)
    recorder.describe(inferer_id, alias, "loading its model")
    with stop_on_signals() as stopping:
        try:
            await _serve(settings, broker_settings, alias, inferer_id, stopping, recorder)
        except ShutdownRequested:
            logger().info("inferer_stopped", while_="starting")


async def _serve(
    settings: InfererSettings,
    broker_settings: BrokerSettings,
    alias: str,
    inferer_id: str,
    stopping: asyncio.Event,
    recorder: FlightRecorder,
) -> None:
    log = logger()
    path = await until_stopped(stopping, locate_cancellable(settings.model))
    fitness = await until_stopped(stopping, check_fitness(settings, path))
    model = await asyncio.to_thread(load_model, settings, path, extra_buffers=fitness.extra_buffers)
    cpu, features = cpu_model(), compiled_for()
    features_missing = not_compiled_for(features, cpu_flags())
    log.info(
        "model_loaded",
        model=alias,
        path=str(path),
        load_ms=round(model.load_ms),
        cpu=cpu,
        cpu_features=features,
    )
    engine: AnyEngine
    if model.generates_text:
        engine = start_engine(settings, model, slots=settings.slots, speculation=Speculation())
    else:
        engine = start_embedding_engine(settings, model, slots=settings.slots)
    broker = Broker(broker_settings, f"inferer {inferer_id}")
    try:
        await until_stopped(stopping, broker.connect())
        worker = Worker(
            broker,
            engine,
            recorder=recorder,
            inferer_id=inferer_id,
            model=alias,
            concurrency=settings.concurrency,
            priority=settings.priority,
            max_attempts=settings.max_attempts,
            retry_s=settings.retry_s,
            grace_s=settings.grace_s,
            tested_speed=fitness.speed,
        )
        started_at = timestamp(broker.now())
        token_bytes = await asyncio.to_thread(model.longest_token_bytes)

        def describe() -> InfererEntry:
            return InfererEntry(
                id=inferer_id,
                model=alias,
                slots=worker.slots,
                priority=settings.priority,
                host=socket.gethostname(),
                threads=engine.threads,
                n_ctx=engine.n_ctx,
                tasks=model.tasks,
                started_at=started_at,
                version=__version__,
                token_bytes=token_bytes,
                vocabulary=model.vocabulary.size,
                format=model.chat.format if model.chat else None,
                template_options=model.chat.options if model.chat else [],
                dimensions=model.dimensions,
                adapters=list(model.adapters),
                sampling_defaults=model.sampling_defaults,
                max_choices=MAX_CHOICES,
                accepts=[GRAMMARS, PROMPT_TOKENS],
                state=worker.state,
                cpus=own_cpus(),
                gpu_layers=model.gpu_layers,
                cpu=cpu,
                cpu_features=features,
                cpu_features_missing=features_missing,
                warning=fitness.warning,
                jobs=worker.running,
                prompt_tokens_per_s=worker.speed.prompt,
                tokens_per_s=worker.speed.answer,
                slowdowns=engine.slowdowns(worker.slots),
                jobs_per_batch=engine.jobs_per_batch,
                idle_since=worker.idle_since,
                prefixes=list(worker.prefixes),
            )

        def announce() -> None:
            recorder.describe(inferer_id, alias, "waiting for jobs")
            log.info(
                "inferer_ready",
                model=alias,
                concurrency=settings.concurrency,
                threads=engine.threads,
                gpu_layers=model.gpu_layers,
                n_ctx=engine.n_ctx,
                tasks=model.tasks,
            )

        async with AsyncExitStack() as stack:
            await until_stopped(stopping, require_own_wire(broker, alias))
            await stack.enter_async_context(overlaps_logged(broker, describe))
            entering = stack.enter_async_context(presence(broker, describe, worker.active))
            publish = await until_stopped(stopping, entering)
            await stack.enter_async_context(controlled(broker, inferer_id, worker, publish))
            await stack.enter_async_context(watched(engine, settings.stall_s))
            await worker.run(stopping, announce, publish)
    finally:
        is_idle = engine.close()
        if is_idle:
            model.close()
        await broker.close()
    log.info("inferer_stopped")
    if not is_idle:
        # A thread that is in native code while the interpreter ends may abort the process.
        drain_logs()
        os._exit(0)


if __name__ == "__main__":
    # Of the thread that crashed: those of others change while they are read, which can crash, too.
    faulthandler.enable(all_threads=False)
    recorder = FlightRecorder(int(sys.argv[1]))
    sys.exit(run_process("inferer", lambda: main(recorder)))
