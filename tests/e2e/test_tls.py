"""Backends behind TLS: their certificates are checked, and what is wrong with one costs the client nothing else."""

from __future__ import annotations

import ssl
from datetime import datetime
from pathlib import Path

import pytest
import trustme

from tests.e2e import backends as b
from tests.e2e.faults.figures import Figure
from tests.e2e.proxy_fixtures import StartBackend, StartProxy, chat, eventually

pytestmark = pytest.mark.e2e


@pytest.fixture
def authority(tmp_path: Path) -> tuple[trustme.CA, str]:
    """An authority and the file that says to trust it."""
    made = trustme.CA()
    file = tmp_path / "ca.pem"
    made.cert_pem.write_to_path(str(file))
    return made, str(file)


def server(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*names).configure_cert(context)
    return context


async def test_a_trusted_backend_is_spoken_to_and_its_connection_kept(
    authority: tuple[trustme.CA, str], start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(b.answers(4), tls=server(authority[0], "127.0.0.1"))
    proxy = await start_proxy({"url": backend.url, "tls": {"ca_file": authority[1]}})
    assert (await proxy.chat(stream=True)).text == "xxxx"
    assert (await proxy.chat()).status == 200
    assert backend.connections == 1
    await proxy.idle()


async def test_a_name_other_than_the_urls_may_be_expected(
    authority: tuple[trustme.CA, str], start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(tls=server(authority[0], "nj.example"))
    tls = {"ca_file": authority[1], "server_name": "nj.example"}
    proxy = await start_proxy({"url": backend.url, "tls": tls})
    assert (await proxy.chat()).status == 200


@pytest.mark.parametrize("wrong", ["another name", "nobody's authority", "no TLS"])
async def test_a_certificate_that_does_not_fit_is_a_failed_attempt(
    wrong: str,
    authority: tuple[trustme.CA, str],
    start_backend: StartBackend,
    start_proxy: StartProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NJ_KEY", "sk-secret")
    context = {
        "another name": server(authority[0], "evil.example"),
        "nobody's authority": server(trustme.CA(), "127.0.0.1"),
        "no TLS": None,
    }[wrong]
    bad, good = await start_backend(tls=context), await start_backend()
    url = bad.url.replace("http:", "https:")
    proxy = await start_proxy(
        {"url": url, "tls": {"ca_file": authority[1]}, "api_key_env": "NJ_KEY"},
        good,
        timeouts={"connect": "1s"},
    )
    answer = await proxy.chat()
    assert (answer.status, answer.backend) == (200, "b")
    assert proxy.backend("a").failed == 1
    assert b"sk-secret" not in bad.raw
    assert bad.received == []
    kind = "connect" if wrong == "no TLS" else "tls"  # it is silent, as one that is down may be
    assert list(proxy.runtime.observer.failed_attempts) == [("a", kind)]
    await proxy.idle()


def self_signed(folder: Path) -> ssl.SSLContext:
    made = trustme.CA()
    made.cert_pem.write_to_path(str(folder / "self.pem"))
    made.private_key_pem.write_to_path(str(folder / "self.key"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "self.pem", folder / "self.key")
    return context


def expired(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", not_after=datetime(2020, 1, 1)).configure_cert(context)
    return context


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("another name", "it is for another address"),
        ("nobody's authority", "nobody we trust has signed it"),
        ("expired", "it has expired"),
        ("self-signed", "it is self-signed"),
    ],
)
async def test_why_a_certificate_was_refused_is_said_everywhere(
    wrong: str,
    reason: str,
    authority: tuple[trustme.CA, str],
    start_backend: StartBackend,
    start_proxy: StartProxy,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    figure: Figure,
) -> None:
    context = {
        "another name": lambda: server(authority[0], "192.0.2.1"),
        "nobody's authority": lambda: server(trustme.CA(), "127.0.0.1"),
        "expired": lambda: expired(authority[0]),
        "self-signed": lambda: self_signed(tmp_path),
    }[wrong]()
    backend = await start_backend(tls=context)
    proxy = await start_proxy({"url": backend.url, "tls": {"ca_file": authority[1]}}, await start_backend())
    for _ in range(2):
        answer = await proxy.chat()
        assert (answer.status, answer.backend) == (200, "b")
    (first, _) = proxy.runtime.observer.find(answer.id).explain()["decisions"]
    assert first["failure"] == f"cannot connect to a: its certificate was refused: {reason}"
    assert caplog.text.count(f"backend a: its certificate was refused: {reason}") == 1, "said once"
    assert backend.received == []

    probing = {"enabled": True, "interval": "50ms", "timeout": "40ms", "down": 1}
    section = {"url": backend.url, "tls": {"ca_file": authority[1]}}
    proxy = await start_proxy(section, probing=probing, state=tmp_path / "another")
    found = f"GET /health: certificate refused: {reason}"
    await eventually(lambda: f"backend a is down: {found}" in caplog.text)
    assert (await proxy.state())["backends"][0]["unavailable"] == f"down: {found}"
    figure("F28", 0, "bad certificates accepted")


async def test_the_end_of_our_own_certificate_is_said_everywhere(
    authority: tuple[trustme.CA, str],
    start_backend: StartBackend,
    start_proxy: StartProxy,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    made, ca_file = authority
    leaf = made.issue_cert("tidegate", not_before=datetime(2019, 1, 1), not_after=datetime(2020, 1, 1))
    certificate, key = tmp_path / "ours.pem", tmp_path / "ours.key"
    certificate.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    key.write_bytes(leaf.private_key_pem.bytes())
    context = server(made, "127.0.0.1")
    context.verify_mode = ssl.CERT_REQUIRED
    made.configure_trust(context)
    backend = await start_backend(tls=context)
    tls = {"ca_file": ca_file, "certificate": str(certificate), "key": str(key)}
    probing = {"enabled": True, "interval": "20s", "timeout": "19s"}
    proxy = await start_proxy({"url": backend.url, "tls": tls}, probing=probing)
    warning = f"backend a: our certificate {certificate} has expired: it refuses us"
    assert caplog.text.count(warning) == 1
    await eventually(lambda: "backend a is down" in caplog.text)
    state = await proxy.state()
    assert state["backends"][0]["unavailable"].endswith(": our certificate has expired")
    assert warning in [found["warning"] for found in state["backend_certificates"]]
    (_, metrics) = await proxy.get("/metrics")
    line = f'tidegate_certificate_expiry_timestamp_seconds{{certificate="{certificate}"}} 1.5778368e+09'
    assert line in metrics.decode().splitlines()
    assert f'{{certificate="{ca_file}"}}' in metrics.decode()


async def test_a_connection_is_used_again_for_the_same_identity_only(
    authority: tuple[trustme.CA, str], start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    made, ca_file = authority
    shown: list[str] = []
    engine = b.answers()

    async def notes_who_asks(wire: b.Wire) -> None:
        shown.append(wire.writer.get_extra_info("peercert")["serialNumber"])
        await engine(wire)

    def issue(name: str) -> dict[str, str]:
        """A client certificate into the files of this name."""
        leaf = made.issue_cert("tidegate")
        certificate, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        key.write_bytes(leaf.private_key_pem.bytes())
        return {"certificate": str(certificate), "key": str(key)}

    context = server(made, "127.0.0.1")
    context.verify_mode = ssl.CERT_REQUIRED
    made.configure_trust(context)
    backend = await start_backend(then=notes_who_asks, tls=context)
    tls = {"ca_file": ca_file}
    proxy = await start_proxy(
        {"url": backend.url, "tls": {**tls, **issue("one")}},
        {"url": backend.url, "tls": {**tls, **issue("two")}},
        file=tmp_path / "tidegate.yaml",
        timeouts={"backend_idle": "60s"},
    )

    async def ask(name: str) -> str:
        endpoint = proxy.runtime.endpoints[name]
        for other in "ab":
            proxy.backend(other).draining = other != name
        proxy.runtime.fleet.version += 1
        answer = await proxy.chat()
        assert (answer.status, answer.backend) == (200, name)
        await eventually(lambda: len(endpoint.pool) == 1)
        return shown[-1]

    one, two = await ask("a"), await ask("b")
    assert one != two
    assert (await ask("a"), await ask("b")) == (one, two)
    assert backend.connections == 2, "each has its own, at one address"

    issue("one")  # seen by itself, without a reload that anybody asks for
    await eventually(lambda: proxy.runtime.observer.reloads_ok == 1)
    await eventually(lambda: backend.open == 1)  # the idle one that showed the old certificate is gone
    assert await ask("a") not in (one, two)
    assert await ask("b") == two
    assert backend.connections == 3


async def test_a_client_that_leaves_stops_the_engine_behind_tls_too(
    authority: tuple[trustme.CA, str], start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(b.stalls, tls=server(authority[0], "127.0.0.1"))
    proxy = await start_proxy({"url": backend.url, "tls": {"ca_file": authority[1]}})
    client = await proxy.connect()
    await client.send(chat(stream=True))
    await eventually(lambda: backend.running)
    client.close()
    await eventually(lambda: backend.aborted == 1)
    await proxy.idle()


async def test_an_answer_that_ends_with_its_connection_is_whole_behind_tls_too(
    authority: tuple[trustme.CA, str],
    start_backend: StartBackend,
    start_proxy: StartProxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = await start_backend(then=b.until_close(complete=True), tls=server(authority[0], "127.0.0.1"))
    proxy = await start_proxy({"url": backend.url, "tls": {"ca_file": authority[1]}})
    answer = await proxy.chat(stream=True)
    assert (answer.status, answer.done, answer.errors) == (200, True, [])
    assert proxy.backend("a").failed == 0
    await proxy.idle()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_reload_sees_certificates_that_were_replaced(
    authority: tuple[trustme.CA, str], start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    first = await start_backend(tls=server(authority[0], "127.0.0.1"))
    section = {"url": first.url, "tls": {"ca_file": authority[1]}}
    proxy = await start_proxy(section, file=tmp_path / "tidegate.yaml")
    assert (await proxy.chat()).status == 200
    await first.stop()
    another = trustme.CA()
    first.tls = server(another, "127.0.0.1")
    await first.start()
    another.cert_pem.write_to_path(authority[1])
    assert proxy.service.reload()
    assert (await proxy.chat()).status == 200
    await proxy.idle()
