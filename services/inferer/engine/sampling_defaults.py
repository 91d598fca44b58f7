"""The sampling that a GGUF recommends for its model."""

from collections.abc import Callable
from typing import Any, get_type_hints

import msgspec
from msgspec import UNSET

from shared.logs import logger
from shared.wire.requests import Sampling, SamplingDefaults

SAMPLING = "general.sampling."
KEYS = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "penalty_repeat",
}
"""By the names of requests, without `SAMPLING`."""
NOT_SUPPORTED = (
    "sequence",
    "xtc_probability",
    "xtc_threshold",
    "penalty_last_n",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
)

log = logger()


def read_sampling_defaults(read: Callable[[str], str]) -> SamplingDefaults:
    """What the GGUF says, and llama.cpp's defaults for the rest. ``read`` returns a field as text,
    empty if it is missing. Values that no request could have, and fields that Sluice does not
    support, are logged and ignored."""
    types = get_type_hints(SamplingDefaults, include_extras=True)
    found: dict[str, Any] = {}
    for name, key in KEYS.items():
        if text := read(SAMPLING + key):
            try:
                found[name] = msgspec.convert(text, types[name], strict=False)
            except msgspec.ValidationError as error:
                log.warning(
                    "sampling_default_ignored", field=SAMPLING + key, value=text, why=str(error)
                )
    for key in NOT_SUPPORTED:
        if text := read(SAMPLING + key):
            log.warning(
                "sampling_default_ignored", field=SAMPLING + key, value=text, why="not supported"
            )
    return SamplingDefaults(**found)


def chosen_sampling(options: Sampling, defaults: SamplingDefaults) -> SamplingDefaults:
    """What holds for a request with ``options``."""
    values = {name: getattr(options, name) for name in SamplingDefaults.__struct_fields__}
    return msgspec.structs.replace(
        defaults, **{name: value for name, value in values.items() if value is not UNSET}
    )
