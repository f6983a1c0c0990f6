"""Disks that fail and databases that are locked: nothing new is served that cannot be recorded, nothing is lost."""

from __future__ import annotations

import asyncio
import errno
import sqlite3

import pytest
from sqlalchemy import select

import proxy.journal
from proxy.database import DATABASE_FILE, open_database
from proxy.segments import Disk
from proxy.tables import ledger
from tests.e2e.backends import answers, waits
from tests.e2e.proxy_fixtures import Proxy, StartBackend, StartProxy, chat, eventually

pytestmark = pytest.mark.e2e


class BrokenDisk(Disk):
    """Works until it is told how to fail."""

    failing: str = ""
    error = errno.EIO

    def write(self, handle: int, data: bytes) -> None:
        if BrokenDisk.failing == "write":
            raise OSError(BrokenDisk.error, "no")
        super().write(handle, data)

    def sync(self, handle: int) -> None:
        if BrokenDisk.failing == "sync":
            raise OSError(BrokenDisk.error, "no")
        super().sync(handle)


@pytest.fixture
def broken_disk(monkeypatch: pytest.MonkeyPatch) -> type[BrokenDisk]:
    """The journal's disk."""
    monkeypatch.setattr(proxy.journal, "Disk", BrokenDisk)
    monkeypatch.setattr(BrokenDisk, "failing", "")
    return BrokenDisk


def rows(proxy: Proxy) -> list[tuple[str, str, int]]:
    """(operation, outcome, completion tokens) of every row in the database."""
    engine = open_database(proxy.state_folder)
    try:
        with engine.connect() as connection:
            columns = (ledger.c.op, ledger.c.outcome, ledger.c.completion_tokens)
            found = connection.execute(select(*columns).order_by(ledger.c.id)).all()
    finally:
        engine.dispose()
    return [(op, outcome, tokens) for op, outcome, tokens in found]


@pytest.mark.parametrize(("failing", "error"), [("sync", errno.EIO), ("write", errno.ENOSPC)])
@pytest.mark.parametrize("durability", ["normal", "strict"])
async def test_a_failed_disk_refuses_what_is_new_and_ends_what_runs(
    failing: str,
    error: int,
    durability: str,
    start_backend: StartBackend,
    start_proxy: StartProxy,
    broken_disk: type[BrokenDisk],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(answers(), waits(gate, 5), then=answers())
    proxy = await start_proxy(backend, durability=durability)
    before = await proxy.chat()
    assert before.status == 200
    client = await proxy.connect()
    await client.send(chat(stream=True))
    await eventually(lambda: backend.running)
    await proxy.runtime.journal.synced()  # so that it is `last` whose rows the disk fails on
    monkeypatch.setattr(broken_disk, "error", error)
    monkeypatch.setattr(broken_disk, "failing", failing)
    last = await proxy.chat()
    assert last.status in ((200,) if durability == "normal" else (503,))
    await eventually(lambda: proxy.runtime.journal.failed)
    for _ in range(3):
        refused = await proxy.chat()
        assert (refused.status, refused.code) == (503, "ledger_unavailable")
        assert int(refused.fields["retry-after"]) >= 1
    monkeypatch.setattr(broken_disk, "failing", "")  # it stays failed: a later sync proves nothing
    assert (await proxy.chat()).code == "ledger_unavailable"
    status, body = await proxy.get("/readyz")
    assert (status, b"cannot be recorded" in body) == (503, True)
    assert b"tidegate_journal_failed 1.0" in (await proxy.get("/metrics"))[1]
    gate.set()
    answer = await client.answer()
    assert (answer.text, answer.done) == ("xxxxx", True)
    await proxy.idle()
    await proxy.service.stop()
    found = rows(proxy)
    assert [row for row in found if row[1] == "ok" and row[2] == 5] == [(answer.id, "ok", 5)]
    assert len({op for op, *_ in found}) == len(found)

    proxy = await start_proxy(backend)  # another start, on a disk that works
    assert (await proxy.chat()).status == 200
    await proxy.service.stop()
    after = rows(proxy)
    assert after[: len(found)] == found  # nothing double
    assert [row[1] for row in after[len(found) :]] == ["ok"]


async def test_a_locked_database_holds_up_nobody(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend())
    locked = sqlite3.connect(proxy.state_folder / DATABASE_FILE, isolation_level=None)
    locked.execute("BEGIN IMMEDIATE")
    try:
        found = [await proxy.chat() for _ in range(5)]
        assert {answer.status for answer in found} == {200}
        await eventually(lambda: proxy.runtime.ledger.lag >= 5)
        assert b"tidegate_ledger_lag_rows 5.0" in (await proxy.get("/metrics"))[1]
    finally:
        locked.execute("ROLLBACK")
        locked.close()
    await eventually(lambda: proxy.runtime.ledger.lag == 0)
    assert sorted(op for op, *_ in rows(proxy)) == sorted(answer.id for answer in found)


async def test_too_many_rows_that_wait_refuse_what_is_new(
    start_backend: StartBackend, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await start_proxy(await start_backend())
    monkeypatch.setattr(proxy.runtime.ledger, "_most_waiting", 3)
    locked = sqlite3.connect(proxy.state_folder / DATABASE_FILE, isolation_level=None)
    locked.execute("BEGIN IMMEDIATE")
    try:
        for _ in range(4):
            await proxy.chat()
        await eventually(lambda: proxy.runtime.ledger.lag == 4)
        assert (await proxy.chat()).code == "ledger_unavailable"
        assert (await proxy.get("/readyz"))[0] == 503
    finally:
        locked.execute("ROLLBACK")
        locked.close()
    await eventually(lambda: not proxy.runtime.ledger.failed)
    assert (await proxy.chat()).status == 200
    assert (await proxy.get("/readyz"))[0] == 200
