"""Whose request it is, where proxies stand in front that say so in `X-Forwarded-For` or `Forwarded` (RFC 7239).

Anybody can write these fields, and each proxy adds its own peer at the end. So the list is read from its end:
the connection's peer is believed if it is one of ours, then whom it names, as long as that is one of ours too.
The first address that is not is the client. What stands before it may be its own invention: nobody looks at it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final, TypeAlias

from proxy.proxy_protocol import shown

Network: TypeAlias = IPv4Network | IPv6Network

MAX_HOPS: Final = 16
"""Proxies of ours in a row; what stands before so many is not looked at."""

_WITH_PORT: Final = re.compile(rb"(?:\[([0-9A-Fa-f:.]++)\]|([0-9.]++))(?::[0-9]{1,5}+)?+")
_PAIR: Final = rb"""[!#$%&'*+.^_`|~0-9A-Za-z-]++=(?:[!#$%&'*+.^_`|~0-9A-Za-z-]++|"[^"\\,;]*+")"""
_ELEMENT: Final = re.compile(rb"[ \t]*+" + _PAIR + rb"(?:[ \t]*+;[ \t]*+" + _PAIR + rb")*+[ \t]*+")
_FOR: Final = re.compile(
    rb"""(?i:(?:^|;)[ \t]*+for)=(?:"\[([0-9A-Fa-f:.]++)\](?::[0-9]{1,5}+)?+"|"""
    rb""""([0-9.]++)(?::[0-9]{1,5}+)?+"|([0-9.]++))[ \t]*+(?=;|\Z)"""
)


def is_in(address: str, networks: Sequence[Network]) -> bool:
    """Whether an address, as text, lies in one of the networks; what is no address lies in none."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    parsed = mapped or parsed
    return any(parsed in network for network in networks)


class TrustedProxies:
    """The proxies in front that are believed."""

    def __init__(self, networks: Sequence[Network], field: str) -> None:
        """`field`: `x-forwarded-for` or `forwarded`, the one that they set. The other is never read."""
        self.networks = tuple(networks)
        self._read = _xff if field == "x-forwarded-for" else _forwarded

    def client(self, peer: str, value: bytes) -> str:
        """The client's address. `peer`: who has connected; `value`: the field's, several joined by commas."""
        client = peer
        for hops, piece in enumerate(reversed(value.rsplit(b",", MAX_HOPS))):
            if hops == MAX_HOPS or not is_in(client, self.networks):
                break
            named = self._read(piece)
            if not named:
                break  # unknown, hidden, or no address: the last one we know of it is who
            client = named
        return client


def _xff(piece: bytes) -> str:
    text = piece.strip(b" \t")
    match = _WITH_PORT.fullmatch(text)
    return _address(text if match is None else match[1] or match[2])


def _forwarded(piece: bytes) -> str:
    if _ELEMENT.fullmatch(piece) is None:
        return ""
    found = list(_FOR.finditer(piece.strip(b" \t")))
    if len(found) != 1:
        return ""
    return _address(found[0][1] or found[0][2] or found[0][3])


def _address(text: bytes) -> str:
    """As logs have it; empty: this is none."""
    try:
        return shown(ip_address(text.decode("ascii")))
    except ValueError:
        return ""
