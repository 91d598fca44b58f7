"""Parses and normalizes hosts and origins, so that they can be compared."""

import ipaddress
import re
from typing import NamedTuple

DEFAULT_PORTS = {"http": 80, "https": 443}

ANY = "*"

_NAME = r"(\[[0-9a-fA-F:.]+\]|[a-zA-Z0-9._~-]+)"
_HOST = re.compile(rf"{_NAME}(?::([0-9]*))?")
_ORIGIN = re.compile(rf"([a-zA-Z][a-zA-Z0-9+.-]*)://{_NAME}(?::([0-9]+))?")


class Address(NamedTuple):
    """A normalized host: in lower case, without a final dot, an IPv6 address in its shortest form.
    ``port`` is None if it is absent or the default of the scheme."""

    name: str
    port: int | None

    @property
    def is_ip(self) -> bool:
        try:
            ipaddress.ip_address(self.name)
        except ValueError:
            return False
        return True


def is_loopback(host: str) -> bool:
    """Whether a server that listens at ``host`` can only be reached from its own machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Origin(NamedTuple):
    scheme: str
    address: Address


def parse_host(text: str) -> Address | None:
    """Parse ``name``, ``name:port`` or ``[IPv6]:port``; None if it is not valid."""
    match = _HOST.fullmatch(text)
    return match and _address(match[1], match[2])


def parse_origin(text: str) -> Origin | None:
    """Parse ``scheme://name:port``; None if it is not valid, as for ``null``."""
    match = _ORIGIN.fullmatch(text)
    address = match and _address(match[2], match[3])
    if match is None or address is None:
        return None
    return origin_of(match[1].lower(), address)


def origin_of(scheme: str, address: Address) -> Origin:
    """The origin of pages that are served from ``address``."""
    if address.port == DEFAULT_PORTS.get(scheme):
        address = Address(address.name, None)
    return Origin(scheme, address)


def _address(name: str, port: str | None) -> Address | None:
    name = name.lower().removesuffix(".")
    if name.startswith("["):
        try:
            name = str(ipaddress.IPv6Address(name[1:-1]))
        except ValueError:
            return None
    if not name or (port and (len(port) > 5 or int(port) > 65535)):
        return None
    return Address(name, int(port) if port else None)
