"""Create a model and its engine from the ``INFERER_*`` settings."""

from pathlib import Path

from services.inferer.engine.embedding_engine import EmbeddingEngine
from services.inferer.engine.engine import Engine
from services.inferer.engine.memory import MIB
from services.inferer.engine.model import Model
from services.inferer.engine.speculation import Speculation
from services.inferer.settings import InfererSettings
from shared.cpus import usable_cpus

TYPICAL_SLOTS = 4
"""Of ``INFERER_CONCURRENCY=auto``."""

AnyEngine = Engine | EmbeddingEngine
"""What a worker needs of an engine, both have."""


def load_model(
    settings: InfererSettings, path: Path, *, extra_buffers: bool, chat: bool = True
) -> Model:
    """See `Model`."""
    return Model(
        path,
        settings.gpu_layers,
        split_mode=settings.split_mode,
        main_gpu=settings.main_gpu,
        extra_buffers=extra_buffers,
        chat=chat,
        adapters=settings.adapters_folder,
    )


def start_engine(
    settings: InfererSettings,
    model: Model,
    *,
    slots: int,
    speculation: Speculation | None,
) -> Engine:
    """See `Engine`."""
    return Engine(
        model,
        slots=slots,
        n_ctx=model.context_size(settings.n_ctx),
        n_batch=settings.n_batch,
        threads=settings.threads or usable_cpus(),
        kv_type=settings.kv_type,
        flash_attention=settings.flash_attention,
        batching=settings.batching,
        expected_slots=TYPICAL_SLOTS if settings.concurrency == "auto" else slots,
        cache_bytes=settings.cache_mb * MIB,
        shares_cache=settings.cache_shared,
        speculation=speculation,
    )


def start_embedding_engine(
    settings: InfererSettings, model: Model, *, slots: int
) -> EmbeddingEngine:
    """See `EmbeddingEngine`."""
    return EmbeddingEngine(
        model,
        slots=slots,
        n_ctx=model.context_size(settings.n_ctx),
        n_batch=settings.n_batch,
        threads=settings.threads or usable_cpus(),
        kv_type=settings.kv_type,
        flash_attention=settings.flash_attention,
    )
