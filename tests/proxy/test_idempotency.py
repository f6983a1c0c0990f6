"""`Idempotency-Key`: one charge, whatever is sent again and whenever."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxy import idempotency
from proxy.access.keys import Key
from proxy.errors import RequestError
from proxy.exchange import Exchange, State
from proxy.http1 import RequestGrammar
from proxy.idempotency import LIFETIME_S, IdempotencyKeys
from proxy.tasks import Tasks
from tests.proxy.fakes import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    World,
    answer_body,
    chunked,
    close,
    event,
    read,
    whole,
)

KEY = b"order-7"
STREAM = STREAM_HEAD + chunked(event("x", completion=1), DONE) + LAST_CHUNK


def ask(world: World, *, stream: bool = False, key: bytes = KEY, **options: Any) -> Exchange:
    return world.start(stream=stream, idempotency_key=key, **options)


def answered(world: World, exchange: Exchange, reply: bytes = b"") -> Exchange:
    """The backend answers it."""
    connection = exchange.connection or world.answers(exchange, "a")
    connection.data_received(reply or whole(200, answer_body(7, 5), b"content-language: en"))
    assert exchange.state is State.ENDED
    return exchange


def code(exchange: Exchange) -> tuple[int, str]:
    found = read(exchange)
    return found.status, found.error["code"]


def paid(world: World) -> int:
    """Rows that cost something."""
    return sum(row.cost_nano > 0 for row in world.journal.closed)


# What comes back


def test_the_same_request_gets_the_same_answer_and_is_charged_once() -> None:
    key = Key("k", "acme", rpm=1000, tpm=10**6, budget_nano=10**12)
    world = World("a", key=key)
    first = answered(world, ask(world))
    spent = world.runtime.limits.usage(key, world.runtime.wall()).tokens.total
    second = ask(world)
    one, two = read(first), read(second)
    assert (one.status, one.body) == (two.status, two.body)
    assert two.fields["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in one.fields
    assert two.fields["content-language"] == "en"
    assert two.fields["x-request-id"] == second.row.op
    assert second.client.ended == "keep"  # type: ignore[attr-defined]
    row = second.row
    assert (row.outcome, row.status, row.attempts, row.usage_source, row.cost_nano) == (
        "ok",
        200,
        0,
        "none",
        0,
    )
    assert row.reason == f"answered before, as {first.row.op}"
    assert world.runtime.limits.usage(key, world.runtime.wall()).tokens.total == spent
    assert paid(world) == 1
    world.check()


def test_while_the_first_runs_the_second_is_told_to_wait() -> None:
    world = World("a")
    first = ask(world)
    second = ask(world)
    assert code(second) == (409, "idempotency_running")
    assert first.row.op in read(second).error["message"]
    assert read(second).fields["retry-after"] == "1"
    assert second.row.outcome == "client_error"
    answered(world, first)
    assert read(ask(world)).status == 200
    world.check()


def test_a_stream_that_is_done_is_named_and_not_done_again() -> None:
    world = World("a")
    first = answered(world, ask(world, stream=True), STREAM)
    second = ask(world, stream=True)
    assert code(second) == (409, "idempotency_spent")
    assert first.row.op in read(second).error["message"]
    assert read(second).fields["x-should-retry"] == "false"
    assert paid(world) == 1


def test_an_answer_too_long_to_keep_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "ANSWER_BYTES", 100)
    world = World("a")
    answered(world, ask(world))
    assert code(ask(world)) == (409, "idempotency_spent")


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [{"role": "user", "content": "bye"}]},
        {"stream": True},
        {"endpoint": "completions", "prompt": ""},
    ],
)
def test_another_request_under_the_same_key_is_refused(other: dict[str, Any]) -> None:
    world = World("a")
    for first in (ask(world), None):
        if first is not None:
            refused = ask(world, **other)
            assert code(refused) == (422, "idempotency_mismatch")
            answered(world, first)
        assert code(ask(world, **other)) == (422, "idempotency_mismatch")


def test_keys_of_tenants_are_apart() -> None:
    world = World("a")
    first = answered(world, ask(world))
    world.key = Key("k", "other")
    second = ask(world)
    assert second.state is State.SENT
    assert first.row.tenant != second.row.tenant


def test_who_may_not_use_the_model_is_not_answered_either() -> None:
    world = World("a", key=Key("k", "acme"))
    answered(world, ask(world))
    world.key = Key("l", "acme", models=frozenset({"other"}))
    assert code(ask(world)) == (403, "model_not_allowed")


@pytest.mark.parametrize(
    "reply", [whole(400, b"{}"), whole(500, b"{}"), whole(429, b"{}"), b"garbage\r\n\r\n"]
)
def test_what_ended_without_a_charge_may_be_done_again(reply: bytes) -> None:
    world = World("a")
    answered(world, ask(world), reply)
    world.wait(2.0)  # the pause that a 429 asks for
    again = ask(world)
    assert again.state in (State.CONNECTING, State.SENT)
    answered(world, again)
    assert paid(world) == 1


def test_what_was_refused_or_left_without_a_charge_may_be_done_again() -> None:
    world = World("a", key=Key("k", "acme", concurrency=1))
    running = world.start()
    assert code(ask(world)) == (429, "concurrency")
    running.client_gone()
    ask(world).client_gone()
    assert ask(world).state is State.CONNECTING
    world.check()


@pytest.mark.parametrize("how", ["leave", "cut"])
def test_what_broke_off_after_something_was_charged_is_not_done_again(how: str) -> None:
    world = World("a")
    first = ask(world, stream=True)
    connection = world.relaying(first, "a")
    first.client_gone() if how == "leave" else close(connection)
    assert first.row.cost_nano > 0
    assert code(ask(world, stream=True)) == (409, "idempotency_spent")


def test_a_key_lives_for_a_day() -> None:
    world = World("a")
    answered(world, ask(world))
    world.loop.now += LIFETIME_S - 1.0
    assert read(ask(world)).fields["idempotent-replayed"] == "true"
    world.loop.now += 2.0
    assert ask(world).state is State.CONNECTING or world.all[-1].state is State.SENT


@pytest.mark.parametrize("key", [b"x" * 256, b"caf\xc3\xa9", b"a\tb"])
def test_keys_that_are_none(key: bytes) -> None:
    found = read(ask(World("a"), key=key))
    assert (found.status, found.error["code"], found.error["param"]) == (
        400,
        "invalid_value",
        "Idempotency-Key",
    )


def test_without_a_key_nothing_is_kept() -> None:
    world = World("a")
    exchange = answered(world, world.start(stream=False))
    assert (exchange.claim, exchange.kept, len(world.runtime.idempotency)) == (None, None, 0)


def test_the_field_is_read_and_ends_here() -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\nIdempotency-Key: order 7 \r\naccept: */*\r\n\r\n"
    parsed = RequestGrammar().parse(head)
    assert isinstance(parsed, tuple)
    assert (parsed[0].idempotency_key, parsed[0].forward) == (b"order 7", b"accept: */*\r\n")
    with pytest.raises(RequestError, match="more than one Idempotency-Key"):
        RequestGrammar().parse(head[:-2] + b"idempotency-key: other\r\n\r\n")
    with pytest.raises(ValueError, match="idempotency-key cannot be forwarded"):
        RequestGrammar(forward=("Idempotency-Key",))


# The law


class Repeating(RuleBasedStateMachine):
    """One client that sends two requests again and again with the same keys, whatever happens to them."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World("a", "b", slots=4)

    @rule(number=st.integers(0, 1), stream=st.booleans())
    def send(self, number: int, stream: bool) -> None:
        ask(self.world, key=b"%d" % number, stream=stream, user=str(number))

    def running(self) -> list[Exchange]:
        return [exchange for exchange in self.world.all if exchange.state is not State.ENDED]

    @rule(data=st.data(), what=st.sampled_from(["answer", "begin", "500", "leave", "close"]))
    def happens(self, data: st.DataObject, what: str) -> None:
        if not self.running():
            return
        exchange = data.draw(st.sampled_from(self.running()))
        if what == "leave":
            exchange.client_gone()
            return
        if exchange.connection is None:
            assert exchange.target is not None
            self.world.connects(exchange.target.name)
        connection = exchange.connection
        if connection is None or (exchange.committed and what in ("answer", "begin", "500")):
            return
        if what == "close":
            close(connection)
        elif what == "500":
            connection.data_received(whole(500, b"{}"))
        elif exchange.row.stream:
            connection.data_received(STREAM if what == "answer" else STREAM[: STREAM.index(DONE)])
        else:
            connection.data_received(whole(200, answer_body()))

    @invariant()
    def each_key_is_paid_for_once(self) -> None:
        self.world.check()
        for user in ("0", "1"):
            mine = [
                e
                for e in self.world.all
                if e.body_read is not None and b'"user":"%s"' % user.encode() in e.body_read.raw
            ]
            assert sum(e.row.cost_nano > 0 for e in mine if e.state is State.ENDED) <= 1
            assert sum(e.state is not State.ENDED for e in mine) <= 1


