"""The models of OpenAI's API."""

import calendar
from typing import Literal

from msgspec import Struct

from shared.broker.consumers import ModelConsumers
from shared.wire.requests import (
    SamplingDefaults,
)


class ModelCard(Struct, frozen=True, kw_only=True):
    """``adapters`` are the LoRA adapters that a request may name, and ``sampling_defaults`` the
    values for options that it does not set; null until an inferer has served the model once."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "sluice"
    adapters: list[str] | None = None
    sampling_defaults: SamplingDefaults | None = None

    @classmethod
    def of(cls, model: ModelConsumers) -> "ModelCard":
        created = calendar.timegm(model.created.utctimetuple()) if model.created else 0
        facts = model.facts
        if facts is None:
            return cls(id=model.name, created=created)
        return cls(
            id=model.name,
            created=created,
            adapters=facts.adapters,
            sampling_defaults=facts.sampling_defaults,
        )


class ModelList(Struct, frozen=True, kw_only=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"
