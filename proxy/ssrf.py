"""Whether a URL that came over an API may be connected to (SSRF, CWE-918).

The operator's own files may name private addresses; whoever may only use an API must not reach through us what we
alone can reach. So of such URLs

* the text is matched whole: scheme, host, port and path, in the one spelling that every parser reads alike;
* the port is one of `PORTS`;
* every address that the host stands for must be public, or in a network that the operator allows. Addresses that
  carry an IPv4 address inside (mapped, NAT64) are judged by that one. Metadata services are refused always.

What was checked is what must be connected to: not the name again, which may answer otherwise the next time. A
`probes.resolver.Resolver` with `allowed` holds to it at each further look.

Networks: IANA's registries of special-purpose addresses
(https://www.iana.org/assignments/iana-ipv4-special-registry, .../iana-ipv6-special-registry), RFC 6052, RFC 8215.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

from policies.units import BadValueError
from probes.resolver import Lookup
from proxy.client_address import Network
from proxy.config_values import METADATA_NAMES, is_metadata

PORTS: Final = frozenset((80, 443, *range(8000, 9000), 11434, *range(30000, 32768)))
"""Where engines are found: HTTP, its usual further ports, Ollama's, and those of Kubernetes' nodes."""

_URL: Final = re.compile(
    r"(https?)://(\[[0-9A-Fa-f:.]++\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*+)(?<![.-]))"
    r"(?::([1-9][0-9]{0,4}+))?+((?:/[A-Za-z0-9._~-]*+)*+)"
)
_NUMERIC: Final = re.compile(r"(?:.*\.)?+(?:[0-9]++|0[xX][0-9A-Fa-f]*+)")
"""Hosts that some parsers take for an IPv4 address: their last label is a number (WHATWG URL, 4.6)."""

_NOT_PUBLIC_4: Final = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
            *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
_PUBLIC_6: Final = ip_network("2000::/3")
_NOT_PUBLIC_6: Final = tuple(map(ip_network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_NAT64: Final = ip_network("64:ff9b::/96")
_LOCAL_NAT64: Final = ip_network("64:ff9b:1::/48")


@dataclass(frozen=True, slots=True)
class CheckedUrl:
    """A URL whose text is in order. Nothing is said of its host's addresses yet."""

    url: str
    scheme: str
    host: str
    port: int
    address: str = ""
    """The host, if it is an address."""


def check_url(url: str, allowed: Sequence[Network] = (), ports: frozenset[int] = PORTS) -> CheckedUrl:
    """The parts of a URL. Raises BadValueError: it may not be connected to, whatever its name stands for.

    `allowed`: networks that are not public and may be reached all the same.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise BadValueError(
            "a URL is http:// or https://, a host, and perhaps a port and a path, in plain ASCII"
        )
    scheme, host, given, _ = match.groups()
    port = int(given) if given else (443 if scheme == "https" else 80)
    if port not in ports:
        raise BadValueError(f"port {port} is not one that engines are reached at")
    host = host.lower()
    if host.startswith("[") or _NUMERIC.fullmatch(host):
        address = host.strip("[]")
        try:
            parsed = ip_address(address)
        except ValueError:
            raise BadValueError("the host is a number, but no address in its usual spelling") from None
        if (host.startswith("[")) != (parsed.version == 6):
            raise BadValueError("IPv6 addresses stand in brackets, IPv4 addresses do not")
        check_addresses([address], allowed)
        return CheckedUrl(url, scheme, address, port, address)
    if host in METADATA_NAMES or host == "localhost" or host.endswith(".localhost"):
        raise BadValueError("the host is this machine, or a metadata service")
    return CheckedUrl(url, scheme, host, port)


def check_addresses(addresses: Sequence[str], allowed: Sequence[Network] = ()) -> None:
    """All addresses of a host, or none: one that may not be reached spoils the others. Raises BadValueError."""
    if not addresses:
        raise BadValueError("the host has no address")
    for address in addresses:
        if not may_be_reached(address, allowed):
            raise BadValueError("the host stands for an address that is not public, and not allowed")


async def checked_addresses(
    url: CheckedUrl, lookup: Lookup, allowed: Sequence[Network] = ()
) -> tuple[str, ...]:
    """The addresses to connect to, all of them checked. Raises BadValueError, or OSError: it is not resolved."""
    if url.address:
        return (url.address,)
    found = tuple(await lookup(url.host))
    check_addresses(found, allowed)
    return found


def may_be_reached(address: str, allowed: Sequence[Network] = ()) -> bool:
    """Whether an address is public, or in a network of `allowed`, and no metadata service."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address):
        if parsed.scope_id is not None:
            return False
        inside = _inside(parsed)
        if inside is not None:
            parsed = inside
    shown = str(parsed)
    # Those in link-local networks too: nothing else than a metadata service is ever meant by them.
    if is_metadata(shown):
        return False
    return any(parsed in network for network in allowed) or _is_public(parsed)


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    return address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)


def _inside(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that is reached by an IPv6 address; None: it is no such address.

    Those of local NAT64 hold it around the byte that RFC 6052 keeps zero; with anything else behind, it might be
    read in another way, and 0.0.0.0 stands for that.
    """
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    packed = address.packed
    if address in _NAT64:
        return IPv4Address(packed[12:])
    if address in _LOCAL_NAT64:
        if packed[8] or any(packed[11:]):
            return IPv4Address(0)
        return IPv4Address(packed[6:8] + packed[9:11])
    return None
