"""PROXY headers: what they say, that they are read to their end and not further, and what is refused."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.proxy_protocol import MAX_BYTES, SIGNATURE, missing, source

PORTS = st.integers(0, 65535)
FIELDS = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=5)


def version_2(
    command: int = 0x21,
    family: int = 0x11,
    addresses: bytes = b"",
    fields: list[tuple[int, bytes]] | None = None,
) -> bytes:
    rest = addresses + b"".join(
        bytes((kind,)) + len(value).to_bytes(2, "big") + value for kind, value in fields or ()
    )
    return SIGNATURE + bytes((command, family)) + len(rest).to_bytes(2, "big") + rest


def of_ipv4(client: IPv4Address, fields: list[tuple[int, bytes]] | None = None) -> bytes:
    return version_2(0x21, 0x11, client.packed + bytes(4) + bytes(4), fields)


def of_ipv6(client: IPv6Address, fields: list[tuple[int, bytes]] | None = None) -> bytes:
    return version_2(0x21, 0x21, client.packed + bytes(16) + bytes(4), fields)


HEADERS = st.one_of(
    st.builds(of_ipv4, st.ip_addresses(v=4), FIELDS),
    st.builds(of_ipv6, st.ip_addresses(v=6), FIELDS),
    st.builds(lambda a, p: f"PROXY TCP4 {a} 10.0.0.1 {p} 443\r\n".encode(), st.ip_addresses(v=4), PORTS),
    st.builds(lambda a, p: f"PROXY TCP6 {a} ::1 {p} 443\r\n".encode(), st.ip_addresses(v=6), PORTS),
    st.just(b"PROXY UNKNOWN\r\n"),
    st.just(version_2(0x20, 0)),
)


def read(stream: bytes) -> tuple[str, bytes]:
    """As the listener does. -> (source, what is left unread)."""
    data = b""
    while size := missing(data):
        more = stream[len(data) : len(data) + size]
        if not more:
            raise EOFError
        data += more
    return source(data), stream[len(data) :]


@given(HEADERS, st.binary(max_size=50))
def test_law_a_header_is_read_to_its_end_and_not_further(header: bytes, behind: bytes) -> None:
    assert read(header + behind)[1] == behind


@given(HEADERS, st.data())
def test_law_no_beginning_of_a_header_is_a_header(header: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(header) - 1))
    with pytest.raises(EOFError):
        read(header[:cut])


@given(st.binary(max_size=300))
def test_law_any_bytes_are_a_header_or_refused(data: bytes) -> None:
    for stream in (data, SIGNATURE + data, b"PROXY " + data, b"PROXY TCP4 " + data):
        try:
            found, _ = read(stream)
        except (ValueError, EOFError):
            continue
        assert not found or ":" in found or IPv4Address(found)


@given(st.ip_addresses(v=4), FIELDS)
def test_both_versions_tell_the_same_address(client: IPv4Address, fields: list[tuple[int, bytes]]) -> None:
    assert source(of_ipv4(client, fields)) == str(client)
    assert source(f"PROXY TCP4 {client} 10.0.0.1 1 443\r\n".encode()) == str(client)


@given(st.ip_addresses(v=6))
def test_ipv6_is_shown_as_everywhere(client: IPv6Address) -> None:
    shown = str(client.ipv4_mapped or client)
    assert source(of_ipv6(client)) == shown
    assert source(f"PROXY TCP6 {client.exploded} ::1 1 443\r\n".encode()) == shown


@pytest.mark.parametrize(
    "header", [version_2(0x20, 0x11, bytes(12)), version_2(0x21, 0x00, b"x"), b"PROXY UNKNOWN 1 2\r\n"]
)
def test_a_balancers_own_connection_has_its_own_address(header: bytes) -> None:
    assert read(header) == ("", b"")


@pytest.mark.parametrize(
    "stream",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PROXY  TCP4 1.2.3.4 1.2.3.5 1 2\r\n",
        b"proxy TCP4 1.2.3.4 1.2.3.5 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.5 1 2\n12345",
        b"PROXY TCP4 1.2.3.4 1.2.3.5 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.5 1 2 3\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.5 01 2\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.5 1 65536\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.5 +1 2\r\n",
        b"PROXY TCP4 1.2.3.04 1.2.3.5 1 2\r\n",
        b"PROXY TCP4 ::1 ::1 1 2\r\n",
        b"PROXY TCP6 1.2.3.4 ::1 1 2\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
        b"PROXY UDP4 1.2.3.4 1.2.3.5 1 2\r\n",
        b"PROXY UNKNOWN \x00\r\n",
        b"PROXY UNKNOWN " + b"x" * 200,
        version_2(0x21, 0x12, bytes(12)),
        version_2(0x21, 0x31, bytes(216)),
        version_2(0x21, 0x11, bytes(11)),
        version_2(0x21, 0x21, bytes(12)),
        version_2(0x21, 0x11, bytes(12) + b"\x01\x00\x05abc"),
        version_2(0x21, 0x11, bytes(12) + b"\x01"),
        version_2(0x22, 0x11, bytes(12)),
        version_2(0x11, 0x11, bytes(12)),
        version_2(0x21, 0x11, bytes(MAX_BYTES)),
    ],
    ids=repr,
)
def test_what_is_malformed_or_no_tcp_is_refused(stream: bytes) -> None:
    with pytest.raises(ValueError):
        read(stream)
