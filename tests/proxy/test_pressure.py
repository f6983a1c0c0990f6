"""Memory that runs short: stages, hysteresis, what each gives up, and where the bound comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.admin.http import unready
from proxy.pressure import HYSTERESIS, LEVELS, Memory, Pressure, cgroup_bound, stage_at
from proxy.server import ClientConnection
from tests.proxy.fakes import FakeTransport, World
from tests.proxy.test_server import Peer, request

MIB = 1024 * 1024


@given(st.lists(st.floats(0.8, 1.1), max_size=50))
def test_a_stage_begins_at_its_level_and_ends_three_percent_below(uses: list[float]) -> None:
    stage = 0
    for use in uses:
        before, stage = stage, stage_at(use, stage)
        for number in (1, 2, 3):
            if use >= LEVELS[number]:
                assert stage >= number
            elif use < LEVELS[number] - HYSTERESIS:
                assert stage < number
            else:
                assert (stage >= number) == (before >= number)


class FakeMemory(Memory):
    """So full, of 1000 bytes."""

    def __init__(self, full: int) -> None:
        self.bound = 1000
        self.full = full
        self.given_back = 0

    def used(self) -> int:
        return self.full

    def give_back(self) -> None:
        self.given_back += 1

    def close(self) -> None:
        pass


def test_memory_and_bodies_count(caplog: pytest.LogCaptureFixture) -> None:
    memory = FakeMemory(960)
    pressure = Pressure(memory)
    assert (pressure.look(0, 100), pressure.use, memory.given_back) == (2, 0.96, 1)
    memory.full = 500
    assert (pressure.look(95, 100), pressure.use, memory.given_back) == (1, 0.95, 1)
    assert pressure.look(0, 100) == 0
    memory.full = 930
    assert (pressure.look(0, 100), memory.given_back) == (1, 2)
    memory.bound = 0  # none
    assert pressure.look(0, 100) == 0
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "memory runs short: new requests are refused",
        "memory runs short: connections end with their answers",
        "memory suffices again",
        "memory runs short: connections end with their answers",
        "memory suffices again",
    ]


@given(st.lists(st.tuples(st.integers(0, 1100), st.integers(0, 100)), max_size=30))
def test_bodies_alone_refuse_nobody(looks: list[tuple[int, int]]) -> None:
    memory = FakeMemory(0)
    both, alone = Pressure(memory), Pressure(FakeMemory(0))
    by_memory = 0
    for full, bodies in looks:
        memory.full = full
        assert alone.look(bodies, 100) <= 1
        by_memory = stage_at(memory.full / memory.bound, by_memory)
        stage = both.look(bodies, 100)
        assert stage == by_memory or stage == 1 > by_memory


def test_the_memory_of_this_process_is_read() -> None:
    memory = Memory(512 * MIB)
    try:
        before = memory.used()
        block = bytearray(b"x") * (64 * MIB)
        assert memory.used() - before > 48 * MIB
        del block
        memory.give_back()
        assert memory.used() - before < 48 * MIB
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("group", "files", "bound"),
    [
        ("0::/a/b", {"sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/memory.max": "1000"}, 1000),
        ("0::/a", {"sys/fs/cgroup/a/memory.max": "900", "sys/fs/cgroup/memory.max": "1000"}, 900),
        ("0::/", {"sys/fs/cgroup/memory.max": "max"}, 0),
        ("3:cpu,memory:/a", {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "700"}, 700),
        ("3:memory:/", {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}, 0),
        ("1:cpu:/", {}, 0),
        (None, {}, 0),
    ],
)
def test_the_bound_is_the_least_of_the_control_groups(
    tmp_path: Path, group: str | None, files: dict[str, str], bound: int
) -> None:
    if group is not None:
        files = files | {"proc/self/cgroup": group + "\n"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cgroup_bound(tmp_path) == bound


def world_at(use: float) -> World:
    """A proxy whose memory is so full, at its next sweep."""
    world = World("a")
    world.runtime.pressure.memory = FakeMemory(round(use * 1000))
    return world


def test_from_92_percent_idle_connections_go_and_others_end_with_their_answer() -> None:
    world = world_at(0.925)
    idle, asking = Peer(world), Peer(world)
    asking.send(request())
    world.runtime.sweep(0.0)
    assert idle.transport.is_closing()
    assert not asking.transport.is_closing()
    later = Peer(world)
    later.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    assert later.statuses == [200]
    assert b"connection: close" in later.transport.written


def test_from_95_percent_requests_are_refused_at_once_and_it_is_not_ready() -> None:
    world = world_at(0.955)
    world.runtime.sweep(0.0)
    assert unready(world.runtime) == "memory runs short"
    peer = Peer(world)
    peer.send(request()[:-3])  # the rest of its body is not waited for
    assert peer.statuses == [503]
    assert b"retry-after: 2\r\n" in peer.transport.written
    assert b"overloaded" in peer.transport.written
    world.runtime.pressure.close()
    world.runtime.sweep(1.0)
    assert unready(world.runtime) == ""
    Peer(world).send(request())
    assert len(world.runtime.exchanges) == 1


def test_from_98_percent_connections_are_closed_unread() -> None:
    world = world_at(0.985)
    world.runtime.sweep(0.0)
    connection, transport = ClientConnection(world.runtime), FakeTransport()
    connection.connection_made(transport)
    assert transport.is_closing()
    assert connection not in world.runtime.clients
    assert transport.written == b""


def test_full_of_bodies_it_serves_who_needs_no_room_for_one() -> None:
    world = World("a")
    world.runtime.body_bytes = world.runtime.most_bodies_bytes
    world.runtime.sweep(0.0)
    assert unready(world.runtime) == ""
    peer = Peer(world)
    peer.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    assert peer.statuses == [200]
    large = Peer(world)
    large.send(request())
    assert large.statuses == [503]
    assert b"too many large requests" in large.transport.written
