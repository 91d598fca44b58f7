"""Reads settings from environment variables into a frozen Struct."""

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec

from shared.errors import SettingsError

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=24 * 3600)]
MAX_SLOTS = 64
"""Jobs at a time of one inferer."""

LAST_PRIORITY = 9
"""Of the pulls of an inferer, at the broker; 0 is served first."""

StartConcurrency = Annotated[int, msgspec.Meta(ge=1, le=MAX_SLOTS)] | Literal["auto"]
"""How many jobs an inferer runs at once after its start."""

URL_SCHEMES = ("nats", "tls", "ws", "wss")

SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
SERVICE_VARIABLE = re.compile(
    r"_SERVICE_HOST$|_SERVICE_PORT(_|$)|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$"
)

T = TypeVar("T", bound=msgspec.Struct)


class BrokerSettings(msgspec.Struct, frozen=True):
    """``NATS_*``: the address of the broker."""

    url: str = "nats://127.0.0.1:4222"
    """The broker; separate several with commas."""

    def __post_init__(self) -> None:
        for server in self.servers:
            parts = urlsplit(server)  # .port raises ValueError if it is not a number
            if parts.scheme not in URL_SCHEMES or not parts.hostname or parts.port == 0:
                raise ValueError("give nats://host:port, several separated by commas")

    @property
    def servers(self) -> list[str]:
        return [server.strip() for server in self.url.split(",")]


def load(settings: type[T], prefix: str, environ: Mapping[str, str] | None = None) -> T:
    """Read ``settings`` from variables named ``<prefix>_<FIELD>``. Empty variables are ignored, and
    so are the service links of Kubernetes.

    Raises:
        SettingsError: an invalid value, or, except for NATS_*, an unknown name.
    """
    environ = os.environ if environ is None else environ
    fields = {f"{prefix}_{name}".upper(): name for name in settings.__struct_fields__}
    given = {
        variable: value
        for variable, value in environ.items()
        if variable.startswith(f"{prefix}_")
        and value != ""
        and not _is_service_link(variable, value)
    }
    if prefix != "NATS":  # the `nats` command has variables of its own
        for variable in given:
            if variable not in fields:
                raise SettingsError(_unknown(variable, list(fields)))
    values = {fields[variable]: value for variable, value in given.items() if variable in fields}
    for name, value in values.items():
        # One at a time, so that the error can name the variable.
        try:
            msgspec.convert({name: value}, settings, strict=False)
        except msgspec.ValidationError as error:
            why = _choices(settings, name) or str(error).partition(" - at")[0]
            why = why[:1].lower() + why[1:]
            raise SettingsError(f"{prefix}_{name}".upper() + f"={value!r}: {why}") from None
    return msgspec.convert(values, settings, strict=False)


def _choices(settings: type[msgspec.Struct], name: str) -> str | None:
    """What to choose from, if a field has words among its values."""
    struct = msgspec.inspect.type_info(settings)
    assert isinstance(struct, msgspec.inspect.StructType)
    (kind,) = (field.type for field in struct.fields if field.name == name)
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    words = [
        str(word)
        for one in kinds
        if isinstance(one, msgspec.inspect.LiteralType)
        for word in one.values
    ]
    numbers = [
        f"a number from {one.ge} to {one.le}"
        for one in kinds
        if isinstance(one, msgspec.inspect.IntType)
    ]
    return f"choose {' or '.join(numbers + words)}" if words else None


def _is_service_link(variable: str, value: str) -> bool:
    """Whether Kubernetes set this variable as a service link: a Service named ``gateway`` sets
    ``GATEWAY_PORT=tcp://10.0.0.1:5001`` and others in every pod without ``enableServiceLinks:
    false``."""
    if variable.endswith("_PORT") and SERVICE_ADDRESS.match(value):
        return True
    return SERVICE_VARIABLE.search(variable) is not None


def _unknown(variable: str, known: list[str]) -> str:
    # Without the prefix, which all of them share.
    prefix = variable[: variable.find("_") + 1]
    bare = [name.removeprefix(prefix) for name in known]
    matches = difflib.get_close_matches(variable.removeprefix(prefix), bare, n=1)
    close = [prefix + match for match in matches]
    hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(sorted(known))}"
    return f"{variable}: unknown setting; {hint}"
