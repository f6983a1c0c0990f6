"""Whom a request comes from, as far as trusted proxies say: nothing that a client writes can change it."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.client_address import MAX_HOPS, TrustedProxies, is_in

OURS = [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")]
XFF = TrustedProxies(OURS, "x-forwarded-for")
FORWARDED = TrustedProxies(OURS, "forwarded")
OUTSIDE = (
    st.ip_addresses().map(str).filter(lambda address: not is_in(address, OURS) and "ffff:" not in address)
)
JUNK = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=255), max_size=60).map(
    lambda text: text.encode("latin-1")
)


@given(OUTSIDE, JUNK)
def test_law_who_is_not_trusted_says_nothing(peer: str, value: bytes) -> None:
    assert XFF.client(peer, value) == peer
    assert FORWARDED.client(peer, value) == peer


@given(JUNK, OUTSIDE)
def test_law_what_a_client_writes_in_front_changes_nothing(junk: bytes, client: str) -> None:
    """Our proxy adds whom it sees at the end."""
    shown = XFF.client("10.0.0.1", client.encode())
    assert XFF.client("10.0.0.1", junk + b", " + client.encode()) == shown
    element = f'for="[{client}]:4711"' if ":" in client else f"for={client}"
    for added in (element, f"proto=https;{element};host=x"):
        assert FORWARDED.client("10.0.0.1", junk + b", " + added.encode()) == shown
    assert shown == client


@given(JUNK)
def test_law_whatever_stands_there_is_an_address_or_the_peer(value: bytes) -> None:
    for proxies in (XFF, FORWARDED):
        found = proxies.client("10.0.0.1", value)
        assert found == "10.0.0.1" or is_in(found, [ip_network("0.0.0.0/0"), ip_network("::/0")])


@pytest.mark.parametrize(
    ("value", "client"),
    [
        (b"1.2.3.4", "1.2.3.4"),
        (b"6.6.6.6, 1.2.3.4, 10.0.0.9", "1.2.3.4"),
        (b"10.0.0.7, 10.0.0.8", "10.0.0.7"),
        (b"1.2.3.4:4711", "1.2.3.4"),
        (b"[2001:DB9::1]:4711", "2001:db9::1"),
        (b"2001:db9::0001", "2001:db9::1"),
        (b"::ffff:1.2.3.4", "1.2.3.4"),
        (b"6.6.6.6, unknown, 10.0.0.9", "10.0.0.9"),
        (b"6.6.6.6,", "10.0.0.1"),
        (b"", "10.0.0.1"),
        (b"1.2.3.4.5", "10.0.0.1"),
        (b"01.2.3.4", "10.0.0.1"),
    ],
)
def test_x_forwarded_for(value: bytes, client: str) -> None:
    assert XFF.client("10.0.0.1", value) == client


@pytest.mark.parametrize(
    ("value", "client"),
    [
        (b"for=1.2.3.4", "1.2.3.4"),
        (b'For="1.2.3.4:80";proto=http, for=10.0.0.9', "1.2.3.4"),
        (b'by=10.0.0.2;for="[2001:db9::1]"', "2001:db9::1"),
        (b"for=_hidden", "10.0.0.1"),
        (b"for=unknown", "10.0.0.1"),
        (b"for=1.2.3.4;for=6.6.6.6", "10.0.0.1"),
        (b"proto=https", "10.0.0.1"),
        (b'for="6.6.6.6, for=1.2.3.4', "1.2.3.4"),
        (b'xfor="for=6.6.6.6";for=1.2.3.4', "1.2.3.4"),
        (b"for=1.2.3.4 junk", "10.0.0.1"),
        (b'for="1.2.3.4', "10.0.0.1"),
    ],
)
def test_forwarded(value: bytes, client: str) -> None:
    assert FORWARDED.client("10.0.0.1", value) == client


def test_so_many_proxies_of_ours_are_enough() -> None:
    chain = b"6.6.6.6, " + b", ".join(b"10.0.1.%d" % n for n in range(MAX_HOPS))
    assert XFF.client("10.0.0.1", chain) == "10.0.1.0"


def test_ipv4_inside_of_ipv6_is_ipv4() -> None:
    assert is_in("::ffff:10.1.2.3", OURS)
    assert XFF.client("::ffff:10.1.2.3", b"1.2.3.4") == "1.2.3.4"
