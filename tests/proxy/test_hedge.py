"""Second attempts for late first tokens, driven by hand: who wins, what it costs, and what is left of the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pytest

from policies.base import BackendView, Decision, Finished, Policy, RequestFacts
from policies.files import KnownNames, read_policy
from policies.hedging import LEAST_SAMPLES
from proxy.access.keys import Key
from proxy.exchange import Exchange, State
from proxy.upstream import BackendConnection
from tests.proxy.endpoint_samples import SAMPLES, named, response
from tests.proxy.fakes import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    World,
    answer_body,
    chunked,
    client_of,
    close,
    error_event,
    event,
    read,
    transport_of,
    whole,
)

BEGINNING = STREAM_HEAD + chunked(event("one", completion=1))
END = chunked(event("two", completion=2), DONE) + LAST_CHUNK


def hedging_world(*names: str, ratio: float = 1.0, after: str = "1s", **config: Any) -> World:
    return World(*(names or ("a", "b")), hedging={"after": after, "ratio": ratio}, **config)


def late(world: World, **options: Any) -> Exchange:
    """A request that was sent to `a` and whose first token is late: a second attempt is being made."""
    exchange = world.start(**options)
    world.answers(exchange, "a")
    world.wait(1.0)
    world.check()
    return exchange


def both(world: World, **options: Any) -> tuple[Exchange, BackendConnection, BackendConnection]:
    """The same, with `b` connected too."""
    exchange = late(world, **options)
    first = exchange.connection
    assert first is not None
    second = world.connects("b")
    world.check()
    return exchange, first, second


# Who is first


def test_the_second_attempt_wins_and_the_first_is_aborted_and_metered_as_overhead() -> None:
    world = hedging_world()
    exchange, first, second = both(world)
    assert (
        transport_of(first).written.partition(b"\r\n\r\n")[2]
        == (transport_of(second).written.partition(b"\r\n\r\n")[2])
    )
    second.data_received(BEGINNING)
    assert transport_of(first).aborted
    assert world.backend("a").in_flight == 0
    world.check()
    second.data_received(END)
    found, row = read(exchange), exchange.row
    assert (found.text, found.done, found.fields["x-tidegate-backend"]) == ("onetwo", True, "b")
    assert (row.outcome, row.backend, row.site, row.attempts, row.hedge) == ("ok", "b", "away", 2, "won at b")
    assert (row.prompt_tokens, row.completion_tokens) == (7, 2)
    assert (row.overhead_prompt_tokens, row.overhead_completion_tokens) == (7, 0)
    assert row.cost_nano == 11_000
    assert (world.backend("a").ok, world.backend("a").failed, world.backend("a").ignored) == (0, 0, 1)
    assert world.backend("a").ttft_s == pytest.approx(1.0)  # so long at least
    assert world.runtime.observer.hedges == {"won": 1}
    assert world.journal.opened == [row, row]  # a crash knows where it was
    world.check()


def test_the_first_attempt_wins_and_the_second_is_aborted_and_metered_as_overhead() -> None:
    world = hedging_world()
    exchange, first, second = both(world)
    first.data_received(BEGINNING)
    assert transport_of(second).aborted
    world.check()
    assert world.backend("b").in_flight == 0
    first.data_received(END)
    row = exchange.row
    assert (row.outcome, row.backend, row.attempts, row.hedge) == ("ok", "a", 2, "lost at b")
    assert (row.prompt_tokens, row.completion_tokens, row.overhead_prompt_tokens) == (7, 2, 7)
    assert (world.backend("b").ok, world.backend("b").failed, world.backend("b").ignored) == (0, 0, 1)
    assert world.runtime.observer.hedges == {"lost": 1}
    world.check()


def test_an_attempt_that_was_never_sent_wasted_nothing() -> None:
    world = hedging_world()
    exchange = late(world)
    assert world.dialled() == ["b"]
    assert exchange.connection is not None
    exchange.connection.data_received(BEGINNING + END)
    assert (exchange.row.hedge, exchange.row.overhead_prompt_tokens) == ("lost at b", 0)
    assert world.dialled() == []
    world = hedging_world()
    exchange = world.start()  # `a` takes no connection
    world.wait(1.0)
    world.connects("b").data_received(BEGINNING + END)
    assert (exchange.row.hedge, exchange.row.overhead_prompt_tokens) == ("won at b", 0)
    assert world.dialled() == []
    world.check()


def test_an_answer_that_comes_in_one_piece_may_win() -> None:
    world = hedging_world()
    exchange, _, second = both(world)
    second.data_received(BEGINNING + END)
    assert (read(exchange).text, exchange.row.outcome, exchange.row.completion_tokens) == ("onetwo", "ok", 2)
    assert len(world.endpoints["b"].pool) == 1
    world.check()


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_how_the_winning_bytes_are_cut_makes_no_difference(size: int) -> None:
    world = hedging_world()
    exchange, _, second = both(world)
    answer = STREAM_HEAD + chunked(b": beat\n\n", b"data:\n\n", event("one", completion=1)) + END
    for at in range(0, len(answer), size):
        second.data_received(answer[at : at + size])
        world.check()
    assert (read(exchange).text, exchange.row.hedge) == ("onetwo", "won at b")


def test_heartbeats_and_heads_win_nothing() -> None:
    world = hedging_world()
    exchange, first, second = both(world)
    second.data_received(STREAM_HEAD + chunked(*[b": beat\n\n"] * 3))
    assert exchange.hedge is not None
    assert exchange.hedge.parts == []
    assert client_of(exchange).out == b""
    first.data_received(BEGINNING)
    assert exchange.row.hedge == "lost at b"
    world.check()


def both_asked(endpoint: str) -> tuple[World, Exchange, BackendConnection, BackendConnection, list[bytes]]:
    """The same for another endpoint, and the events that `b` has sent, of which none says anything yet."""
    sample, world = SAMPLES[endpoint], hedging_world()
    raw = orjson.dumps({"model": "m", "stream": True, **sample.body})
    exchange, first, second = both(world, endpoint=endpoint, raw=raw)
    prelude = sample.events[: sample.begin]
    second.data_received(STREAM_HEAD + chunked(*prelude, b": beat\n\n"))
    assert prelude
    assert exchange.connection is first
    assert not first.closed
    world.check()
    return world, exchange, first, second, prelude


withholding = pytest.mark.parametrize("endpoint", ["responses", "messages"])


@withholding
def test_events_that_say_nothing_yet_win_nothing_and_are_not_lost(endpoint: str) -> None:
    world, exchange, first, second, prelude = both_asked(endpoint)
    assert exchange.hedge is not None
    assert exchange.hedge.parts == prelude
    events = SAMPLES[endpoint].events
    second.data_received(chunked(*events[len(prelude) :]) + LAST_CHUNK)
    assert first.closed
    assert read(exchange).body == b"".join(events)
    row = exchange.row
    assert (row.hedge, row.outcome, row.completion_tokens) == ("won at b", "ok", SAMPLES[endpoint].tokens[2])
    world.check()


@withholding
def test_when_the_first_fails_behind_them_they_are_not_lost_either(endpoint: str) -> None:
    world, exchange, first, second, prelude = both_asked(endpoint)
    close(first)
    assert exchange.connection is second
    assert client_of(exchange).out == b""
    events = SAMPLES[endpoint].events
    second.data_received(chunked(*events[len(prelude) :]) + LAST_CHUNK)
    assert read(exchange).body == b"".join(events)
    world.check()


@pytest.mark.parametrize(
    ("endpoint", "error"),
    [
        ("responses", named("error", message="engine died")),
        ("responses", named("response.failed", response=response("failed", usage=None))),
        ("messages", named("error", error={"type": "api_error", "message": "engine died"})),
    ],
)
def test_an_error_in_the_shape_of_its_endpoint_wins_nothing(endpoint: str, error: bytes) -> None:
    world, exchange, first, second, _ = both_asked(endpoint)
    second.data_received(chunked(error))
    assert (exchange.row.hedge, world.backend("b").failed) == ("failed at b", 1)
    first.data_received(STREAM_HEAD + chunked(*SAMPLES[endpoint].events) + LAST_CHUNK)
    assert (exchange.row.outcome, exchange.row.backend) == ("ok", "a")
    world.check()


def test_of_two_that_answer_in_the_same_turn_the_first_to_be_read_wins() -> None:
    for order in (0, 1):
        world = hedging_world()
        exchange, *connections = both(world)
        winner, loser = connections[order], connections[1 - order]
        winner.data_received(BEGINNING)
        assert loser.closed
        loser.data_received(BEGINNING)  # what the socket still held
        winner.data_received(END)
        assert (read(exchange).text, exchange.row.completion_tokens) == ("onetwo", 2)
        world.check()


# One of the two fails


def test_when_the_first_fails_the_second_goes_on_alone() -> None:
    world = hedging_world("a", "b", "c")
    exchange, first, second = both(world)
    second.data_received(STREAM_HEAD)
    close(first)
    assert exchange.connection is second
    world.check()
    second.data_received(chunked(event("one", completion=1)) + END)
    row = exchange.row
    assert (read(exchange).text, row.hedge, row.attempts) == ("onetwo", "won at b", 2)
    assert row.overhead_prompt_tokens == 0  # it has failed by itself, and reported nothing
    assert world.backend("a").failed == 1
    world.check()


def test_when_the_first_fails_while_the_second_connects_it_goes_on_alone() -> None:
    world = hedging_world()
    exchange = late(world)
    assert exchange.connection is not None
    exchange.connection.data_received(whole(500, b"{}"))
    assert (exchange.state, world.dialled()) == (State.CONNECTING, ["b"])
    world.answers(exchange, "b").data_received(BEGINNING + END)
    assert (read(exchange).text, exchange.row.attempts) == ("onetwo", 2)
    world.check()


@pytest.mark.parametrize(
    ("reply", "failed"),
    [
        (whole(500, b"{}"), 1),
        (whole(429, b"{}", b"retry-after: 3"), 0),
        (whole(400, b"{}"), 0),
        (whole(200, answer_body()), 0),
        (STREAM_HEAD + chunked(error_event()), 1),
        (STREAM_HEAD + LAST_CHUNK, 1),
        (b"\x00garbage\r\n\r\n", 1),
        (b"", 1),
    ],
)
def test_when_the_second_fails_nobody_notices(reply: bytes, failed: int) -> None:
    world = hedging_world("a", "b", "c")
    exchange, first, second = both(world)
    if reply:
        second.data_received(reply)
    else:
        close(second)
    world.check()
    assert exchange.connection is first
    assert (exchange.row.hedge, world.backend("b").failed) == ("failed at b", failed)
    first.data_received(BEGINNING + END)
    assert (read(exchange).text, exchange.row.backend, exchange.row.outcome) == ("onetwo", "a", "ok")
    world.check()


def test_a_backend_that_has_failed_as_the_second_is_not_tried_again() -> None:
    world = hedging_world("a", "b", "c")
    exchange, first, _ = both(world)
    close(world.endpoints["b"].connections[0])
    close(first)
    assert world.dialled() == ["c"]
    world.answers(exchange, "c").data_received(BEGINNING + END)
    assert exchange.row.attempts == 3
    world.check()


def test_a_second_attempt_that_cannot_connect_costs_nothing() -> None:
    world = hedging_world()
    exchange = late(world)
    world.refuses("b")
    assert (exchange.row.hedge, world.backend("b").failed) == ("failed at b", 1)
    world.check()


def test_a_winner_that_fails_afterwards_cuts_the_stream_once() -> None:
    world = hedging_world("a", "b", "c")
    exchange, _, second = both(world)
    second.data_received(BEGINNING)
    close(second)
    assert read(exchange).errors == ["backend_reset"]
    assert (exchange.row.outcome, exchange.row.completion_tokens) == ("cut", 1)
    assert world.dialled() == []
    world.check()


def test_a_winner_whose_connection_is_stale_is_dialled_anew() -> None:
    world = hedging_world()
    before = world.start()
    close(world.answers(before, "a"))
    world.answers(before, "b").data_received(BEGINNING + END)
    assert len(world.endpoints["b"].pool) == 1
    exchange = late(world)
    close(world.endpoints["b"].connections[0])
    assert world.dialled() == ["b"]
    world.connects("b").data_received(BEGINNING + END)
    assert (exchange.row.hedge, world.backend("b").failed) == ("won at b", 0)
    world.check()


def test_both_silent_is_a_timeout_of_each_and_then_an_error() -> None:
    world = hedging_world(timeouts={"first_token": 20})
    exchange, _, second = both(world)
    world.wait(19.5)
    assert exchange.connection is second
    world.check()
    world.wait(1.0)
    assert (read(exchange).status, read(exchange).error["code"]) == (504, "backend_timeout")
    world.check()


# The end of the request


@pytest.mark.parametrize("how", ["leave", "stop", "total"])
def test_the_end_of_the_request_ends_both(how: str) -> None:
    world = hedging_world(timeouts={"total": 10})
    exchange, first, second = both(world)
    if how == "leave":
        exchange.client_gone()
    elif how == "stop":
        exchange.stop()
    else:
        world.wait(10.0)
    assert exchange.state is State.ENDED
    assert transport_of(first).aborted
    assert transport_of(second).aborted
    assert exchange.row.hedge == "lost at b"
    assert exchange.row.overhead_prompt_tokens == exchange.facts.prompt_tokens  # type: ignore[union-attr]
    world.check()


def test_a_reload_between_the_two_changes_nothing_for_them() -> None:
    world = hedging_world()
    exchange, _, second = both(world)
    built = world.runtime.built
    built.config = built.config.model_copy(
        update={"hedging": built.config.hedging.model_copy(update={"after": "off"})}
    )
    world.runtime.use(built)
    world.runtime.valve.swap(built.policy.rules, world.loop.now)
    assert world.runtime.hedging is None
    second.data_received(BEGINNING + END)
    assert (read(exchange).text, exchange.row.hedge) == ("onetwo", "won at b")
    assert world.start().hedge is None
    world.check()


def test_a_backend_that_a_reload_removed_may_still_win_or_fail() -> None:
    for reply in (BEGINNING + END, whole(429, b"{}")):
        world = hedging_world()
        exchange, first, second = both(world)
        world.runtime.fleet.replace([world.backend("a")])
        second.data_received(reply)
        if exchange.state is not State.ENDED:
            first.data_received(BEGINNING + END)
        assert read(exchange).text == "onetwo"


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("how", ["wins", "alone"])
def test_an_attempt_at_a_backend_that_a_reload_removed_goes_on(how: str, connected: bool) -> None:
    world = hedging_world()
    exchange = late(world)
    first, second = exchange.connection, world.connects("b") if connected else None
    assert first is not None
    world.runtime.fleet.replace([world.backend("a")])
    world.runtime.endpoints = {"a": world.endpoints["a"]}
    if how == "alone":
        world.wait(world.runtime.timeouts.first_token)
        assert first.closed
        assert exchange.row.backend == "b"
    if second is None:
        second = world.connects("b")
    second.data_received(BEGINNING + END)
    assert (read(exchange).text, exchange.row.outcome, exchange.row.backend) == ("onetwo", "ok", "b")


def test_a_bug_in_connecting_the_second_costs_nobody_anything(caplog: pytest.LogCaptureFixture) -> None:
    world = hedging_world()
    exchange = late(world)
    first = exchange.connection
    assert first is not None
    world.refuses("b", ZeroDivisionError())
    assert "connecting to b" in caplog.text
    assert (exchange.row.hedge, world.backend("b").failed, world.backend("b").ignored) == (
        "failed at b",
        0,
        1,
    )
    first.data_received(BEGINNING + END)
    assert read(exchange).text == "onetwo"
    world.check()


def test_a_client_that_does_not_read_slows_the_second_attempt_too() -> None:
    world = hedging_world()
    exchange, first, second = both(world)
    exchange.block()
    close(first)
    assert exchange.connection is second
    assert not transport_of(second).reading
    exchange.unblock()
    assert transport_of(second).reading
    second.data_received(BEGINNING + END)
    assert read(exchange).text == "onetwo"
    world.check()


# When there is none


def test_there_is_none_without_configuration() -> None:
    world = World("a", "b")
    exchange = world.start()
    world.answers(exchange, "a")
    world.wait(100.0)
    assert (exchange.hedge, exchange.row.attempts, world.dialled()) == (None, 1, [])


def test_there_is_none_after_the_first_token_or_the_end() -> None:
    world = hedging_world()
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    assert not [timer for timer in world.loop.timers if not timer.cancelled]
    world.wait(5.0)
    connection.data_received(END)
    assert (exchange.row.hedge, exchange.row.attempts) == ("", 1)
    gone = world.start()
    gone.client_gone()
    assert not [timer for timer in world.loop.timers if not timer.cancelled]


def test_there_is_none_for_an_answer_that_is_no_stream() -> None:
    world = hedging_world()
    exchange = world.start(stream=False)
    world.answers(exchange, "a")
    world.wait(5.0)
    assert (exchange.row.attempts, world.dialled()) == (1, [])


def test_there_is_one_at_most() -> None:
    world = hedging_world("a", "b", "c")
    exchange, _, second = both(world)
    close(second)
    world.wait(5.0)
    assert (exchange.row.attempts, world.dialled()) == (2, [])


def test_there_is_none_where_the_data_class_forbids_it() -> None:
    world = hedging_world(key=Key("k", "acme", data_class="secret"))  # `b` is away, and may see public data
    exchange = world.start()
    world.answers(exchange, "a")
    world.wait(5.0)
    assert (exchange.row.attempts, world.dialled()) == (1, [])


def test_there_is_none_where_nobody_has_a_free_slot_or_others_wait() -> None:
    world = hedging_world(slots=1)
    on_a, on_b = world.start(), world.start()
    world.answers(on_a, "a")
    world.answers(on_b, "b")
    world.wait(1.0)
    assert (on_a.row.attempts, on_b.row.attempts) == (1, 1)  # no slot is free
    world = hedging_world(slots=1)
    on_a, on_b, held = world.start(), world.start(), world.start()
    world.answers(on_a, "a")
    world.relaying(on_b, "b")
    assert held.state is State.HELD
    world.backend("b").full_slots = world.backend("b").slots = 2  # a slot is free, the valve not yet asked
    world.loop.now += 1.0
    world.loop.run_due()
    assert (on_a.row.attempts, held.row.attempts) == (1, 0)
    world.wait(0.0)
    assert held.row.attempts == 1
    world.check()


def test_attempts_of_a_request_are_limited_over_both_kinds() -> None:
    world = hedging_world("a", "b", "c", retries={"attempts": 1})
    exchange = world.start()
    world.answers(exchange, "a")
    world.wait(5.0)
    assert (exchange.row.attempts, world.dialled()) == (1, [])


def test_second_attempts_are_budgeted_over_all_requests() -> None:
    world = hedging_world(ratio=0.1)
    for count, hedged in ((7, 0), (3, 1)):
        for _ in range(count):
            world.start()
        world.wait(1.0)
        assert sum(exchange.row.attempts == 2 for exchange in world.all) == hedged
    assert world.runtime.hedging is not None
    assert world.runtime.hedging.refused == 9
    world.check()


def test_late_is_learnt_from_first_tokens() -> None:
    world = hedging_world(after="p95")
    for number in range(LEAST_SAMPLES):
        exchange = world.start()
        if exchange.state is State.CONNECTING:
            world.connects("a")
        world.loop.now += 0.5 if number else 2.0
        assert exchange.connection is not None
        exchange.connection.data_received(BEGINNING + END)
    world.loop.now += 10.0
    exchange = world.start()
    world.wait(0.49)
    assert exchange.row.attempts == 1
    world.wait(0.02)
    assert exchange.row.attempts == 2
    world.check()


def test_nothing_is_sent_before_the_journal_has_it() -> None:
    world = hedging_world(durability="strict")
    exchange = world.start()
    world.wait(5.0)
    assert (exchange.row.attempts, world.dialled()) == (1, [])
    world.syncs()
    world.wait(1.0)
    assert world.dialled() == ["a", "b"]
    world.check()


def test_it_is_explained() -> None:
    world = hedging_world()
    exchange, _, second = both(world)
    second.data_received(BEGINNING + END)
    record = world.runtime.observer.find(exchange.id)
    assert record is not None
    shown = record.explain()
    assert (shown["hedge"], shown["overhead_prompt_tokens"]) == ("won at b", 7)
    assert [(d["backend"], d["decided_by"]) for d in shown["decisions"]] == [
        ("a", "least-load"),
        ("b", "hedge"),
    ]
    assert shown["decisions"][1]["reason"].startswith("first token late")


class Hearing(Policy):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        raise NotImplementedError

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.heard.append(f"dispatched to {backend.name}")

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.heard.append(f"first token of {backend.name}")

    def finished(self, finished: Finished) -> None:
        self.heard.append(f"finished at {finished.backend}")


@pytest.mark.parametrize("wins", [True, False])
def test_a_policy_hears_of_a_second_attempt_only_if_it_has_won(wins: bool) -> None:
    world = hedging_world()
    exchange, first, second = both(world)
    assert exchange.hedge is not None
    assert exchange.hedge.lease is not None
    assert exchange.hedge.lease.policy is None
    hearing = exchange.routings[1].policy = Hearing()
    (second if wins else first).data_received(BEGINNING + END)
    expected = ["dispatched to b", "first token of b", "finished at b"]
    assert hearing.heard == (expected if wins else [])


def test_a_tier_that_lets_its_engines_queue_takes_no_second_attempt_beyond_its_slots() -> None:
    spill = '{site: "*", spill: {enter: 3.0, leave: 2.0}}'
    text = f"rules: [{{name: all, prefer: [{{site: local}}, {spill}], pick: least-load}}]"
    for full in (True, False):
        world = hedging_world(slots=1)
        known = KnownNames(world.runtime.built.backends, frozenset({"away"}))
        world.runtime.valve.swap(read_policy(text, "test", known, 0).rules, world.loop.now)
        exchange, on_b = world.start(), world.start()
        world.relaying(on_b, "b")
        world.answers(exchange, "a")
        if not full:
            on_b.client_gone()
        world.wait(1.0)
        assert exchange.row.attempts == (1 if full else 2)


@pytest.mark.parametrize("winner", ["a", "b", ""])
def test_what_has_ended_does_not_wait_for_the_garbage_collector(winner: str) -> None:
    """Exchange and second attempt know each other; in a cycle they would fill the memory between collections."""
    world = hedging_world()
    if winner:
        exchange, first, second = both(world)
        (first if winner == "a" else second).data_received(BEGINNING + END)
    else:
        exchange = world.start()
        world.answers(exchange, "a")
        assert exchange.connection is not None
        exchange.connection.data_received(BEGINNING + END)
    assert exchange.state is State.ENDED
    assert exchange.hedge is None
