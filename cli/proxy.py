"""Chooses the proxy for a gateway from the environment; none for this machine."""

import ipaddress
import re
import urllib.request

import httpx2

from cli.exit_status import EXIT_USAGE, CommandError


def proxy_for(url: httpx2.URL) -> httpx2.Proxy | None:
    """The proxy for ``url`` from ``http_proxy``, ``https_proxy`` or ``all_proxy``; None if
    ``no_proxy`` excludes its host, or if the host is this machine.

    Raises:
        CommandError: the proxy's URL cannot be used.
    """
    if is_this_machine(url.host) or urllib.request.proxy_bypass(url.host):
        return None
    proxies = urllib.request.getproxies()
    named = proxies.get(url.scheme) or proxies.get("all")
    if not named:
        return None
    try:
        return httpx2.Proxy(named if "://" in named else f"http://{named}")
    except (ValueError, httpx2.InvalidURL) as error:
        raise CommandError(
            f"the proxy {_without_password(named)} in the environment cannot be used ({error}); "
            f"correct {url.scheme}_proxy or all_proxy, or connect without it: "
            f"NO_PROXY={url.host}",
            EXIT_USAGE,
        ) from None


def is_this_machine(host: str) -> bool:
    """Whether ``host`` is localhost, a loopback address or an unspecified address (0.0.0.0)."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def via_proxy(proxy: httpx2.Proxy | None, host: str) -> str:
    """A clause for error messages that names the proxy; empty without one."""
    if proxy is None:
        return ""
    return (
        f" via the proxy {_without_password(str(proxy.url))} from the environment "
        f"(NO_PROXY={host} avoids it)"
    )


def _without_password(proxy: str) -> str:
    return re.sub(r"//[^/]*@", "//", proxy)
