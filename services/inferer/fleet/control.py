"""Commands to an inferer that runs: how many slots to have."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from nats.aio.msg import Msg

from services.inferer.worker.worker import Worker
from shared.broker.connection import Broker
from shared.errors import SluiceError
from shared.logs import logger
from shared.wire import subjects
from shared.wire.codecs import Unreadable, decode_concurrency, encode
from shared.wire.inferers import ConcurrencyChange
from shared.wire.replies import send_reply

log = logger()


@asynccontextmanager
async def controlled(
    broker: Broker, inferer_id: str, worker: Worker, publish: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Obey commands during the block; ``publish`` announces at once what has changed."""

    async def obey(message: Msg) -> None:
        before = worker.slots
        refused = None
        try:
            await worker.set_slots(decode_concurrency(message.data).concurrency)
        except SluiceError as error:
            refused = error.message
        except Unreadable as error:
            refused = str(error)
        change = ConcurrencyChange(
            inferer=inferer_id,
            model=worker.model,
            before=before,
            concurrency=worker.slots,
            refused=refused,
        )
        if refused is None:
            await publish()
        log.info("concurrency_set", before=before, concurrency=worker.slots, refused=refused)
        if message.reply:
            await send_reply(broker.nc, message.reply, encode(change))

    commands = await broker.nc.subscribe(subjects.control(worker.model, inferer_id), cb=obey)
    try:
        yield
    finally:
        await commands.unsubscribe()
