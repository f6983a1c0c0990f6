"""HTTPS for clients: the right certificate for each name, renewed without a restart, never lost to a bad file."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trustme

from proxy.ask import AdminPort, AskError, ask
from tests.e2e import backends as b
from tests.e2e.proxy_fixtures import Client, Proxy, StartBackend, StartProxy, chat, eventually

pytestmark = pytest.mark.e2e


class Files:
    """An authority, and certificates of it in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()

    def write(
        self,
        name: str,
        *hosts: str,
        authority: trustme.CA | None = None,
        not_after: datetime | None = None,
    ) -> dict[str, str]:
        """Issue a certificate into the files of this name. -> its section of `tls`."""
        made = (authority or self.authority).issue_cert(*hosts, not_after=not_after)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        for file, text in (
            (key, made.private_key_pem.bytes()),
            (certificate, b"".join(pem.bytes() for pem in made.cert_chain_pems)),
        ):
            fresh = file.with_suffix(".new")
            fresh.write_bytes(text)
            os.replace(fresh, file)
        return {"certificate": str(certificate), "key": str(key)}

    def context(self, *protocols: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.authority.configure_trust(context)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def connect(proxy: Proxy, context: ssl.SSLContext, name: str) -> Client:
    host, _, port = proxy.service.ports.listen.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=name)
    client = Client(reader, writer)
    proxy._clients.append(client)
    return client


def serial(client: Client) -> str:
    """Of the certificate that the proxy has shown."""
    shown: dict[str, Any] = client.writer.get_extra_info("peercert")
    return str(shown["serialNumber"])