TestRepeating = Repeating.TestCase
TestRepeating.settings = settings(max_examples=25, stateful_step_count=20)


# Bounds


def keys_of(store: IdempotencyKeys, tenant: str) -> list[str]:
    return list(store._tenants[tenant])


def test_keys_of_a_tenant_are_bounded_and_take_no_room_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "KEYS_PER_TENANT", 3)
    store = IdempotencyKeys()
    store.end(store.take("quiet", b"1", "chat", b"", "q", 0.0), True)
    running = store.take("busy", b"0", "chat", b"", "b0", 0.0)
    for number in range(1, 10):
        store.end(store.take("busy", b"%d" % number, "chat", b"", f"b{number}", 0.0), True)
    assert len(store) == 4
    assert running.name in keys_of(store, "busy")  # who runs is not forgotten
    with pytest.raises(RequestError, match="done as q"):
        store.take("quiet", b"1", "chat", b"", "again", 1.0)
    assert store.take("busy", b"1", "chat", b"", "again", 1.0).op == "again"


def test_answers_are_bounded_and_their_keys_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "ANSWERS_BYTES", 1000)
    store = IdempotencyKeys()
    for number in range(10):
        store.end(
            store.take("t", b"%d" % number, "chat", b"", f"{number}", 0.0), True, (200, b"", b"x" * 300)
        )
    kept = [claim.op for claim in store._tenants["t"].values() if claim.answer is not None]
    assert kept == ["7", "8", "9"]
    assert (len(store), store._answers_bytes) == (10, 900)
    with pytest.raises(RequestError, match="done as 0"):
        store.take("t", b"0", "chat", b"", "again", 1.0)
    store.take("t", b"x", "chat", b"", "later", LIFETIME_S)
    assert (len(store), store._answers_bytes, len(store._answers)) == (1, 0, 0)


