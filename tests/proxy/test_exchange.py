"""One exchange at a time, driven by hand: every ending, and what each leaves behind."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import orjson
import pytest

from policies.match import Selector
from probes.passive import tried_elsewhere
from proxy.access.keys import Key
from proxy.exchange import MOVES, Exchange, State
from proxy.relay import WHOLE_ANSWER_BYTES
from proxy.sse import MAX_EVENT_BYTES
from tests.proxy.fakes import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    UNTIL_CLOSE_HEAD,
    World,
    answer_body,
    chunked,
    client_of,
    close,
    error_event,
    event,
    read,
    transport_of,
    usage_event,
    whole,
)

RESET = ConnectionResetError(104, "Connection reset by peer")


def end_well(world: World, exchange: Exchange) -> None:
    """Its backend, connected already, answers completely."""
    connection = exchange.connection
    assert connection is not None
    connection.data_received(STREAM_HEAD + chunked(event("x", completion=1), DONE) + LAST_CHUNK)
    assert exchange.state is State.ENDED


def outcomes(world: World, name: str) -> tuple[int, int, int]:
    backend = world.backend(name)
    return backend.ok, backend.failed, backend.ignored


# The table


@pytest.mark.parametrize("start", State)
@pytest.mark.parametrize("to", State)
def test_only_moves_of_the_table_are_made(start: State, to: State) -> None:
    exchange = World("a").start()
    exchange.state = start
    if to in MOVES[start]:
        exchange._move(to)
        assert exchange.state is to
    else:
        with pytest.raises(RuntimeError, match=f"cannot become {to.value}"):
            exchange._move(to)
        assert exchange.state is start


def test_every_move_of_the_table_is_made_by_something(monkeypatch: pytest.MonkeyPatch) -> None:
    made: set[tuple[State, State]] = set()
    move = Exchange._move

    def noted(exchange: Exchange, to: State) -> None:
        made.add((exchange.state, to))
        move(exchange, to)

    monkeypatch.setattr(Exchange, "_move", noted)
    world = World("a", "b", slots=1)
    world.start(raw=b"{")  # received -> ended
    first = world.start()  # received -> connecting
    world.refuses("a")  # connecting -> connecting
    world.connects("b")  # connecting -> sent -> relaying -> ended
    end_well(world, first)
    first, second = world.start(), world.start()  # a new connection; received -> sent on the pooled one of b
    third, fourth, fifth = world.start(), world.start(), world.start()  # received -> held
    fifth.client_gone()  # held -> ended
    end_well(world, second)  # held -> sent, on the connection of `second`
    assert third.state is State.SENT
    world.connects("a")
    transport_of(world.endpoints["a"].connections[0]).closed = True
    end_well(world, first)
    close(world.endpoints["a"].connections[0])
    assert fourth.state is State.CONNECTING  # held -> connecting
    fourth.client_gone()  # connecting -> ended
    third.client_gone()  # sent -> ended
    world.check()

    world = World("a", "b")
    first = world.start()
    world.connects("a")
    end_well(world, first)
    second = world.start(stream=False)
    assert second.state is State.SENT
    close(world.endpoints["a"].connections[0])  # sent -> connecting: it had been idle too long
    world.connects("a").data_received(whole(500, b"{}"))  # sent -> connecting: to b
    world.connects("b").data_received(whole(200, answer_body()))
    third = world.start()
    world.endpoints["a"].pool.take()
    assert third.state is State.SENT
    assert third.connection is not None
    third.connection.data_received(whole(500, b"{}"))  # sent -> sent: pooled one of b
    assert third.state is State.SENT
    world.check()
    assert made == {(start, to) for start, ends in MOVES.items() for to in ends}


# Endings that are complete


def test_a_stream_is_relayed_and_everything_is_settled() -> None:
    key = Key("k", "acme", tpm=1000, rpm=10, concurrency=2)
    world = World("a", key=key)
    exchange = world.start(max_tokens=20)
    world.check()
    world.loop.now += 0.5
    reserved = world.runtime.limits.usage(key, 0.0).tokens.total
    assert reserved > 20
    connection = world.answers(exchange, "a")
    connection.data_received(STREAM_HEAD)
    assert client_of(exchange).out == b""  # the head is withheld
    connection.data_received(chunked(event("one", completion=1)))
    world.check()
    assert read(exchange).text == "one"
    world.loop.now += 0.25
    connection.data_received(chunked(event("two", completion=2), usage_event(7, 2), DONE) + LAST_CHUNK)
    found = read(exchange)
    assert (found.status, found.text, found.done, found.complete) == (200, "onetwo", True, True)
    assert b"usage" not in found.body  # nobody asked for it
    assert found.fields["x-tidegate-backend"] == "a"
    assert found.fields["x-request-id"] == exchange.row.op
    assert found.fields["x-ratelimit-limit-tokens"] == "1000"
    row = exchange.row
    assert (row.outcome, row.status, row.usage_source) == ("ok", 200, "reported")
    assert (row.prompt_tokens, row.completion_tokens, row.cost_nano) == (7, 2, 11_000)
    assert world.runtime.limits.usage(key, 0.0).tokens.total == 9
    assert (row.ttft_s, world.backend("a").ttft_s, row.total_s) == (0.5, 0.5, 0.75)
    assert outcomes(world, "a") == (1, 0, 0)
    assert world.endpoints["a"].pool.take() is connection
    world.check()


def test_a_client_that_asked_for_usage_gets_it_once() -> None:
    world = World("a")
    exchange = world.start(stream_options={"include_usage": True})
    connection = world.answers(exchange, "a")
    stream = [event("one", completion=1), event("two", completion=2), usage_event(7, 2), DONE]
    connection.data_received(STREAM_HEAD + chunked(*stream) + LAST_CHUNK)
    assert [b'"usage"' in data for data in read(exchange).events] == [False, False, True, False]
    assert exchange.row.completion_tokens == 2


def test_an_answer_that_is_no_stream_is_passed_on_when_it_is_complete() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    body = answer_body(11, 3)
    reply = whole(200, body, b"etag: x")
    connection.data_received(reply[:-10])
    assert client_of(exchange).out == b""
    connection.data_received(reply[-10:])
    found = read(exchange)
    assert (found.status, found.body, found.fields["etag"]) == (200, body, "x")
    assert (exchange.row.prompt_tokens, exchange.row.completion_tokens) == (11, 3)
    assert client_of(exchange).ended == "keep"
    world.check()


def test_an_answer_too_large_to_keep_is_passed_on_as_it_comes() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    body = b'{"data":"' + b"x" * (WHOLE_ANSWER_BYTES + 10) + b'"}'
    reply = whole(200, body)
    connection.data_received(reply[:-5])
    assert exchange.state is State.RELAYING
    connection.data_received(reply[-5:])
    found = read(exchange)
    assert (found.body, found.complete) == (body, True)
    world.check()


def test_a_large_error_is_passed_on_and_counted_as_one() -> None:
    world = World("a", "b")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    reply = whole(500, b"x" * (WHOLE_ANSWER_BYTES + 10))
    connection.data_received(reply[:-5])
    connection.data_received(reply[-5:])
    found = read(exchange)
    assert (found.status, found.complete) == (500, True)
    assert (exchange.row.outcome, exchange.row.status) == ("backend_failed", 500)
    assert outcomes(world, "a") == (0, 1, 0)
    world.check()


def test_an_answer_too_large_to_keep_is_metered_from_its_end() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    body = answer_body(7, 400).replace(b"hello", b"x" * (WHOLE_ANSWER_BYTES + 10))
    world.answers(exchange, "a").data_received(whole(200, body))
    row = exchange.row
    assert read(exchange).body == body
    assert (row.prompt_tokens, row.completion_tokens, row.usage_source) == (7, 400, "reported")


@pytest.mark.parametrize("started", [False, True])
def test_an_error_event_that_is_the_clients_own_fault_blames_no_backend(started: bool) -> None:
    """vLLM says 200 first, and finds some faults of a request only then."""
    world = World("a", "b")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(STREAM_HEAD)
    if started:
        connection.data_received(chunked(event("x", completion=1)))
    fault = error_event("too hot").replace(b'"code":500', b'"code":400')
    connection.data_received(chunked(fault, DONE) + LAST_CHUNK)
    found = read(exchange)
    if started:
        assert (found.errors, found.done) == ([400], False)
    else:
        assert (found.status, found.error["message"], exchange.row.outcome) == (
            400,
            "too hot",
            "client_error",
        )
    assert exchange.row.attempts == 1
    assert outcomes(world, "a") == (0, 0, 1)
    world.check()


def test_limits_set_aside_what_the_client_asks_for() -> None:
    key = Key("k", "acme", tpm=1000)
    world = World("a", key=key)
    world.start(max_tokens=300, n=3)
    found = read(world.start(max_tokens=300, n=3))
    assert (found.status, found.error["code"]) == (429, "rate_limit_tokens")
    assert read(world.start(max_tokens=2000)).status == 429


def test_a_connection_with_unsent_bytes_of_a_request_is_not_used_again() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    transport_of(connection).unread = 10
    connection.data_received(whole(400, b"{}"))
    assert exchange.state is State.ENDED
    assert len(world.endpoints["a"].pool) == 0


def test_a_large_answer_that_breaks_off_never_looks_complete() -> None:
    world = World("a", "b")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    connection.data_received(whole(200, b"x" * (WHOLE_ANSWER_BYTES + 10))[:-5])
    close(connection, RESET)
    assert client_of(exchange).ended == "abort"
    assert not read(exchange).complete
    assert (exchange.row.outcome, exchange.row.code) == ("cut", "backend_reset")
    assert outcomes(world, "a") == (0, 1, 0)
    world.check()


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_4xx_of_a_backend_is_the_clients(status: int) -> None:
    world = World("a", "b")
    exchange = world.start()
    body = b'{"error":{"message":"no"}}'
    world.answers(exchange, "a").data_received(whole(status, body))
    found = read(exchange)
    assert (found.status, found.body) == (status, body)
    assert exchange.row.outcome == "client_error"
    assert outcomes(world, "a") == (0, 0, 1)
    assert world.dialled() == []
    world.check()


def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    world = World("a")
    exchange = world.start(version=0)
    connection = world.answers(exchange, "a")
    connection.data_received(STREAM_HEAD + chunked(event("one"), DONE) + LAST_CHUNK)
    found = read(exchange)
    assert (found.text, found.done, found.fields["connection"]) == ("one", True, "close")
    assert "transfer-encoding" not in found.fields
    assert client_of(exchange).ended == "close"


def test_a_client_of_http_1_0_may_keep_its_connection_after_a_whole_answer() -> None:
    world = World("a")
    exchange = world.start(version=0, stream=False)
    world.answers(exchange, "a").data_received(whole(200, answer_body()))
    assert read(exchange).fields["connection"] == "keep-alive"
    assert client_of(exchange).ended == "keep"


# What commits, and what does not


def test_comments_and_empty_events_before_the_first_data_commit_nothing() -> None:
    world = World("a", "b")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(STREAM_HEAD + chunked(b": keep-alive\n\n", b": again\n", b"\n", b"data:\n\n"))
    assert client_of(exchange).out == b""
    close(connection, RESET)
    world.relaying(exchange, "b")
    assert read(exchange).text == "one"
    world.check()


def test_comments_do_not_put_off_the_deadline_of_the_first_token() -> None:
    world = World("a", "b", timeouts={"first_token": 10, "connect": 2})
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(STREAM_HEAD)
    for _ in range(4):
        world.wait(3.0)
        if exchange.connection is connection:
            connection.data_received(chunked(b": keep-alive\n\n"))
    assert transport_of(connection).aborted
    assert world.dialled() == ["b"]


def test_comments_within_a_stream_are_passed_on() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(b": keep-alive\n\n"))
    assert read(exchange).body.endswith(b"\n\n: keep-alive\n\n")


def test_a_first_event_too_large_to_read_is_passed_on_whole() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    huge = b'data: {"choices":[{"delta":{"audio":"' + b"x" * (MAX_EVENT_BYTES + 2_000_000) + b'"}}]}\n\n'
    connection.data_received(STREAM_HEAD)
    for start in range(0, len(huge), 1_000_000):
        connection.data_received(chunked(huge[start : start + 1_000_000]))
    connection.data_received(chunked(DONE) + LAST_CHUNK)
    found = read(exchange)
    assert found.body == huge + DONE
    assert found.complete
    world.check()


def test_a_stream_of_nothing_but_done_is_no_answer() -> None:
    world = World("a", "b")
    exchange = world.start()
    world.answers(exchange, "a").data_received(STREAM_HEAD + chunked(DONE) + LAST_CHUNK)
    assert client_of(exchange).out == b""
    world.relaying(exchange, "b")
    world.check()


# Failing before the first data event


def test_a_stale_connection_costs_one_retry_on_a_fresh_one_and_no_blame() -> None:
    world = World("a", "b")
    first = world.start()
    world.connects("a")
    end_well(world, first)
    second = world.start()
    stale = second.connection
    assert stale is world.endpoints["a"].connections[0]
    close(stale)
    assert world.dialled() == ["a"]
    fresh = world.answers(second, "a")
    assert transport_of(fresh).written == transport_of(stale).written[len(transport_of(stale).written) // 2 :]
    assert second.row.attempts == 1
    close(fresh)  # a fresh connection has no such excuse
    assert outcomes(world, "a") == (1, 1, 0)
    assert world.dialled() == ["b"]
    world.check()


def test_a_connection_that_dies_in_the_making_is_a_failure_like_others() -> None:
    world = World("a", "b")
    exchange = world.start()
    world.endpoints["a"].next_is_dead = True
    world.connects("a")
    assert world.dialled() == ["b"]
    world.relaying(exchange, "b")
    assert outcomes(world, "a") == (0, 1, 0)
    world.check()


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"", "reset"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "reset"),
        (STREAM_HEAD, "reset"),
        (STREAM_HEAD + chunked(b"data: {"), "reset"),
        (STREAM_HEAD + LAST_CHUNK, "reset"),
        (STREAM_HEAD + chunked(error_event()), "error_event"),
        (STREAM_HEAD + chunked(b": hello\n\n", error_event(), DONE) + LAST_CHUNK, "error_event"),
        (STREAM_HEAD + b"zz\r\n", "malformed"),
        (b"SSH-2.0-OpenSSH_9\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", "malformed"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 20, "malformed"),
        (whole(200, answer_body())[:-1], "reset"),
        (UNTIL_CLOSE_HEAD.replace(b"text/event-stream", b"application/json") + b'{"id":', "reset"),
        (whole(500, b"{}"), "500"),
        (whole(502, b"<html>"), "502"),
        (whole(503, b"{}", b"retry-after: 3"), "503"),
        (whole(429, b"{}"), "429"),
        (whole(408, b"{}"), "408"),
        (whole(401, b"{}"), "401"),
        (whole(403, b"{}"), "403"),
    ],
)
def test_a_failure_before_the_first_data_goes_to_the_next_backend(reply: bytes, kind: str) -> None:
    world = World("a", "b")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(reply) if reply else None
    if exchange.connection is connection:
        close(connection, None if b"application/json\r\n\r\n" in reply else RESET)
    assert client_of(exchange).out == b""
    assert world.dialled() == ["b"]
    assert world.runtime.observer.failed_attempts == {("a", kind): 1}
    world.check()
    end = world.relaying(exchange, "b")
    end.data_received(chunked(DONE) + LAST_CHUNK)
    row = exchange.row
    assert (row.outcome, row.backend, row.attempts) == ("ok", "b", 2)
    blameless = kind in ("503", "429", "408", "401", "403")
    assert outcomes(world, "a") == ((0, 0, 1) if blameless else (0, 1, 0))
    assert outcomes(world, "b") == (1, 0, 0)
    world.check()


@pytest.mark.parametrize("status", [200, 201, *range(300, 304), *range(305, 600)])
def test_which_statuses_go_to_the_next_backend(status: int) -> None:
    world = World("a", "b")
    exchange = world.start()
    world.answers(exchange, "a").data_received(whole(status, b"{}"))
    if tried_elsewhere(status):
        assert world.dialled() == ["b"]
    else:
        assert read(exchange).status == status
        assert exchange.row.outcome == ("ok" if status < 300 else "client_error")
        assert (exchange.row.attempts, world.backend("a").failed) == (1, 0)
    world.check()


def test_the_journal_hears_where_a_request_went_next() -> None:
    world = World("a", "b")
    exchange = world.start()
    world.refuses("a")
    assert world.journal.opened == [exchange.row, exchange.row]


def test_tokens_of_a_failed_attempt_are_overhead_and_not_billed() -> None:
    key = Key("k", "acme", budget_nano=10**9)
    world = World("a", "b", key=key)
    exchange = world.start()
    events = [usage_event(7, 3), error_event()]  # the client did not ask for usage, so none of it reaches it
    world.answers(exchange, "a").data_received(STREAM_HEAD + chunked(*events))
    connection = world.relaying(exchange, "b")
    connection.data_received(chunked(event("two", completion=2), DONE) + LAST_CHUNK)
    row = exchange.row
    assert (row.overhead_prompt_tokens, row.overhead_completion_tokens) == (7, 3)
    assert (row.prompt_tokens, row.completion_tokens, row.cost_nano) == (7, 2, 11_000)
    assert world.runtime.limits.usage(key, world.runtime.wall()).month.spent == 11_000
    world.check()


ABORTED_EVENT = event("", completion=4).replace(b'"finish_reason":null', b'"finish_reason":"abort"')


def test_a_stream_that_the_engine_aborts_is_no_complete_answer() -> None:
    """A vLLM that stops says `finish_reason: abort`, then usage and `[DONE]`, as if all were well."""
    assert b"abort" in ABORTED_EVENT
    world = World("a", "b")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(ABORTED_EVENT, usage_event(7, 4), DONE) + LAST_CHUNK)
    found = read(exchange)
    assert found.errors == ["backend_error"]
    assert not found.done
    assert (exchange.row.outcome, exchange.row.completion_tokens) == ("cut", 4)
    assert outcomes(world, "a") == (0, 1, 0)
    world.check()


def test_a_whole_answer_that_the_engine_aborted_is_tried_elsewhere() -> None:
    world = World("a", "b")
    exchange = world.start(stream=False)
    aborted = answer_body(7, 3).replace(b'"finish_reason":"stop"', b'"finish_reason":"abort"')
    assert b"abort" in aborted
    world.answers(exchange, "a").data_received(whole(200, aborted))
    world.answers(exchange, "b").data_received(whole(200, answer_body(7, 5)))
    row = exchange.row
    assert (row.outcome, row.backend, row.completion_tokens, row.overhead_completion_tokens) == (
        "ok",
        "b",
        5,
        3,
    )
    world.check()


def test_attempts_are_limited() -> None:
    world = World("a", "b", "c", "d", retries={"attempts": 3})
    exchange = world.start()
    for name in ("a", "b", "c"):
        world.refuses(name)
    found = read(exchange)
    assert (found.status, found.error["code"]) == (502, "backend_unreachable")
    assert (exchange.row.outcome, exchange.row.attempts) == ("backend_failed", 3)
    assert world.dialled() == []
    world.check()


def test_retries_are_limited_over_all_requests() -> None:
    world = World("a", "b", retries={"ratio": 0.0, "per_second": 0.1})  # one retry in ten seconds
    first, second = world.start(), world.start()
    world.refuses("a")
    world.refuses("b" if world.dialled() == ["b", "b"] else "a")
    assert sorted([first.state is State.ENDED, second.state is State.ENDED]) == [False, True]
    assert world.runtime.retry_budget.refused == 1
    world.check()


def test_a_retry_that_has_nowhere_to_go_costs_nothing() -> None:
    world = World("a")
    world.start()
    before = world.runtime.retry_budget.balance(world.loop.now)
    world.refuses("a")
    assert world.runtime.retry_budget.balance(world.loop.now) == before


def fails_unsent(world: World, exchange: Exchange) -> None:
    world.refuses("a")


def fails_at_once(world: World, exchange: Exchange) -> None:
    world.endpoints["a"].next_is_dead = True
    world.connects("a")


def fails_silently(world: World, exchange: Exchange) -> None:
    close(world.answers(exchange, "a"))


def fails_with_500(world: World, exchange: Exchange) -> None:
    world.answers(exchange, "a").data_received(whole(500, b"{}"))


def is_late(world: World, exchange: Exchange) -> None:
    world.answers(exchange, "a")
    world.wait(121.0)


@pytest.mark.parametrize(
    ("fails", "unsent"),
    [
        (fails_unsent, True),
        (fails_at_once, True),
        (fails_silently, False),
        (fails_with_500, False),
        (is_late, False),
    ],
)
def test_what_is_not_declared_idempotent_is_sent_to_one_backend_only(fails: Any, unsent: bool) -> None:
    for idempotent in (True, False):
        world = World("a", "b", retries={"idempotent": idempotent})
        exchange = world.start()
        fails(world, exchange)
        assert (world.dialled() == ["b"]) == (idempotent or unsent)
        if world.dialled():
            world.answers(exchange, "b")
            end_well(world, exchange)
        assert exchange.row.outcome == ("ok" if idempotent or unsent else "backend_failed")
        world.check()


def test_what_is_not_declared_idempotent_is_not_sent_again_on_a_new_connection() -> None:
    world = World("a", "b", retries={"idempotent": False})
    first = world.start()
    world.connects("a")
    end_well(world, first)
    second = world.start()
    close(world.endpoints["a"].connections[0])
    assert (read(second).status, read(second).error["code"]) == (502, "backend_reset")
    assert world.dialled() == []
    world.check()


def test_counting_tokens_is_idempotent_whatever_is_declared() -> None:
    world = World("a", "b", retries={"idempotent": False})
    exchange = world.start(endpoint="tokenize", stream=False)
    close(world.answers(exchange, "a"))
    assert world.dialled() == ["b"]


def test_every_request_earns_a_share_of_a_retry() -> None:
    world = World("a", "b", retries={"ratio": 0.5, "per_second": 0})
    first = world.start()
    world.refuses("a")
    assert first.state is State.ENDED
    second = world.start()
    world.refuses("a")
    assert (second.state, world.dialled()) == (State.CONNECTING, ["b"])


def test_a_refusal_names_no_address_of_a_backend() -> None:
    world = World("a")
    exchange = world.start()
    world.refuses("a", OSError(111, "Connect call failed ('10.1.2.3', 8000)"))
    assert read(exchange).error["message"] == "cannot connect to a: Connection refused"
    for error, reason in (
        (TimeoutError(), "timed out"),
        (socket.gaierror(-2, "nj.internal"), "its name was not resolved"),
        (
            ssl.SSLCertVerificationError(1, "not valid for 10.1.2.3"),
            "its certificate was refused: it cannot be verified",
        ),
        (ssl.SSLError(1, "10.1.2.3"), "TLS handshake failed"),
    ):
        world.backend("a").breaker.failures = 0
        exchange = world.start()
        world.refuses("a", error)
        assert read(exchange).error["message"] == f"cannot connect to a: {reason}"


@pytest.mark.parametrize(("status", "code"), [(401, "backend_auth"), (403, "backend_auth")])
def test_a_backend_that_refuses_our_key_is_our_trouble(status: int, code: str) -> None:
    world = World("a")
    exchange = world.start()
    world.answers(exchange, "a").data_received(whole(status, b'{"error":"your key sk-1 is wrong"}'))
    found = read(exchange)
    assert (found.status, found.error["code"]) == (502, code)
    assert b"sk-1" not in found.body


def test_the_last_backends_own_error_is_relayed_as_it_is() -> None:
    world = World("a", "b")
    exchange = world.start()
    world.answers(exchange, "a").data_received(whole(500, b'{"first":1}'))
    world.answers(exchange, "b").data_received(whole(503, b'{"second":2}', b"retry-after: 7"))
    found = read(exchange)
    assert (found.status, found.body, found.fields["retry-after"]) == (503, b'{"second":2}', "7")
    assert found.fields["x-tidegate-backend"] == "b"
    assert exchange.row.outcome == "backend_failed"
    world.check()


def test_an_earlier_error_is_told_under_the_name_of_its_backend() -> None:
    world = World("a", "b")
    exchange = world.start()
    world.answers(exchange, "a").data_received(whole(500, b'{"first":1}'))
    world.refuses("b")
    found = read(exchange)
    assert (found.status, found.body, found.fields["x-tidegate-backend"]) == (500, b'{"first":1}', "a")
    assert (exchange.row.backend, exchange.row.attempts) == ("a", 2)
    world.check()


def test_a_backend_that_says_it_is_full_gets_nothing_new_for_a_while() -> None:
    world = World("a")
    exchange = world.start()
    world.answers(exchange, "a").data_received(whole(429, b"{}", b"retry-after: 5"))
    assert read(exchange).status == 429
    refused = world.start()
    found = read(refused)
    assert (found.status, found.error["code"]) == (503, "overloaded")
    assert found.fields["retry-after"] == "5"
    world.wait(5.1)
    assert world.start().state is State.CONNECTING
    world.check()


def test_without_any_backend_left_it_is_no_backend() -> None:
    world = World("a")
    world.backend("a").probed_up = world.backend("a").connects = False
    world.runtime.fleet.refresh(world.loop.now)
    found = read(world.start())
    assert (found.status, found.error["code"]) == (503, "no_backend")
    assert "retry-after" in found.fields


def test_a_backend_that_was_configured_away_meanwhile_may_still_fail() -> None:
    world = World("a", "b")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    world.runtime.fleet.replace([world.backend("b")])
    connection.data_received(whole(429, b"{}"))
    world.relaying(exchange, "b").data_received(chunked(DONE) + LAST_CHUNK)
    assert exchange.row.outcome == "ok"


# Failing after it


@pytest.mark.parametrize("how", ["reset", "close", "malformed", "half an event", "unterminated"])
def test_a_stream_that_is_cut_ends_in_one_error_event_and_no_done(how: str) -> None:
    world = World("a", "b")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    match how:
        case "reset":
            close(connection, RESET)
        case "close":
            close(connection)
        case "malformed":
            connection.data_received(b"nonsense\r\n")
        case "half an event":
            connection.data_received(chunked(event("two", completion=2)[:-10]))
            close(connection)
        case "unterminated":  # a clean end of the message within an event
            connection.data_received(chunked(b"data: {") + LAST_CHUNK)
    found = read(exchange)
    assert (found.text, found.done, found.complete) == ("one", False, True)
    assert len(found.errors) == 1
    assert client_of(exchange).ended == "close"
    assert exchange.row.outcome == "cut"
    assert exchange.row.code == found.errors[0]
    assert exchange.row.completion_tokens == 1
    assert outcomes(world, "a") == (0, 1, 0)
    assert (world.endpoints["a"].pool.take() is None) == (how != "unterminated")
    assert world.dialled() == []
    world.check()


def test_an_error_event_of_the_backend_ends_the_stream_once() -> None:
    world = World("a", "b")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(error_event("engine died"), DONE) + LAST_CHUNK)
    found = read(exchange)
    assert (found.text, found.done, found.complete) == ("one", False, True)
    assert found.events[-1].startswith(b'{"error"')
    assert (exchange.row.outcome, exchange.row.code) == ("cut", "backend_error")
    assert outcomes(world, "a") == (0, 1, 0)
    world.check()


def test_a_stream_until_close_without_done_is_cut() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(UNTIL_CLOSE_HEAD + event("one"))
    close(connection)
    found = read(exchange)
    assert (found.text, found.done, len(found.errors)) == ("one", False, 1)
    assert exchange.row.outcome == "cut"
    world.check()


def test_a_stream_until_close_with_done_is_complete() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(UNTIL_CLOSE_HEAD + event("one") + DONE)
    close(connection)
    found = read(exchange)
    assert (found.text, found.done, found.complete) == ("one", True, True)
    assert exchange.row.outcome == "ok"
    world.check()


@pytest.mark.parametrize("how", ["reset", "malformed", "stall", "total", "more data", "stop", "client gone"])
def test_what_happens_after_done_changes_nothing(how: str) -> None:
    world = World("a", timeouts={"between_tokens": 5, "total": 20})
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(event("two", completion=2), DONE))
    match how:
        case "reset":
            close(connection, RESET)
        case "malformed":
            connection.data_received(b"nonsense\r\n")
        case "stall":
            world.wait(6.0)
            world.wait(6.0)
        case "total":
            world.wait(21.0)
        case "more data":
            connection.data_received(chunked(event("three", completion=3), DONE))
        case "stop":
            exchange.stop()
        case "client gone":
            exchange.client_gone()
    found = read(exchange)
    assert (found.text, found.done, found.errors) == ("onetwo", True, [])
    assert found.complete == (how != "client gone")
    assert (exchange.row.outcome, exchange.row.completion_tokens) == ("ok", 2)
    assert transport_of(connection).closed
    assert world.endpoints["a"].pool.take() is None
    assert outcomes(world, "a") == (1, 0, 0)
    world.check()


def test_data_after_done_is_dropped_and_a_message_that_ends_leaves_a_good_connection() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(DONE, event("late", completion=9), DONE) + LAST_CHUNK)
    found = read(exchange)
    assert (found.text, found.done) == ("one", True)
    assert exchange.row.completion_tokens == 1
    assert world.endpoints["a"].pool.take() is connection
    world.check()


# The client leaves


def test_a_client_that_leaves_the_queue_leaves_nothing_behind() -> None:
    key = Key("k", "acme", concurrency=9, tpm=10_000)
    world = World("a", slots=1, key=key)
    world.start()
    held = world.start()
    assert held.state is State.HELD
    held.client_gone()
    assert (held.row.outcome, held.row.status) == ("client_gone", 0)
    world.check()


def test_a_client_that_leaves_while_a_connection_is_made_ends_the_attempt() -> None:
    world = World("a")
    exchange = world.start()
    assert exchange.state is State.CONNECTING
    exchange.client_gone()
    assert world.dialled() == []
    assert outcomes(world, "a") == (0, 0, 1)
    world.check()


@pytest.mark.parametrize("events", [0, 1])
def test_a_client_that_leaves_stops_the_engine_and_pays_for_what_it_got(events: int) -> None:
    key = Key("k", "acme", tpm=1000)
    world = World("a", key=key)
    exchange = world.start()
    connection = world.relaying(exchange, "a") if events else world.answers(exchange, "a")
    if events:
        connection.data_received(chunked(event("two", completion=2)))
    exchange.client_gone()
    assert transport_of(connection).aborted
    row = exchange.row
    assert row.outcome == "client_gone"
    assert (row.status, row.completion_tokens, row.prompt_tokens) == ((200, 2, 7) if events else (0, 0, 0))
    assert row.cost_nano == (11_000 if events else 0)
    assert world.runtime.limits.usage(key, 0.0).tokens.total == (9 if events else 0)
    assert outcomes(world, "a") == (0, 0, 1)
    exchange.client_gone()  # told twice
    world.check()


def test_what_an_engine_does_not_report_is_estimated_from_what_came() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(STREAM_HEAD + chunked(event("x" * 40), event("y" * 4)))
    exchange.client_gone()
    assert (exchange.row.usage_source, exchange.row.completion_tokens) == ("estimated", 11)
    assert exchange.row.prompt_tokens > 0


# Deadlines


def test_no_first_token_in_time_goes_to_the_next_and_then_504() -> None:
    world = World("a", "b", timeouts={"first_token": 10})
    exchange = world.start()
    connection = world.answers(exchange, "a")
    world.wait(9.9)
    assert exchange.connection is connection
    world.wait(0.2)
    assert transport_of(connection).aborted
    world.answers(exchange, "b")
    world.wait(9.8)
    assert exchange.state is State.SENT  # it has its own ten seconds
    world.wait(0.3)
    found = read(exchange)
    assert (found.status, found.error["code"]) == (504, "backend_timeout")
    assert outcomes(world, "a") == outcomes(world, "b") == (0, 1, 0)
    world.check()


def test_silence_within_a_stream_cuts_it() -> None:
    world = World("a", timeouts={"between_tokens": 5})
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    world.wait(4.0)
    connection.data_received(chunked(event("two", completion=2)))
    world.wait(4.0)
    world.wait(4.9)
    assert exchange.state is State.RELAYING
    world.wait(0.3)
    assert read(exchange).errors == ["backend_timeout"]
    assert transport_of(connection).aborted
    assert outcomes(world, "a") == (0, 1, 0)
    world.check()


def test_the_whole_request_has_a_deadline_that_is_nobodys_fault() -> None:
    world = World("a", timeouts={"total": 20, "between_tokens": 15, "first_token": 18})
    relaying, silent, connecting = world.start(), world.start(), world.start()
    connection = world.relaying(relaying, "a")
    world.connects("a")
    assert connecting.state is State.CONNECTING
    world.wait(12.0)
    connection.data_received(chunked(event("two", completion=2)))
    silent.quiet_since = world.loop.now
    world.wait(8.1)
    assert read(relaying).errors == ["backend_timeout"]
    for exchange in (silent, connecting):
        found = read(exchange)
        assert (found.status, found.error["code"]) == (504, "backend_timeout")
    assert outcomes(world, "a") == (0, 0, 3)
    assert world.dialled() == []
    world.check()


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    world = World("a", timeouts={"client_write": 60, "between_tokens": 5})
    exchange = world.start()
    world.relaying(exchange, "a")
    exchange.block()
    world.wait(1.0)
    world.wait(58.0)  # the backend is not read meanwhile, so its silence counts for nothing
    assert exchange.state is State.RELAYING
    assert client_of(exchange).ended == ""
    world.wait(1.1)
    assert client_of(exchange).ended == "abort"
    exchange.client_gone()
    assert exchange.row.outcome == "client_gone"
    assert outcomes(world, "a") == (0, 0, 1)


def test_a_backend_is_not_blamed_for_the_pause_that_its_client_made() -> None:
    world = World("a", timeouts={"client_write": 60, "between_tokens": 5})
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    exchange.block()
    world.wait(1.0)
    world.wait(29.0)
    exchange.unblock()
    world.wait(0.25)
    assert exchange.state is State.RELAYING
    connection.data_received(chunked(DONE) + LAST_CHUNK)
    assert exchange.row.outcome == "ok"


def test_progress_is_journaled_when_there_is_some() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    world.wait(0.25)
    world.wait(0.25)
    assert world.journal.progressed == [(exchange.row.op, "a", 7, 0, 1)]
    connection.data_received(chunked(event("two", completion=2)))
    world.wait(0.25)
    assert world.journal.progressed[1:] == [(exchange.row.op, "a", 7, 0, 2)]


def test_progress_that_is_only_estimated_is_journaled_as_such() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(STREAM_HEAD + chunked(event("x" * 40)))
    assert exchange.facts is not None
    prompt = exchange.facts.prompt_tokens
    world.wait(0.25)
    assert world.journal.progressed == [(exchange.row.op, "a", prompt, 0, 10, "estimated")]
    connection.data_received(chunked(event("x" * 4)))
    world.wait(0.25)
    connection.data_received(chunked(event("x" * 4)))
    assert len(world.journal.progressed) == 1  # twice a second is enough
    world.wait(0.25)
    assert world.journal.progressed[1:] == [(exchange.row.op, "a", prompt, 0, 12, "estimated")]


# Back-pressure


def test_a_slow_client_pauses_its_backend_and_no_other() -> None:
    world = World("a")
    slow, fast = world.start(), world.start()
    connections = [world.relaying(slow, "a"), world.relaying(fast, "a")]
    slow.block()
    assert [transport_of(connection).reading for connection in connections] == [False, True]
    slow.unblock()
    assert transport_of(connections[0]).reading
    for connection in connections:
        connection.data_received(chunked(DONE) + LAST_CHUNK)
    world.check()


# The journal, strictly


def test_strict_durability_sends_nothing_before_the_sync() -> None:
    world = World("a", durability="strict")
    exchange = world.start()
    assert (exchange.state, world.dialled()) == (State.CONNECTING, [])
    world.check()
    world.syncs()
    world.relaying(exchange, "a")
    world.check()


def test_strict_durability_refuses_when_the_sync_fails() -> None:
    world = World("a", durability="strict")
    exchange = world.start()
    world.syncs(OSError("disk full"))
    found = read(exchange)
    assert (found.status, found.error["code"]) == (503, "ledger_unavailable")
    assert exchange.row.outcome == "rejected"
    assert outcomes(world, "a") == (0, 0, 1)
    world.check()


def test_strict_durability_does_not_wait_for_ever_for_a_disk_that_hangs() -> None:
    world = World("a", durability="strict", timeouts={"total": 20})
    exchange = world.start()
    world.wait(20.1)
    assert read(exchange).status == 504
    assert world.tasks.pending("journal sync") == []
    world.check()


@pytest.mark.parametrize("part", ["journal", "ledger"])
def test_nothing_new_is_served_that_cannot_be_recorded(part: str) -> None:
    world = World("a")
    running = world.start()
    connection = world.relaying(running, "a")
    getattr(world, part).failed = "disk full"
    found = read(world.start())
    assert (found.status, found.error["code"]) == (503, "ledger_unavailable")
    connection.data_received(chunked(DONE) + LAST_CHUNK)
    assert running.row.outcome == "ok"
    world.check()


# Stopping


def test_stopping_ends_everything_with_an_answer() -> None:
    world = World("a", slots=3)
    relaying, sent, connecting, held = [world.start() for _ in range(4)]
    connection = world.relaying(relaying, "a")
    world.connects("a")
    assert [e.state for e in (sent, connecting, held)] == [State.SENT, State.CONNECTING, State.HELD]
    for exchange in [*world.runtime.exchanges, *world.runtime.held.values()]:
        exchange.stop()
        exchange.stop()
    assert read(relaying).errors == ["shutting_down"]
    assert transport_of(connection).aborted
    for exchange in (sent, connecting, held):
        found = read(exchange)
        assert (found.status, found.error["code"]) == (503, "shutting_down")
    assert {exchange.row.outcome for exchange in world.all} == {"shutdown"}
    assert world.dialled() == []
    assert outcomes(world, "a")[1] == 0
    world.check()


def test_while_the_proxy_drains_answers_say_that_the_connection_closes() -> None:
    world = World("a")
    answered, failed = world.start(stream=False), world.start(stream=False)
    world.runtime.draining = True
    world.answers(answered, "a").data_received(whole(200, answer_body()))
    failed.stop()
    for exchange in (answered, failed):
        assert read(exchange).fields["connection"] == "close"
        assert client_of(exchange).ended == "close"


# Holding


def test_a_held_request_is_sent_when_a_slot_comes_free() -> None:
    world = World("a", slots=1)
    first, second = world.start(), world.start()
    world.connects("a")
    world.loop.now += 2.0
    end_well(world, first)
    assert second.state is State.SENT
    end_well(world, second)
    assert second.row.queue_s == pytest.approx(2.0)
    assert read(second).fields["x-tidegate-queue-ms"] == "2000"
    world.check()


def test_a_full_queue_is_429_and_its_displaced_one_too() -> None:
    world = World("a", slots=1)
    exchanges = [world.start() for _ in range(5)]
    found = read(exchanges[4])
    assert (found.status, found.error["code"]) == (429, "queue_full")
    assert "retry-after" in found.fields
    assert [e.state for e in exchanges[1:4]] == [State.HELD] * 3
    world.check()


def test_a_hold_ends_in_time() -> None:
    world = World("a", slots=1)
    world.start()
    held = world.start()
    world.wait(10.1)  # then it goes to any backend, full or not
    assert held.state is State.CONNECTING
    assert held.row.queue_s == pytest.approx(10.1)
    world.check()


def test_a_request_whose_time_is_over_in_the_queue_is_503() -> None:
    world = World("a", slots=1, timeouts={"total": 5, "between_tokens": 5})
    world.start()
    held = world.start()
    world.wait(5.1)
    found = read(held)
    assert (found.status, found.error["code"]) == (503, "queue_timeout")
    world.check()


# Metering what cannot be read


def test_answers_are_asked_for_unencoded() -> None:
    world = World("a")
    exchange = world.start()
    request = transport_of(world.answers(exchange, "a")).written
    assert b"\r\naccept-encoding: identity\r\n" in request


def test_an_encoded_answer_is_passed_on_untouched() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(STREAM_HEAD[:-2] + b"content-encoding: gzip\r\n\r\n")
    connection.data_received(chunked(b"\x1f\x8b123", b"456") + LAST_CHUNK)
    found = read(exchange)
    assert (found.body, found.fields["content-encoding"]) == (b"\x1f\x8b123456", "gzip")
    assert (exchange.row.usage_source, exchange.row.completion_tokens) == ("estimated", 2)
    world.check()


def test_the_request_of_a_backend_holds_our_fields_and_none_of_the_clients_credentials() -> None:
    world = World("a")
    exchange = world.start()
    request = transport_of(world.answers(exchange, "a")).written
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a.test:8000\r\n")
    assert b"authorization" not in head.lower()
    assert b"x-request-id: " + exchange.id.encode() in head
    document = orjson.loads(body)
    assert document["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_a_model_is_not_said_to_be_missing_while_a_backend_has_named_none_yet() -> None:
    world = World("a", "b")
    for backend in world.runtime.fleet:
        backend.models, backend.models_unknown, backend.models_awaited = frozenset(), "not asked yet", True
    world.runtime.fleet.replace(list(world.runtime.fleet))
    exchange = world.start()
    found = client_of(exchange).read()
    assert (found.error["code"], found.status) == ("no_backend", 503)
    assert found.fields["retry-after"] == "5"

    for backend in world.runtime.fleet:  # one that refuses to name them for good keeps nobody waiting
        backend.models_unknown, backend.models_awaited = "GET /v1/models: 401", False
    world.runtime.fleet.replace(list(world.runtime.fleet))
    exchange = world.start()
    error = client_of(exchange).read().error
    assert (error["code"], error["param"], exchange.row.status) == ("model_not_found", "model", 404)
    assert error["message"] == "no backend is known to serve the model 'm'"


def test_a_model_that_nobody_may_serve_is_refused_with_the_reason() -> None:
    world = World("a", aliases={"gpt": "demmo", "good": "m"})

    def told(**fields: Any) -> str:
        error = client_of(world.start(**fields)).read().error
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        return str(error["message"])

    assert told(model="x") == "the model 'x' does not exist"
    assert told(model="gpt") == "the alias 'gpt' stands for 'demmo', which no backend serves"
    rules = world.runtime.valve.rules.rules
    rules[0].require = Selector(sites=frozenset({"nowhere"}))
    world.runtime.fleet.version += 1
    for model in ("m", "good"):
        assert told(model=model) == (
            f"the policy of this proxy lets no backend serve the model '{model}' to this request"
        )


def test_only_a_full_tier_spills() -> None:
    """What goes elsewhere because a tier is down is no spill."""
    world = World("a", "b", slots=1)
    world.backend("a").probed(False, world.loop.now)
    world.runtime.fleet.refresh(world.loop.now)
    world.start(stream=False)
    world.answers(world.all[-1], "b").data_received(whole(200, answer_body()))
    assert world.runtime.observer.spilled == {}
    world.backend("a").probed(True, world.loop.now)
    world.runtime.fleet.refresh(world.loop.now)
    world.start(stream=False)
    second = world.start(stream=False)
    world.connects("a")
    assert second.connection is not None, "the one that b has kept"
    second.connection.data_received(whole(200, answer_body()))
    assert world.runtime.observer.spilled == {"b": 1}
