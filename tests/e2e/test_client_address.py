"""Clients behind balancers and proxies: their address is right in the log and in the limits, and nobody can lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxy.proxied_server import ProxiedServer
from tests.e2e.proxy_fixtures import MakeKey, Proxy, StartBackend, StartProxy, chat
from tests.e2e.test_client_tls import Files, connect

pytestmark = pytest.mark.e2e

HERE = "127.0.0.1/32"
ELSEWHERE = "192.0.2.0/24"


def peers(proxy: Proxy, log: Path) -> list[str]:
    """The addresses in the log of refused requests, once all of it is written."""
    proxy.runtime.observer.log.close()
    lines = map(json.loads, log.read_text().splitlines())
    return [line["peer"] for line in lines if "peer" in line]


async def test_a_proxy_header_says_who_it_is(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    backend = await start_backend()
    proxy = await start_proxy(backend, proxy_protocol=[HERE], log=str(log))
    v2 = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes((203, 0, 113, 7, 1, 1, 1, 1, 0, 1, 0, 2))
    for header in (b"PROXY TCP4 198.51.100.9 10.0.0.1 1 2\r\n", v2, b"PROXY UNKNOWN\r\n"):
        client = await proxy.connect()
        for byte in header:  # however it comes
            await client.send(bytes((byte,)))
        await client.send(chat() + b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer()).status == 200
        assert (await client.answer("GET")).status == 404
    assert peers(proxy, log) == ["198.51.100.9", "203.0.113.7", "127.0.0.1"]
    await proxy.idle()


async def test_a_balancer_without_a_good_header_is_cut_off(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend, proxy_protocol=[HERE], timeouts={"head": "200ms"})
    for beginning in (chat(), b"PROXY TCP4 1.2.3.4 1 2\r\n" + chat(), b"PROXY TCP4 1.2.3", b""):
        client = await proxy.connect()
        await client.send(beginning)
        assert await client.closed() == b""
    (place,) = proxy.service._listening._places["listen"]
    assert isinstance(place.server, ProxiedServer)
    assert place.server.refused == 2
    assert backend.received == []


async def test_from_elsewhere_a_header_is_no_http(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend, proxy_protocol=[ELSEWHERE])
    client = await proxy.connect()
    await client.send(b"PROXY TCP4 198.51.100.9 10.0.0.1 1 2\r\n" + chat())
    assert (await client.closed()).startswith(b"HTTP/1.1 400 ")
    assert (await proxy.chat()).status == 200


async def test_the_header_stands_in_front_of_tls(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    files = Files(tmp_path)
    tls = [files.write("a", "a.example")]
    proxy = await start_proxy(await start_backend(), proxy_protocol=[ELSEWHERE], tls=tls)
    client = await connect(proxy, files.context(), "a.example")
    await client.send(chat())
    assert (await client.answer()).status == 200
    plain = await proxy.connect()
    await plain.send(chat())
    assert b"HTTP/" not in await plain.closed()

    proxy = await start_proxy(
        await start_backend(), proxy_protocol=[HERE], tls=tls, state=tmp_path / "another"
    )
    behind = await proxy.connect()
    await behind.send(b"PROXY TCP4 198.51.100.9 10.0.0.1 1 2\r\n")
    await behind.writer.start_tls(files.context(), server_hostname="a.example")
    await behind.send(chat())
    assert (await behind.answer()).status == 200
    assert {client.peer for client in proxy.runtime.clients} == {"198.51.100.9"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("x-forwarded-for", "{}"), ("forwarded", "proto=https;for={}")],
)
async def test_wrong_keys_are_counted_by_client_behind_a_trusted_proxy(
    field: str,
    value: str,
    start_backend: StartBackend,
    start_proxy: StartProxy,
    make_key: MakeKey,
    tmp_path: Path,
) -> None:
    good, log = make_key(), tmp_path / "log"
    proxy = await start_proxy(
        await start_backend(), trusted_proxies=[HERE], forwarded_field=field, log=str(log)
    )

    async def wrong(address: str) -> int:
        line = f"{field}: {value.format(address)}"
        return (await proxy.chat("authorization: Bearer tg_wrong", line)).status

    assert [await wrong("198.51.100.9") for _ in range(21)] == [401] * 20 + [429]
    assert await wrong("198.51.100.10") == 401
    assert (await proxy.chat(good, f"{field}: {value.format('198.51.100.9')}")).status == 200
    assert peers(proxy, log) == ["198.51.100.9"] * 20 + ["198.51.100.10"]


async def test_one_connection_carries_requests_of_many_clients(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    proxy = await start_proxy(await start_backend(), trusted_proxies=[HERE], log=str(log))
    client = await proxy.connect()
    for line in (
        "x-forwarded-for: 192.0.2.1\r\n",
        "",
        "x-forwarded-for: 6.6.6.6\r\nX-Forwarded-For: 192.0.2.2\r\n",
    ):
        await client.send(f"GET /nothing HTTP/1.1\r\nhost: x\r\n{line}\r\n".encode())
        assert (await client.answer("GET")).status == 404
    await client.send(b"malformed\r\n\r\n")
    assert (await client.closed()).startswith(b"HTTP/1.1 400 ")
    assert peers(proxy, log) == ["192.0.2.1", "127.0.0.1", "192.0.2.2", "127.0.0.1"]


async def test_from_elsewhere_the_fields_are_ignored(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    proxy = await start_proxy(await start_backend(), trusted_proxies=[ELSEWHERE], log=str(log))
    await proxy.ask(b"GET /nothing HTTP/1.1\r\nhost: x\r\nx-forwarded-for: 192.0.2.1\r\n\r\n")
    assert peers(proxy, log) == ["127.0.0.1"]
