"""Refuses redirects of the web that lead into a private network: a public page must not make us read what only we can reach.

A user may name `http://localhost/...` or an address of the own network: only who was named there may lead on to others there.
"""

import asyncio
import functools
import ipaddress
import socket
from typing import Any


class RefusedRedirectError(ValueError):
    """A public server redirects to a private address."""


def is_private(address: str) -> bool:
    """Whether an IP address is of this machine, a private or a reserved network, as IANA's registries list them."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return not (mapped or parsed).is_global


@functools.cache
def trace() -> Any:
    """The `aiohttp.TraceConfig` that follows a client's redirects; the same one for all clients of a process."""
    import aiohttp

    config = aiohttp.TraceConfig()
    config.on_request_redirect.append(_check)
    return config


async def _check(_session: Any, _context: Any, redirect: Any) -> None:
    headers = redirect.response.headers
    target = headers.get("Location") or headers.get("URI")
    if not target:
        return
    source = redirect.url
    host = type(source)(target).host or source.host
    if host == source.host or await _leads_inside(source.host) or not await _leads_inside(host):
        return
    raise RefusedRedirectError(f"it redirects to {host}, an address of a private network")


async def _leads_inside(host: str) -> bool:
    """Whether any address of a host is private; a host without one, as behind a proxy, leads nowhere by itself."""
    try:
        return is_private(host)
    except ValueError:
        pass
    try:
        addresses = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(is_private(str(address[0])) for *_, address in addresses)