# The file


async def test_keys_outlive_a_restart(tmp_path: Path) -> None:
    path, tasks = tmp_path / "keys.jsonl", Tasks()
    store = IdempotencyKeys()
    store.open(path, tasks, 0.0)
    store.end(store.take("t", b"done", "chat", b"", "op1", 0.0), True, (200, b"", b"{}"))
    store.end(store.take("t", b"free", "chat", b"", "op2", 0.0), False)
    store.take("t", b"running", "chat", b"", "op3", 0.0)
    await asyncio.gather(*tasks._tasks)
    with path.open("ab") as file:
        file.write(b'["t","half')
    again = IdempotencyKeys()
    again.open(path, Tasks(), 10.0)
    for key, op in ((b"done", "op1"), (b"running", "op3")):
        with pytest.raises(RequestError, match=f"done as {op}"):
            again.take("t", key, "chat", b"", "new", 10.0)
    assert again.take("t", b"free", "chat", b"", "new", 10.0).op == "new"
    late = IdempotencyKeys()
    late.open(path, Tasks(), 2 * LIFETIME_S)
    assert len(late) == 0
    assert b"done" not in path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0


async def test_two_processes_know_of_each_others_keys_until_one_has_ended(tmp_path: Path) -> None:
    path, tasks = tmp_path / "keys.jsonl", Tasks()

    async def written() -> None:
        await asyncio.gather(*tasks._tasks)

    def refused(store: IdempotencyKeys, key: bytes) -> str:
        with pytest.raises(RequestError) as caught:
            store.take("t", key, "chat", b"", "new", 1.0)
        return caught.value.code

    old, new = IdempotencyKeys(), IdempotencyKeys()
    old.open(path, tasks, 0.0)
    before = old.take("t", b"before", "chat", b"", "op1", 0.0)
    await written()
    new.open(path, tasks, 0.0, shared=True)
    free, lost = [old.take("t", key, "chat", b"", "op", 0.0) for key in (b"free", b"lost")]
    old.share()
    await written()
    assert [refused(new, key) for key in (b"before", b"free", b"lost")] == ["idempotency_running"] * 3
    old.end(before, True, (200, b"", b"{}"))
    old.end(free, False)
    own = new.take("t", b"own", "chat", b"", "op4", 1.0)
    await written()
    assert refused(new, b"before") == "idempotency_spent"
    assert new.take("t", b"free", "chat", b"", "op5", 1.0).ours
    assert refused(old, b"own") == "idempotency_running"
    assert old.take("t", b"before", "chat", b"", "new", 1.0).answer is not None  # it has it still
    new.unshare()
    assert refused(new, b"lost") == "idempotency_spent"
    assert (lost.state, own.state) == ("running", "running")
    assert refused(new, b"own") == "idempotency_running"