async def test_each_name_gets_its_certificate_and_is_served_over_http_1_1(
    files: Files, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(b.answers(4))
    tls = [files.write("a", "a.example"), files.write("b", "*.b.example")]
    proxy = await start_proxy(backend, tls=tls)
    for name in ("a.example", "x.b.example"):
        client = await connect(proxy, files.context("h2", "http/1.1"), name)
        assert client.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        for _ in range(2):  # kept alive
            await client.send(chat(stream=True))
            answer = await client.answer()
            assert (answer.status, answer.done) == (200, True)
    with pytest.raises(ssl.SSLCertVerificationError):
        await connect(proxy, files.context(), "c.example")
    await proxy.idle()


async def test_plain_http_is_refused(
    files: Files, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend(), tls=[files.write("a", "a.example")])
    plain = await proxy.connect()
    await plain.send(chat())
    assert b"HTTP/" not in await plain.closed()
    client = await connect(proxy, files.context(), "a.example")
    await client.send(chat())
    assert (await client.answer()).status == 200


async def test_a_client_that_begins_no_handshake_is_cut_off(
    files: Files, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    tls = [files.write("a", "a.example")]
    proxy = await start_proxy(await start_backend(), tls=tls, timeouts={"head": "100ms"})
    silent = await proxy.connect()
    assert await silent.closed() == b""


async def test_a_client_that_leaves_stops_its_generation(
    files: Files, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(b.stalls)
    proxy = await start_proxy(backend, tls=[files.write("a", "a.example")])
    client = await connect(proxy, files.context(), "a.example")
    await client.send(chat(stream=True))
    await eventually(lambda: backend.running)
    client.close()
    await eventually(lambda: backend.aborted == 1)
    await proxy.idle()


async def test_a_refused_request_is_answered_and_the_connection_ends(
    files: Files, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend(), tls=[files.write("a", "a.example")])
    client = await connect(proxy, files.context(), "a.example")
    await client.send(b"GET / HTTP/1.1\r\nhost : x\r\n\r\n")
    assert (await client.closed()).startswith(b"HTTP/1.1 400 ")


async def test_a_renewed_certificate_is_shown_and_a_bad_one_is_not(
    files: Files,
    start_backend: StartBackend,
    start_proxy: StartProxy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "tidegate")
    tls = [files.write("a", "a.example")]
    proxy = await start_proxy(await start_backend(), tls=tls, file=tmp_path / "tidegate.yaml")
    standing = await connect(proxy, files.context(), "a.example")
    first = serial(standing)

    files.write("a", "a.example")
    await eventually(lambda: proxy.runtime.observer.reloads_ok == 1)
    second = serial(await connect(proxy, files.context(), "a.example"))
    assert second != first
    assert "certificates renewed" in caplog.text

    (tmp_path / "a.pem").write_text("garbage")
    await eventually(lambda: proxy.runtime.observer.reloads_failed == 1)
    assert serial(await connect(proxy, files.context(), "a.example")) == second
    assert "a.pem: cannot be used for TLS" in caplog.text
    metrics = (await proxy.get("/metrics"))[1].decode()
    assert "tidegate_config_last_reload_successful 0.0" in metrics
    assert f'tidegate_certificate_expiry_timestamp_seconds{{certificate="{tmp_path}/a.pem"}} 3.2' in metrics
    assert not (await proxy.state())["reload_ok"]

    await standing.send(chat())  # a standing connection is not touched by any of it
    assert (await standing.answer()).status == 200

    files.write("a", "a.example")
    await eventually(lambda: proxy.runtime.observer.reload_ok)
    assert serial(await connect(proxy, files.context(), "a.example")) not in (first, second)


async def test_plain_http_becomes_no_https_by_a_reload(
    files: Files, start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    file = tmp_path / "tidegate.yaml"
    proxy = await start_proxy(await start_backend(), file=file)
    document = json.loads(file.read_text()) | {"tls": [files.write("a", "a.example")]}
    file.write_text(json.dumps(document))
    assert proxy.service.reload()
    assert (await proxy.chat()).status == 200


async def test_who_finds_the_admin_port_by_itself_trusts_its_certificate_and_no_other(
    files: Files, start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    """It has expired, and it is for another name: just then somebody has to look."""
    shown = files.write("a", "a.example", not_after=datetime(2020, 1, 1))
    file = tmp_path / "tidegate.yaml"
    proxy = await start_proxy(await start_backend(), tls=[shown], admin_tls=True, file=file)
    address = proxy.service.ports.admin_url
    nothing = tmp_path / "nothing"
    by_state, by_file = (
        AdminPort(address, proxy.state_folder),
        AdminPort(address, nothing, (Path(shown["certificate"]),)),
    )
    for port in (by_state, by_file):
        assert (await asyncio.to_thread(ask, port, "/state"))["certificates"][0]["names"] == ["a.example"]
    # Of another one nothing is believed, and nothing is asked.
    other = AdminPort(address, nothing, (Path(files.write("b", "a.example")["certificate"]),))
    with pytest.raises(AskError, match="shows another certificate than this proxy"):
        await asyncio.to_thread(ask, other, "/state")
    # A renewed one is known at once; with the file alone, too.
    files.write("a", "a.example")
    assert proxy.service.reload()
    for port in (by_state, by_file):
        assert await asyncio.to_thread(ask, port, "/state")
    # Without a certificate that is known, the authorities of the system decide.
    with pytest.raises(AskError, match="nobody we trust has signed it"):
        await asyncio.to_thread(ask, AdminPort(address, nothing), "/state")


async def test_the_admin_port_speaks_https_if_it_is_told_so(
    files: Files, start_backend: StartBackend, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = [files.write("a", "127.0.0.1")]
    proxy = await start_proxy(await start_backend(), tls=tls, admin_tls=True)
    address = json.loads((proxy.state_folder / "ports.json").read_text())["admin"]
    with pytest.raises(AskError, match="nobody we trust has signed it"):
        await asyncio.to_thread(ask, address, "/state")
    authority = files.folder / "ca.pem"
    files.authority.cert_pem.write_to_path(str(authority))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    (shown,) = (await asyncio.to_thread(ask, address, "/state"))["certificates"]
    assert shown["names"] == ["127.0.0.1"]
    assert shown["days_left"] > 300_000
