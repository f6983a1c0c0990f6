"""The ledger on a real PostgreSQL: it goes away and comes back (F25), and several proxies share it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

import proxy.access.shared
from benchmarks.postgres import PostgresServer
from proxy.access.keys import create_key
from proxy.access.pepper import load_pepper
from proxy.database import BUSY_TIMEOUT_S, DATABASE_FILE, open_database
from proxy.tables import ledger, usage_hourly
from tests.databases import running_postgres
from tests.e2e.backends import answers, waits
from tests.e2e.faults.figures import Figure
from tests.e2e.proxy_fixtures import Answer, Proxy, StartBackend, StartProxy, chat, command, eventually

pytestmark = pytest.mark.e2e


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """One that the test may stop."""
    with running_postgres() as server:
        yield server


def found(target: str | Path) -> tuple[list[str], int]:
    """-> operations in the ledger, and how many requests the hourly sums have."""
    engine = open_database(target)
    try:
        with engine.connect() as connection:
            ops = list(connection.execute(select(ledger.c.op)).scalars())
            requests = connection.execute(select(func.sum(usage_hourly.c.requests))).scalar_one()
    finally:
        engine.dispose()
    return ops, int(requests)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_server_that_stops_and_starts_holds_up_nobody(
    mode: str,
    own_server: PostgresServer,
    start_backend: StartBackend,
    start_proxy: StartProxy,
    figure: Figure,
) -> None:
    url = own_server.url(own_server.create())
    gate = asyncio.Event()
    backend = await start_backend(answers(), waits(gate, 5), then=answers())
    proxy = await start_proxy(backend, database=url)
    heard = [await proxy.chat()]
    client = await proxy.connect()
    await client.send(chat(stream=True))
    await eventually(lambda: backend.running)
    await asyncio.to_thread(own_server.stop, mode)
    heard += [await proxy.chat() for _ in range(10)]
    gate.set()
    stream = await client.answer()
    assert (stream.text, stream.done) == ("xxxxx", True)
    heard.append(stream)
    await eventually(lambda: proxy.runtime.ledger.lag >= 11 and proxy.runtime.ledger.trouble)
    assert (await proxy.get("/readyz"))[0] == 200
    state = (await proxy.state())["ledger"]
    assert (state["lag_rows"], state["failed"]) == (proxy.runtime.ledger.lag, "")
    assert state["oldest_s"] > 0.0
    assert state["trouble"] == proxy.runtime.ledger.trouble, "eleven rows are enough to say it"
    await eventually(lambda: proxy.runtime.keys.trouble)
    assert (await proxy.state())["keys"]["trouble"] == proxy.runtime.keys.trouble
    assert b"tidegate_keys_unread 1.0" in (await proxy.get("/metrics"))[1]
    await asyncio.to_thread(own_server.start)
    heard.append(await proxy.chat())
    assert {answer.status for answer in heard} == {200}
    await eventually(lambda: proxy.runtime.ledger.lag == 0, within_s=30)
    await eventually(lambda: not proxy.runtime.keys.trouble)
    await proxy.service.stop()
    ops, requests = found(url)
    assert sorted(ops) == sorted(answer.id for answer in heard)
    assert requests == len(heard)
    figure("F25", 0, f"of {len(heard)} rows lost or doubled, PostgreSQL stopped ({mode})")


async def test_what_a_server_that_stays_away_did_not_take_waits_for_the_next_start(
    own_server: PostgresServer,
    start_backend: StartBackend,
    start_proxy: StartProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = own_server.url(own_server.create())
    backend = await start_backend()
    proxy = await start_proxy(backend, database=url)
    await asyncio.to_thread(own_server.stop)
    heard = [await proxy.chat() for _ in range(5)]
    stop = proxy.runtime.ledger.stop
    monkeypatch.setattr(proxy.runtime.ledger, "stop", lambda: stop(0.2))
    await proxy.service.stop()
    await asyncio.to_thread(own_server.start)
    again = await start_proxy(backend, database=url)
    heard.append(await again.chat())
    await again.service.stop()
    ops, requests = found(url)
    assert sorted(ops) == sorted(answer.id for answer in heard)
    assert requests == 6


@pytest.mark.slow
async def test_sqlite_locked_for_ten_seconds_holds_up_nobody(
    start_backend: StartBackend, start_proxy: StartProxy, figure: Figure
) -> None:
    """Longer than an insert waits for the lock by itself."""
    proxy = await start_proxy(await start_backend())
    heard: list[Answer] = []
    other = sqlite3.connect(proxy.state_folder / DATABASE_FILE, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        for _ in range(2 * int(BUSY_TIMEOUT_S)):
            heard.append(await proxy.chat())
            await asyncio.sleep(1.0)
        assert "locked" in proxy.runtime.ledger.trouble
    finally:
        other.execute("ROLLBACK")
        other.close()
    await eventually(lambda: proxy.runtime.ledger.lag == 0, within_s=30)
    await proxy.service.stop()
    ops, requests = found(proxy.state_folder)
    assert sorted(ops) == sorted(answer.id for answer in heard)
    assert requests == len(heard)
    figure("F25", 0, f"of {len(heard)} rows lost or doubled, SQLite locked for {2 * int(BUSY_TIMEOUT_S)} s")


async def test_a_budget_holds_over_two_proxies(
    tmp_path: Path,
    postgres: PostgresServer,
    start_backend: StartBackend,
    start_proxy: StartProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy.access.shared, "PAUSE_S", 0.05)
    url = postgres.url(postgres.create())
    states = [tmp_path / "north", tmp_path / "south"]
    for state in states:
        state.mkdir()
        (state / "pepper").write_bytes(bytes(32))
        (state / "pepper").chmod(0o600)
    engine = open_database(url)
    text, key = create_key(engine, load_pepper(states[0]), tenant="acme", budget="0.001")
    engine.dispose()
    header = f"authorization: Bearer {text}"
    backend = await start_backend()
    north, south = [await start_proxy(backend, state=state, database=url) for state in states]

    async def spend(proxy: Proxy) -> Answer:
        return await proxy.chat(header, max_tokens=3)

    first = await spend(north)
    assert (first.status, (await spend(south)).status) == (200, 200)
    while (answer := await spend(north)).status == 200:
        pass
    assert answer.code == "budget"
    await eventually(lambda: north.runtime.ledger.lag == 0)

    def spent(proxy: Proxy) -> int:
        month = proxy.runtime.limits.usage(key, proxy.runtime.wall()).month
        return int(month.spent + month.elsewhere)

    await eventually(lambda: spent(south) == spent(north))
    assert (await spend(south)).code == "budget"
    config = tmp_path / "tidegate.yaml"
    config.write_text(f"database: {url}\nstate: {states[1]}\nbackends: [{{name: a, url: {backend.url}}}]\n")
    status, lines, complaint = await command("export", "--config", str(config))
    assert (status, complaint) == (0, ""), complaint
    instances = {line.split('"instance":"')[1].split('"')[0] for line in lines.splitlines()}
    assert len(instances) == 2


async def test_commands_work_over_postgresql(
    tmp_path: Path, postgres: PostgresServer, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    url = postgres.tcp_url(postgres.create(), user="tidegate:secret-word")
    state = tmp_path / "state"
    config = tmp_path / "tidegate.yaml"
    backend = await start_backend()
    config.write_text(
        f"database: {url}\nstate: {state}\ncurrency: EUR\n"
        f"backends: [{{name: a, url: {backend.url}, price: {{input: 1, output: 2}}}}]\n"
    )
    said: list[str] = []

    async def run(*arguments: str) -> str:
        status, out, complaint = await command(*arguments, "--config", str(config))
        said.append(out + complaint)
        assert status == 0, complaint
        return out

    key = (await run("keys", "create", "--tenant", "acme", "--budget", "5")).strip()
    proxy = await start_proxy(backend, database=url, state=state)
    assert (await proxy.chat(f"authorization: Bearer {key}")).status == 200
    assert (await proxy.chat()).status == 401
    await eventually(lambda: proxy.runtime.ledger.lag == 0 and proxy.runtime.ledger._moved == 1)
    assert "acme" in await run("usage", "--by", "tenant,day")
    assert '"tenant":"acme"' in await run("export")
    assert "of 5.00 EUR spent this month" in " ".join((await run("keys", "list")).split())
    for arguments in (("keys", "revoke", key.split("_")[1]), ("keys", "create", "--tenant", "zz")):
        status, out, complaint = await command(*arguments, "--state", str(state))
        said.append(complaint)
        assert (status, out) == (2, ""), "it would be in a ledger that nobody reads"
        assert f"the proxy on {state} has its ledger in postgresql://tidegate:***@" in complaint
    assert not (state / DATABASE_FILE).exists()
    right = config.read_text()
    config.write_text(right + "bogus: 1\n")
    await run("keys", "revoke", key.split("_")[1])
    config.write_text(right)
    await eventually(lambda: not proxy.runtime.keys.ids)
    assert (await proxy.chat(f"authorization: Bearer {key}")).status == 401
    status, out, complaint = await command("check", str(config))
    assert (status, "secret-word" in out + complaint + "".join(said)) == (0, False)


async def test_serve_without_its_server_says_so(tmp_path: Path, own_server: PostgresServer) -> None:
    url = own_server.tcp_url("nowhere", user="tidegate:secret-word")
    config = tmp_path / "tidegate.yaml"
    config.write_text(
        f"database: {url}\nstate: {tmp_path}\nbackends: [{{name: a, url: 'http://127.0.0.1:1'}}]\n"
    )
    status, out, complaint = await command("serve", "--config", str(config))
    assert status != 0
    assert 'database "nowhere" does not exist' in complaint
    assert "secret-word" not in out + complaint
    assert "Traceback" not in complaint
