"""The PROXY header, in which a load balancer says for whom it opens a connection: versions 1 and 2.

It stands in front of everything else, TLS included, and is no part of it. So it is read to its last byte and not
one further: `missing` says how many bytes may be read without passing its end. Both functions are pure. The format
is HAProxy's (https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt). What it leaves to the receiver is
refused: datagrams, addresses of unix sockets, blanks and zeros that need not be there, headers beyond `MAX_BYTES`.
"""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
"""How version 2 begins."""
MAX_BYTES: Final = 2048
"""Of a version 2 header: addresses take 36, and balancers add a few fields about themselves."""
_MAX_LINE: Final = 107
"""Of version 1, by its specification."""
_FIXED: Final = 16
_BEGIN: Final = b"PROXY "
_ADDRESS_BYTES: Final = {0x11: 4, 0x21: 16}
"""By family and protocol: TCP over IPv4 and over IPv6."""
_LOCAL, _PROXY = 0x20, 0x21


def missing(data: bytes) -> int:
    """How many bytes more belong to the header at least; 0: it is whole. ValueError: this is none."""
    if data[:6] == _BEGIN[: len(data)]:
        return _missing_of_line(data)
    if data[:12] != SIGNATURE[: len(data)]:
        raise ValueError("no PROXY header")
    if len(data) < 12:
        return 12 - len(data)
    if len(data) < _FIXED:
        return _FIXED - len(data)
    size = _FIXED + int.from_bytes(data[14:16], "big")
    if size > MAX_BYTES:
        raise ValueError("PROXY header too long")
    return max(size - len(data), 0)


def _missing_of_line(data: bytes) -> int:
    if len(data) < 12:
        return 12 - len(data)  # the shortest line is `PROXY UNKNOWN`
    if data.endswith(b"\r\n") and len(data) <= _MAX_LINE:
        return 0
    if b"\n" in data or len(data) >= _MAX_LINE:
        raise ValueError("malformed PROXY line")
    return 1 if data.endswith(b"\r") else 2


def source(header: bytes) -> str:
    """The client's address that a whole header tells; empty: the connection is the balancer's own.

    ValueError: it is malformed, or tells of something else than a TCP connection.
    """
    if header.startswith(SIGNATURE):
        return _source_2(header)
    return _source_1(header)


def _source_1(header: bytes) -> str:
    line = header.removesuffix(b"\r\n").decode("ascii")
    words = line.split(" ")
    if words[:2] == ["PROXY", "UNKNOWN"] and line.isprintable():
        return ""
    if len(words) != 6 or words[1] not in ("TCP4", "TCP6"):
        raise ValueError("malformed PROXY line")
    _, family, client, server, *ports = words
    for port in ports:
        if not port.isdigit() or str(int(port[:6])) != port or int(port) > 65535:
            raise ValueError("malformed port in a PROXY line")
    try:
        if family == "TCP4":
            IPv4Address(server)
            return str(IPv4Address(client))
        if "%" in client + server:
            raise ValueError("an address with a zone in a PROXY line")
        IPv6Address(server)
        return shown(IPv6Address(client))
    except AddressValueError:
        raise ValueError("malformed address in a PROXY line") from None


def _source_2(header: bytes) -> str:
    command, family, rest = header[12], header[13], header[_FIXED:]
    if command == _LOCAL:
        return ""
    if command != _PROXY:
        raise ValueError("unknown version or command in a PROXY header")
    if family == 0:  # unspecified: the receiver uses what it sees
        return ""
    size = _ADDRESS_BYTES.get(family)
    if size is None:
        raise ValueError("a PROXY header for something else than TCP")
    if len(rest) < 2 * size + 4:
        raise ValueError("PROXY header too short for its addresses")
    _check_fields(rest, 2 * size + 4)
    if size == 4:
        return str(IPv4Address(rest[:4]))
    return shown(IPv6Address(rest[:16]))


def _check_fields(data: bytes, position: int) -> None:
    """The balancer's further fields, type, length and value each, fill the header to its end."""
    while position < len(data):
        position += 3 + int.from_bytes(data[position + 1 : position + 3], "big")
    if position != len(data):
        raise ValueError("malformed fields in a PROXY header")


def shown(address: IPv4Address | IPv6Address) -> str:
    """An address as logs and limits have it: IPv4 inside of IPv6 is IPv4."""
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
