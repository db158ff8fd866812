"""URLs that tenants name: which may be called, and which addresses are of the public internet; `jobs/outward.py` calls them."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import httpx

from service.errors import PolyclipError

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