async def test_what_is_not_written_when_the_proxy_stops_is_written_then(tmp_path: Path) -> None:
    path, tasks = tmp_path / "keys.jsonl", Tasks()
    store = IdempotencyKeys()
    store.open(path, tasks, 0.0)
    store.take("t", b"key", "chat", b"", "op", 0.0)
    await tasks.cancel_all()
    store.close()
    again = IdempotencyKeys()
    again.open(path, Tasks(), 0.0)
    assert len(again) == 1


async def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "FILE_LINES", 20)
    path, tasks = tmp_path / "keys.jsonl", Tasks()
    store = IdempotencyKeys()
    store.open(path, tasks, 0.0)
    for number in range(100):
        store.end(store.take("t", b"one", "chat", b"", f"op{number}", 0.0), False)
        await asyncio.gather(*tasks._tasks)
    assert len(path.read_bytes().splitlines()) <= 24


@pytest.mark.parametrize("shared", [False, True])
async def test_a_full_disk_stops_the_writing_and_nothing_else_until_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, shared: bool
) -> None:
    path, tasks = tmp_path / "keys.jsonl", Tasks()
    store = IdempotencyKeys()
    store.open(path, tasks, 0.0)
    if shared:
        store.share()
    times = iter(range(3))
    writes = Path.open

    def full(path: Path, *mode: Any, **options: Any) -> Any:
        if mode != ("rb",) and next(times, None) is not None:
            raise OSError(28, "No space left on device")
        return writes(path, *mode, **options)

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(idempotency, "RETRY_S", 0.0)
    store.end(store.take("t", b"key", "chat", b"", "op", 0.0), True)
    with pytest.raises(RequestError, match="done as op"):
        store.take("t", b"key", "chat", b"", "again", 0.0)
    await asyncio.gather(*tasks._tasks)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    again = IdempotencyKeys()
    again.open(path, Tasks(), 0.0)
    with pytest.raises(RequestError, match="done as op"):
        again.take("t", b"key", "chat", b"", "again", 0.0)


async def test_a_disk_that_is_full_to_the_end_is_told_at_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tasks, store = Tasks(), IdempotencyKeys()
    store.open(tmp_path / "keys.jsonl", tasks, 0.0)

    def full(lines: list[bytes]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write", full)
    store.take("t", b"key", "chat", b"", "op", 0.0)
    store.close()
    assert "the next start does not know all" in caplog.text
    await tasks.cancel_all()
