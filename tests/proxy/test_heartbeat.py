"""Heartbeats: who gets them and when, and that everything after them still ends as it should."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from policies.state import Backend
from proxy.access.keys import Key
from proxy.endpoints import ANTHROPIC, TABLE, Route
from proxy.exchange import Exchange, State
from proxy.heartbeat import HEARTBEAT
from proxy.relay import WHOLE_ANSWER_BYTES
from tests.proxy.endpoint_samples import SAMPLES, sent
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
    usage_event,
    whole,
)

EVERY_S = 3.0
ANSWER = STREAM_HEAD + chunked(event("x", completion=1), usage_event(7, 1), DONE) + LAST_CHUNK
BAD_REQUEST = orjson.dumps({"error": {"message": "too long", "type": "BadRequestError", "code": 400}})
streams = pytest.mark.parametrize(
    "route",
    [route for route in TABLE if SAMPLES[route.name].events and not route.media],
    ids=lambda route: route.name,
)


def world(*names: str, slots: int = 1, heartbeat: float = EVERY_S, **options: Any) -> World:
    timeouts = {"heartbeat": heartbeat, **options.pop("timeouts", {})}
    return World(*(names or ("a",)), slots=slots, timeouts=timeouts, **options)


def held(w: World, **fields: Any) -> Exchange:
    """A request that waits, for others have the slots."""
    for _ in w.endpoints:
        w.start()
        w.connects(w.dialled()[0])
    exchange = w.start(**fields)
    assert exchange.state is State.HELD
    return exchange


def let_in(w: World, exchange: Exchange) -> None:
    """The first of the others ends, and the held one is sent on its connection."""
    other = next(e for e in w.all if e.state is State.SENT)
    assert other.connection is not None
    other.connection.data_received(ANSWER)
    assert exchange.state is State.SENT


def beats(exchange: Exchange) -> int:
    return client_of(exchange).out.count(HEARTBEAT)


def last_event(exchange: Exchange) -> tuple[bytes, dict[str, Any]]:
    """Name (or nothing) and document of the last event."""
    name, _, data = read(exchange).body.split(b"\n\n")[-2].rpartition(b"data: ")
    document: dict[str, Any] = orjson.loads(data)
    return name.rpartition(HEARTBEAT)[2], document


# Who gets them


def test_none_unless_they_are_asked_for() -> None:
    w = world(heartbeat=0)
    exchange = held(w)
    w.wait(9.0)
    assert client_of(exchange).out == b""
    let_in(w, exchange)
    w.wait(100.0)
    assert client_of(exchange).out == b""


def test_who_is_held_hears_so_when_it_is_time_and_then_gets_its_answer() -> None:
    key = Key("k", "acme", rpm=100)
    w = world(key=key)
    exchange = held(w)
    w.wait(EVERY_S - 0.1)
    assert client_of(exchange).out == b""
    for number in range(1, 4):
        w.wait(EVERY_S / 2 + 0.1)
        w.check()
        found = read(exchange)
        assert found.body == HEARTBEAT * beats(exchange)
        assert beats(exchange) == (number + 1) // 2
    assert (found.status, found.fields["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert found.fields["x-request-id"] == exchange.row.op
    assert found.fields["x-ratelimit-limit-requests"] == "100"
    let_in(w, exchange)
    assert exchange.row.queue_s == w.loop.now - exchange.arrived
    assert exchange.connection is not None
    w.loop.now += 0.5
    exchange.connection.data_received(ANSWER)
    found = read(exchange)
    assert (found.text, found.done, found.complete) == ("x", True, True)
    assert found.body.startswith(HEARTBEAT * 2 + b"data: ")
    assert client_of(exchange).ended == "keep"
    row = exchange.row
    assert (row.outcome, row.status, row.prompt_tokens, row.completion_tokens) == ("ok", 200, 7, 1)
    assert row.ttft_s == pytest.approx(row.queue_s + 0.5)
    w.check()


def test_who_waits_for_a_late_first_token_hears_so_too_and_not_beyond_it() -> None:
    w = world()
    exchange = w.start()
    connection = w.answers(exchange, "a")
    connection.data_received(STREAM_HEAD + chunked(b": keep-alive\n\n"))  # of the engine: it commits nothing
    w.wait(EVERY_S)
    assert beats(exchange) == 1
    connection.data_received(chunked(event("one", completion=1)))
    assert exchange.row.ttft_s == EVERY_S
    w.wait(2 * EVERY_S)
    assert read(exchange).body == HEARTBEAT + event("one")
    w.check()


def test_only_for_streams_that_were_asked_for_and_can_be() -> None:
    w = world(slots=8)
    plain = w.start(stream=False)
    embeddings = w.start(
        endpoint="embeddings", raw=orjson.dumps({"model": "m", "input": "x", "stream": True})
    )
    waiting = held(world(), stream=False)
    for exchange in (plain, embeddings, waiting):
        exchange.runtime.sweep(w.loop.now + 100.0)
        assert client_of(exchange).out == b""


def test_not_for_a_client_that_reads_nothing() -> None:
    w = world()
    exchange = held(w)
    exchange.block()
    w.wait(2 * EVERY_S)
    assert not exchange.head_sent
    exchange.unblock()
    w.wait(0.25)
    assert beats(exchange) == 1


def test_a_client_that_reads_none_of_them_slows_its_backend_and_is_cut_off() -> None:
    w = world(timeouts={"client_write": 8})
    exchange = held(w)
    w.wait(EVERY_S)
    exchange.block()
    let_in(w, exchange)
    assert exchange.connection is not None
    transport = transport_of(exchange.connection)
    assert not transport.reading
    exchange.unblock()
    assert transport.reading
    exchange.block()
    w.wait(7.9)
    assert client_of(exchange).ended == ""
    w.wait(0.2)
    assert (client_of(exchange).ended, beats(exchange)) == ("abort", 1)
    exchange.client_gone()  # as its connection would
    assert exchange.row.outcome == "client_gone"
    w.check()


def test_an_error_that_has_begun_keeps_its_status() -> None:
    w = world()
    exchange = w.start()
    reply = whole(400, BAD_REQUEST)
    connection = w.answers(exchange, "a")
    connection.data_received(reply[:-2])
    w.wait(EVERY_S)
    connection.data_received(reply[-2:])
    assert read(exchange).status == 400


def test_a_client_of_http_1_0_gets_them_without_chunks() -> None:
    w = world()
    exchange = held(w, version=0)
    w.wait(EVERY_S)
    head, _, body = client_of(exchange).out.partition(b"\r\n\r\n")
    assert (b"connection: close" in head, b"transfer-encoding" in head, body) == (True, False, HEARTBEAT)
    let_in(w, exchange)
    assert exchange.connection is not None
    exchange.connection.data_received(ANSWER)
    assert read(exchange).done
    assert client_of(exchange).ended == "close"


# What comes after them


def test_another_backend_is_tried_as_ever() -> None:
    w = world("a", "b")
    exchange = held(w)
    w.wait(EVERY_S)
    other = next(e for e in w.all if e.state is State.SENT)
    assert other.lease is not None
    name = other.lease.backend.name
    let_in(w, exchange)
    rest = next(e for e in w.all if e.state is State.SENT and e is not exchange)
    assert rest.connection is not None
    rest.connection.data_received(ANSWER)
    connection = exchange.connection
    assert connection is not None
    connection.data_received(STREAM_HEAD + chunked(error_event(), DONE) + LAST_CHUNK)
    assert exchange.lease is not None
    assert exchange.lease.backend.name != name
    connection = exchange.connection or w.connects(exchange.lease.backend.name)
    connection.data_received(ANSWER)
    found = read(exchange)
    assert (found.text, found.done, found.errors, found.complete) == ("x", True, [], True)
    assert (exchange.row.outcome, exchange.row.attempts) == ("ok", 2)
    w.check()


def refused_in(w: World, exchange: Exchange, how: str) -> tuple[str, str]:
    """Let a request end without an answer. -> (code, outcome) that it must have."""
    if how == "queue":
        w.wait(5.0)
        return "queue_timeout", "rejected"
    if how == "shutdown":
        exchange.stop()
        return "shutting_down", "shutdown"
    let_in(w, exchange)
    connection = exchange.connection
    assert connection is not None
    if how == "reset":
        connection.data_received(b"HTTP/1.1 200 O")
        close(connection)
        return "backend_reset", "backend_failed"
    if how == "silence":
        w.wait(w.runtime.timeouts.first_token + 1.0)
        return "backend_timeout", "backend_failed"
    assert how == "bug"
    exchange.fail()
    return "internal", "backend_failed"


@pytest.mark.parametrize("how", ["queue", "shutdown", "reset", "silence", "bug"])
@streams
def test_what_goes_wrong_is_an_error_event_of_the_dialect(route: Route, how: str) -> None:
    w = world(timeouts={"total": 8} if how == "queue" else {})
    body = {"model": "m", "stream": True, **SAMPLES[route.name].body}
    raw, forward = sent(route, body)
    exchange = held(w, endpoint=route.name, raw=raw, forward=forward)
    w.wait(EVERY_S)
    code, outcome = refused_in(w, exchange, how)
    name, document = last_event(exchange)
    found = read(exchange)
    assert (found.status, found.complete, found.body.count(b"data: ")) == (200, True, 1)
    if route.dialect == ANTHROPIC:
        assert (name, document["type"], set(document["error"])) == (
            b"event: error\n",
            "error",
            {"type", "message"},
        )
    elif route.name == "responses":
        assert (name, document["type"], document["code"]) == (b"event: error\n", "error", code)
        assert document["error"]["code"] == code
    else:
        assert (name, document["error"]["code"]) == (b"", code)
    row = exchange.row
    assert (row.outcome, row.status, row.code, row.usage_source) == (outcome, 200, code, "none")
    assert client_of(exchange).ended == "close"
    w.check()


@pytest.mark.parametrize("how", ["whole", "long", "encoded"])
def test_a_good_answer_that_is_no_stream_is_told_and_metered_and_blames_nobody(how: str) -> None:
    w = world("a", "b")
    exchange = w.start()
    connection = w.answers(exchange, "a")
    w.wait(EVERY_S)
    assert exchange.head_sent
    if how == "whole":
        connection.data_received(whole(200, answer_body()))
    elif how == "long":
        body = orjson.dumps({"x": "x" * WHOLE_ANSWER_BYTES, **orjson.loads(answer_body())})
        reply = whole(200, body)
        connection.data_received(reply[:-30])
        assert exchange.state is State.SENT
        connection.data_received(reply[-30:])
    else:
        connection.data_received(whole(200, b"\x1f\x8b123", b"content-encoding: gzip"))
    assert last_event(exchange)[1]["error"]["code"] == "backend_protocol"
    row = exchange.row
    assert (row.outcome, row.status, row.code, row.attempts) == ("backend_failed", 200, "backend_protocol", 1)
    if how != "encoded":
        assert (row.usage_source, row.prompt_tokens, row.completion_tokens) == ("reported", 7, 5)
    assert (w.backend("a").failed, w.backend("a").ignored, w.dialled()) == (0, 1, [])
    w.check()


def test_sound_and_pictures_have_none_since_they_may_be_no_stream() -> None:
    w = world()
    exchange = w.start(endpoint="images", raw=b'{"model":"m","prompt":"x","stream":true}')
    connection = w.answers(exchange, "a")
    w.wait(2 * EVERY_S)
    picture = orjson.dumps(SAMPLES["images"].answer)
    connection.data_received(whole(200, picture))
    assert (read(exchange).status, read(exchange).body, exchange.row.outcome) == (200, picture, "ok")


@pytest.mark.parametrize("how", ["answer", "event", "long"])
@streams
def test_a_backends_own_error_is_an_event_of_the_dialect(route: Route, how: str) -> None:
    w = world()
    body = {"model": "m", "stream": True, **SAMPLES[route.name].body}
    raw, forward = sent(route, body)
    exchange = held(w, endpoint=route.name, raw=raw, forward=forward)
    w.wait(EVERY_S)
    let_in(w, exchange)
    connection = exchange.connection
    assert connection is not None
    said = "too long"
    match how:
        case "answer":
            connection.data_received(whole(400, BAD_REQUEST))
        case "event":
            connection.data_received(STREAM_HEAD + chunked(b"data: " + BAD_REQUEST + b"\n\n", DONE))
        case "long":
            said = "the backend answered 400"
            connection.data_received(whole(400, b'"%b"' % (b"x" * WHOLE_ANSWER_BYTES))[:-1])
    name, document = last_event(exchange)
    assert document["error"]["message"] == said
    if route.dialect == ANTHROPIC:
        assert document["error"]["type"] == "invalid_request_error"
    else:
        assert document["error"]["code"] == 400
    assert (name == b"event: error\n") == route.withholds
    assert (exchange.row.outcome, exchange.row.status) == ("client_error", 200)
    backend: Backend = w.backend("a")
    assert backend.failed == 0
    w.check()


def test_an_error_that_is_no_json_has_its_status_at_least() -> None:
    w = world()
    exchange = w.start()
    connection = w.answers(exchange, "a")
    w.wait(EVERY_S)
    connection.data_received(whole(400, b"<html>"))
    error = {
        "message": "the backend answered 400",
        "type": "invalid_request_error",
        "param": None,
        "code": 400,
    }
    assert last_event(exchange) == (b"", {"error": error})


@pytest.mark.parametrize("sent", [False, True])
def test_a_client_that_leaves_is_told_by_the_row(sent: bool) -> None:
    w = world()
    exchange = held(w)
    w.wait(EVERY_S)
    if sent:
        let_in(w, exchange)
    client_of(exchange).ended = "abort"
    exchange.client_gone()
    row = exchange.row
    assert (row.outcome, row.status, row.usage_source, row.ttft_s) == ("client_gone", 200, "none", None)
    assert not w.runtime.held
    assert (exchange.row.attempts > 0) == sent
    w.check()


def test_a_draining_proxy_promises_no_further_request() -> None:
    w = world()
    exchange = held(w)
    w.runtime.draining = True
    w.wait(EVERY_S)
    assert read(exchange).fields["connection"] == "close"
    let_in(w, exchange)
    assert exchange.connection is not None
    exchange.connection.data_received(ANSWER)
    assert client_of(exchange).ended == "close"
