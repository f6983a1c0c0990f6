"""Who has to go when there are as many connections as there may be."""

from __future__ import annotations

from proxy.room import AT_ONCE, PAUSE_S
from proxy.server import MOST_REFUSED
from tests.proxy.fakes import World, answer_body, whole
from tests.proxy.test_server import Peer, request


def served(world: World) -> Peer:
    """A connection that has had an answer and stays open."""
    peer = Peer(world)
    peer.send(request())
    for name in world.dialled():
        world.connects(name)
    world.endpoints["a"].connections[-1].data_received(whole(200, answer_body()))
    assert (peer.statuses, peer.transport.closed) == ([200], False)
    return peer


def busy(world: World) -> Peer:
    peer = Peer(world)
    peer.send(b"POST")
    return peer


def closed(peers: list[Peer]) -> list[bool]:
    return [peer.transport.closed for peer in peers]


def test_silent_connections_go_before_those_that_were_served_and_the_oldest_first() -> None:
    world = World("a", limits={"connections": 4})
    old = served(world)
    silent = []
    for _ in range(2):
        world.loop.now += 1.0
        silent.append(Peer(world))
    working = busy(world)
    everybody = [old, *silent, working]
    for gone in ([0, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]):
        newcomer = busy(world)
        assert newcomer.statuses == []
        assert closed(everybody) == [bool(one) for one in gone]
        assert len(world.runtime.clients) == 4
    assert busy(world).statuses == [503]
    assert not working.transport.closed


def test_many_go_at_once_so_that_a_flood_looks_at_few() -> None:
    world = World("a", limits={"connections": 10 * AT_ONCE})
    flood = []
    for _ in range(10 * AT_ONCE):
        world.loop.now += 0.001
        flood.append(Peer(world))
    Peer(world)
    assert closed(flood) == [True] * 10 + [False] * (len(flood) - 10)


def test_an_answer_that_its_client_has_not_read_is_not_lost() -> None:
    world = World("a", limits={"connections": 1})
    peer = served(world)
    peer.transport.unread = 1
    assert busy(world).statuses == [503]
    assert not peer.transport.closed


def test_where_nobody_can_go_nobody_is_looked_for_again_at_once() -> None:
    world = World("a", limits={"connections": 1})
    first = busy(world)
    assert busy(world).statuses == [503]
    first.connection.partial = None  # idle now
    assert busy(world).statuses == [503]
    assert not first.transport.closed
    world.loop.now += PAUSE_S
    assert busy(world).statuses == []
    assert first.transport.closed


def test_of_those_that_are_refused_some_are_told_and_the_rest_cut_off() -> None:
    world = World("a", limits={"connections": 1})
    busy(world)
    refused = [Peer(world) for _ in range(MOST_REFUSED)]
    assert all(peer.statuses == [503] for peer in refused)
    more = Peer(world)
    assert more.transport.aborted
    assert more.statuses == []
    for peer in [*refused, more]:
        peer.connection.connection_lost(None)
    assert len(world.runtime.clients) == 1
