"""Calls to addresses that tenants name: none that is private, unless `POLYCLIP_PRIVATE_URLS` allows it."""

from __future__ import annotations

import asyncio
import re
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import httpx

from service.errors import PolyclipError
from service.settings import Settings

NAT64 = IPv6Network("64:ff9b::/96")  # an IPv4 address in its last 32 bits


MAX_URL = 8000  # characters


class InvalidUrl(PolyclipError, ValueError):
    """A URL is not one that is called."""

    code, status, hint = "invalid_url", 422, "send an http or https URL without user and password"


class PrivateAddress(PolyclipError):
    """A URL, or a redirect, leads to an address that is not public."""

    code, status, hint = "private_address", 422, "take a public address; the operator may set `POLYCLIP_PRIVATE_URLS`"


def checked_url(url: str, private: bool = False) -> httpx.URL:
    """The URL, if it may be asked for as far as it tells by itself; a host's addresses are checked when it is connected to.

    Raises InvalidUrl, PrivateAddress.
    """
    if len(url) > MAX_URL:
        raise InvalidUrl(f"a URL has at most {MAX_URL} characters")
    try:
        parsed = httpx.URL(url)
        host, port = parsed.raw_host.decode().strip("[]"), parsed.port
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidUrl(f"this is no URL: {error}"[:200]) from error
    if parsed.scheme == "s3":
        raise InvalidUrl("s3 URLs are not fetched, the service has no key of yours: send a presigned https URL")
    if parsed.scheme not in ("http", "https") or not host:
        raise InvalidUrl("only http and https URLs with a host are called")
    if parsed.userinfo:
        raise InvalidUrl("a URL with user or password is not called: send a presigned one")
    if port is not None and not 0 < port < 65536:
        raise InvalidUrl(f"there is no port {port}")
    if (literal := literal_of(host)) is None:
        if not re.fullmatch("[a-zA-Z0-9._-]{1,253}", host):
            raise InvalidUrl(f"{host[:100]!r} is no host's name")
    elif not private and not is_public(literal):
        raise PrivateAddress(f"{host} is not a public address")
    return parsed


def literal_of(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a host's name is; None for a name that has to be looked up."""
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        return None


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address, and any IPv4 address that is embedded in it, is one of the public internet."""
    if isinstance(address, IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in NAT64:
            inner.append(IPv4Address(int(address) & 0xFFFFFFFF))
        if address.is_site_local or not all(is_public(each) for each in inner if each is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    special = address.is_private or address.is_loopback or address.is_link_local or address.is_reserved
    if isinstance(address, IPv6Address) and address in NAT64:
        special = False  # reserved, and what it leads to has been looked at
    return address.is_global and not (special or address.is_multicast or address.is_unspecified)


class PublicTransport(httpx.AsyncBaseTransport):
    """Looks a name up, refuses it if any of its addresses is not public, and connects to the address that was looked at: a
    name that changes between has no effect. Proxies of the environment are not used. For a client without redirects.
    """

    def __init__(self, private: bool) -> None:
        """`private`: any address will do."""
        self._private = private
        self._inner = httpx.AsyncHTTPTransport(trust_env=False, retries=0)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises InvalidUrl, PrivateAddress, httpx.TransportError."""
        checked_url(str(request.url), self._private)
        host = request.url.raw_host.decode().strip("[]")
        port = request.url.port or (443 if request.url.scheme == "https" else 80)
        failed: httpx.TransportError | None = None
        for address in await self._addresses(host, port):
            extensions = {**request.extensions, "sni_hostname": host}  # whose certificate it must be
            where = request.url.copy_with(host=address)
            try:
                return await self._inner.handle_async_request(
                    httpx.Request(request.method, where, headers=request.headers, stream=request.stream, extensions=extensions)
                )
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failed = error
        raise failed or httpx.ConnectError(f"{host} has no address")

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _addresses(self, host: str, port: int) -> list[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"{host} is not known: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not (self._private or is_public(ip_address(address.partition("%")[0]))):
                raise PrivateAddress(f"{host} leads to {address}, which is not a public address")
        return addresses


def public_transport(settings: Settings) -> httpx.AsyncBaseTransport:
    return PublicTransport(settings.private_urls)
