"""URLs that come over an API: what is not public is not reached, however it is written, whatever it resolves to."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.units import BadValueError
from proxy.ssrf import check_addresses, check_url, checked_addresses, may_be_reached


def names(**addresses: list[str]) -> object:
    async def lookup(host: str) -> Sequence[str]:
        if host not in addresses:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return addresses[host]

    return lookup


async def nip_io(host: str) -> Sequence[str]:
    """Names that say the address that they stand for; any other is public."""
    return [host.removesuffix(".nip.io")] if host.endswith(".nip.io") else ["93.184.215.14"]


@pytest.mark.shared
async def test_every_url_of_the_collection_is_judged_as_it_should_be(shared: Path) -> None:
    wrong = []
    count = 0
    for line in (shared / "conformance" / "ssrf_urls.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        count += 1
        try:
            await checked_addresses(check_url(case["url"]), nip_io)
            verdict = "allow"
        except BadValueError:
            verdict = "block"
        if verdict != case["expect"]:
            wrong.append((case["url"], verdict))
    assert wrong == []
    assert count > 200


@given(st.ip_addresses(v=4))
def test_law_an_address_inside_of_another_is_judged_as_itself(address: IPv4Address) -> None:
    packed = address.packed
    inside = (
        IPv6Address(bytes(10) + b"\xff\xff" + packed),
        IPv6Address(bytes.fromhex("0064ff9b") + bytes(8) + packed),
        IPv6Address(bytes.fromhex("0064ff9b0001") + packed[:2] + b"\0" + packed[2:] + bytes(5)),
    )
    for carrier in inside:
        assert may_be_reached(str(carrier)) == may_be_reached(str(address))


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_law_what_python_calls_not_global_is_not_reached(address: IPv4Address | IPv6Address) -> None:
    embedded = address in ip_network("64:ff9b:1::/48") if address.version == 6 else False
    if not address.is_global and not embedded and getattr(address, "ipv4_mapped", None) is None:
        assert not may_be_reached(str(address))


@given(st.lists(st.ip_addresses().map(str), min_size=1, max_size=5))
def test_law_one_address_that_may_not_be_reached_spoils_all(addresses: list[str]) -> None:
    if all(may_be_reached(address) for address in addresses):
        check_addresses(addresses)
    else:
        with pytest.raises(BadValueError):
            check_addresses(addresses)


@given(st.text(max_size=60))
def test_law_any_text_is_a_checked_url_or_refused(text: str) -> None:
    for url in (text, "http://" + text, "https://example.com" + text):
        try:
            checked = check_url(url)
        except BadValueError:
            continue
        assert url.isascii()
        assert url.lower().startswith(f"{checked.scheme}://")
        assert "@" not in url
        assert checked.host in url.lower()


def test_networks_of_the_operator_may_be_reached_but_no_metadata_service() -> None:
    private = [ip_network("10.0.0.0/8"), ip_network("169.254.0.0/16"), ip_network("100.64.0.0/10")]
    assert check_url("http://10.1.2.3:8000/llm", private).port == 8000
    assert check_url("http://[::ffff:10.1.2.3]:8000", private).address == "::ffff:10.1.2.3"
    for metadata in ("169.254.169.254", "100.100.100.200", "[fd00:ec2::254]"):
        with pytest.raises(BadValueError):
            check_url(f"http://{metadata}/", [*private, ip_network("fc00::/7")])
    with pytest.raises(BadValueError):
        check_url("http://192.168.1.1/", private)


def test_a_local_nat64_address_that_can_be_read_in_two_ways_is_not_reached() -> None:
    assert may_be_reached("64:ff9b:1:808:8:800::")
    for two_ways in ("64:ff9b:1:808:8:8a9:fea9:fe00", "64:ff9b:1:808:108:800::", "64:ff9b:1:808:8:800::1"):
        assert not may_be_reached(two_ways)


async def test_the_addresses_to_connect_to_are_those_that_were_checked() -> None:
    url = check_url("https://engine.example:8443")
    assert (url.scheme, url.host, url.port, url.address) == ("https", "engine.example", 8443, "")
    lookup = names(**{"engine.example": ["93.184.215.14", "2606:2800:220:1::1"]})
    assert await checked_addresses(url, lookup) == ("93.184.215.14", "2606:2800:220:1::1")  # type: ignore[arg-type]
    lookup = names(**{"engine.example": ["93.184.215.14", "10.0.0.1"]})
    with pytest.raises(BadValueError):
        await checked_addresses(url, lookup)  # type: ignore[arg-type]
    with pytest.raises(BadValueError):
        await checked_addresses(url, names(**{"engine.example": []}))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="unknown"):
        await checked_addresses(url, names())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com:22/",
        "http://example.com:080/",
        "http://example.com:65616/",
        "http://user@example.com/",
        "http://example.com/?a",
        "http://example.com./",
        "http://example.com/%2e%2e",
        "http://a.localhost/",
        "http://metadata.google.internal/",
        "http://1.2.3/",
        "http://example.0x7f/",
        "HTTP://example.com/",
        "http://[1.2.3.4]/",
        "http://[2607:f8b0::1%25eth0]/",
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(BadValueError):
        check_url(url)
