"""Answers that are not whole, or that nobody can tell to be: they never look complete, and they are billed."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from proxy.exchange import STALE_S, State
from proxy.relay import UNTIL_CLOSE_BYTES, WHOLE_ANSWER_BYTES
from proxy.sse import MAX_EVENT_BYTES
from tests.proxy.endpoint_samples import USAGE, named, response
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
    event,
    read,
    transport_of,
    whole,
)

UNTIL_CLOSE_JSON = b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n"
LONG = "x" * (WHOLE_ANSWER_BYTES + 10)


# Answers that are too long to keep


@pytest.mark.parametrize("write", [orjson.dumps, lambda document: json.dumps(document).encode()])
def test_usage_is_found_wherever_it_stands_in_a_long_answer(write: object) -> None:
    assert callable(write)
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    usage = {
        "prompt_tokens": 5000,
        "total_tokens": 5500,
        "completion_tokens": 500,
        "prompt_tokens_details": {"cached_tokens": 16},
    }
    body = write({"choices": [{"message": {"content": LONG}}], "usage": usage, "prompt_text": LONG})
    reply = whole(200, body)
    for at in range(0, len(reply), 100_003):
        connection.data_received(reply[at : at + 100_003])
    assert read(exchange).body == body
    row = exchange.row
    assert (row.outcome, row.usage_source) == ("ok", "reported")
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (5000, 16, 500)
    world.check()


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_usage_that_two_reads_share_is_found(cut: int) -> None:
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    body = orjson.dumps({"x": LONG, "usage": {"prompt_tokens": 7, "completion_tokens": 3}, "y": "z"})
    reply = whole(200, body)
    at = reply.index(b'"usage"') + cut
    connection.data_received(reply[:at])
    connection.data_received(reply[at:])
    assert (exchange.row.prompt_tokens, exchange.row.completion_tokens) == (7, 3)


def test_a_long_answer_that_reports_nothing_is_estimated() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    body = orjson.dumps({"choices": [{"message": {"content": LONG}}]})
    reply = whole(200, body)
    connection.data_received(reply[:-5])
    connection.data_received(reply[-5:])
    assert (exchange.row.usage_source, exchange.row.completion_tokens) == ("estimated", -(-len(body) // 4))
    assert exchange.row.cost_nano > 0


def test_a_long_answer_that_was_aborted_is_cut() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    body = orjson.dumps({"choices": [{"message": {"content": LONG}, "finish_reason": "abort"}]})
    reply = whole(200, body)
    connection.data_received(reply[:-40])
    assert exchange.state is State.RELAYING
    connection.data_received(reply[-40:])
    assert (exchange.row.outcome, client_of(exchange).ended) == ("cut", "abort")
    assert not read(exchange).complete
    world.check()


# Answers that only the end of their connection delimits


@pytest.mark.parametrize(
    "body", [b'{"content":"hello"', b'{"a":{"b":1}', b"[1,2]]", b'{"content":"hello', b"", b" "]
)
def test_json_that_breaks_off_is_tried_elsewhere(body: bytes) -> None:
    world = World("a", "b")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    connection.data_received(UNTIL_CLOSE_JSON + body)
    close(connection)
    assert world.backend("a").failed == 1
    world.answers(exchange, "b").data_received(whole(200, answer_body()))
    assert (read(exchange).status, exchange.row.backend) == (200, "b")
    world.check()


@pytest.mark.parametrize("body", [answer_body(), b" [1]\n", b"plain text"])
def test_what_is_whole_is_passed_on(body: bytes) -> None:
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    connection.data_received(UNTIL_CLOSE_JSON + body)
    close(connection)
    assert (read(exchange).body, exchange.row.outcome) == (body, "ok")
    world.check()


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_long_one_is_kept_until_it_can_be_told(is_whole: bool) -> None:
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    body = orjson.dumps({"choices": [{"message": {"content": LONG}}]})[: None if is_whole else -1]
    connection.data_received(UNTIL_CLOSE_JSON + body)
    assert client_of(exchange).out == b""
    close(connection)
    assert read(exchange).status == (200 if is_whole else 502)
    world.check()


def test_one_that_is_too_long_for_that_is_refused() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")
    connection.data_received(UNTIL_CLOSE_JSON + b'{"a":"' + b"x" * UNTIL_CLOSE_BYTES)
    assert (read(exchange).status, read(exchange).error["code"]) == (502, "backend_protocol")
    assert connection.closed
    world.check()


def test_an_encoded_one_cannot_be_told_to_be_whole() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(UNTIL_CLOSE_HEAD[:-2] + b"content-encoding: gzip\r\n\r\n\x1f\x8b123")
    close(connection)
    assert (exchange.row.outcome, client_of(exchange).ended) == ("cut", "abort")
    world.check()


# Streams


def test_a_stream_that_ends_well_framed_but_without_its_end_is_cut() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(LAST_CHUNK)
    assert read(exchange).errors == ["backend_reset"]
    assert exchange.row.outcome == "cut"
    world.check()


FINISHED = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'


def test_a_finish_reason_is_an_end_too() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(FINISHED) + LAST_CHUNK)
    assert (exchange.row.outcome, read(exchange).errors) == ("ok", [])
    world.check()


def test_every_choice_has_to_end() -> None:
    world = World("a")
    exchange = world.start(n=2)
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(FINISHED) + LAST_CHUNK)
    assert exchange.row.outcome == "cut"
    world.check()


def test_heartbeats_do_not_make_up_for_tokens() -> None:
    world = World("a", timeouts={"between_tokens": "30s"})
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    for _ in range(29):
        connection.data_received(chunked(b": keep-alive\n\n"))
        world.wait(1.0)
    connection.data_received(chunked(event("two", completion=2)))
    world.wait(1.0)
    assert exchange.state is State.RELAYING
    for _ in range(31):
        connection.data_received(chunked(b": keep-alive\n\n"))
        world.wait(1.0)
    assert read(exchange).errors == ["backend_timeout"]
    world.check()


def test_tokens_that_are_known_by_the_last_one_are_tokens() -> None:
    world = World("a", timeouts={"between_tokens": "2s"})
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    for count in range(2, 12):
        connection.data_received(chunked(event("x", completion=count)))
        world.wait(1.0)
    connection.data_received(chunked(DONE) + LAST_CHUNK)
    assert (exchange.row.outcome, exchange.row.completion_tokens) == ("ok", 11)


def test_an_event_that_takes_long_to_come_whole_is_no_silence() -> None:
    world = World("a", timeouts={"between_tokens": "2s"})
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(b'data: {"audio":"' + b"h" * (MAX_EVENT_BYTES + 1)))
    for _ in range(10):
        world.wait(1.0)
        connection.data_received(chunked(b"h" * 100))
    connection.data_received(chunked(b'"}\n\n', DONE) + LAST_CHUNK)
    assert exchange.row.outcome == "ok"
    world.check()


def test_nothing_follows_the_end_of_a_stream_even_if_it_was_expected() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(event("two", completion=2)))
    connection.data_received(chunked(DONE))
    connection.data_received(chunked(event("three", completion=3)))
    connection.data_received(LAST_CHUNK)
    assert (read(exchange).text, exchange.row.completion_tokens) == ("onetwo", 2)
    world.check()


def test_an_expected_event_behind_the_beginning_of_another_is_not_by_itself() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(event("two", completion=2)))
    connection.data_received(chunked(b"event: other\n"))
    connection.data_received(chunked(event("three", completion=3)))
    connection.data_received(chunked(DONE) + LAST_CHUNK)
    assert b"event: other\ndata: {" in read(exchange).body
    world.check()


def test_a_finish_reason_does_not_make_up_for_an_end_that_only_the_connection_says() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(UNTIL_CLOSE_HEAD + event("one", completion=1) + FINISHED)
    close(connection)
    assert read(exchange).errors == ["backend_reset"]
    world.check()


def test_an_error_behind_half_an_event_stands_alone() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.relaying(exchange, "a")
    connection.data_received(chunked(b'data: {"id":"' + b"h" * (MAX_EVENT_BYTES + 1)))
    close(connection, ConnectionResetError())
    assert read(exchange).body.split(b"\n\n")[-2].startswith(b'data: {"error":')
    world.check()


PICTURE = {"type": "image_generation.completed", "b64_json": "A" * (2 * MAX_EVENT_BYTES), "usage": USAGE}
RESPONSE = {"type": "response.completed", "response": response(output=["A" * (2 * MAX_EVENT_BYTES)])}


@pytest.mark.parametrize(
    ("endpoint", "body", "last"),
    [
        ("images", {"prompt": "x", "stream": True}, PICTURE),
        ("responses", {"input": "hi", "stream": True}, RESPONSE),
    ],
)
@pytest.mark.parametrize("cut", [10_007, 1_000_003])
def test_an_end_that_is_too_large_to_read_is_an_end_and_metered(
    endpoint: str, body: dict[str, Any], last: dict[str, Any], cut: int
) -> None:
    world = World("a")
    exchange = world.start(endpoint=endpoint, raw=orjson.dumps({"model": "m", **body}))
    connection = world.answers(exchange, "a")
    raw = named("x.partial", delta="x") + b"event: x\ndata: %b\n\n" % orjson.dumps(last)
    connection.data_received(STREAM_HEAD)
    for at in range(0, len(raw), cut):
        connection.data_received(chunked(raw[at : at + cut]))
    connection.data_received(LAST_CHUNK)
    row = exchange.row
    assert (row.outcome, row.usage_source) == ("ok", "reported")
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (7, 2, 5)
    assert world.backend("a").failed == 0
    assert read(exchange).body == raw
    world.check()


@pytest.mark.parametrize("how", ["reset", "half"])
def test_an_end_that_is_too_large_to_read_and_broken_off_is_none(how: str) -> None:
    world = World("a")
    exchange = world.start(endpoint="images", raw=b'{"model":"m","prompt":"x","stream":true}')
    connection = world.answers(exchange, "a")
    raw = b"data: " + orjson.dumps(PICTURE)
    connection.data_received(STREAM_HEAD + chunked(raw))
    if how == "half":
        connection.data_received(LAST_CHUNK)
    else:
        connection.data_received(chunked(b"\n\n"))
        close(connection, ConnectionResetError())
    assert (exchange.row.outcome, world.backend("a").failed) == ("cut", 1)


def test_the_bytes_of_an_event_that_is_too_large_to_read_are_no_text() -> None:
    world = World("a")
    exchange = world.start(endpoint="responses", raw=b'{"model":"m","input":"hi","stream":true}')
    connection = world.answers(exchange, "a")
    large = named("response.image_generation_call.partial_image", b64="A" * MAX_EVENT_BYTES)
    connection.data_received(STREAM_HEAD + chunked(named("response.output_text.delta", delta="hello")))
    connection.data_received(chunked(large[:-9]))
    connection.data_received(chunked(large[-9:]))
    close(connection, ConnectionResetError())
    assert (exchange.row.usage_source, exchange.row.completion_tokens) == ("estimated", 2)


def test_an_event_that_can_be_read_and_not_written_goes_on_as_it_is() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    deep = b'data: {"choices":[{}],"usage":null,"z":' + b"[" * 400 + b"]" * 400 + b"}\n\n"
    connection.data_received(STREAM_HEAD + chunked(deep, DONE) + LAST_CHUNK)
    assert (exchange.row.outcome, deep in read(exchange).body) == ("ok", True)
    world.check()


def test_a_bug_in_settling_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("a")
    exchange = world.start()
    connection = world.relaying(exchange, "a")

    def fails(exchange: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(world.runtime.observer, "ended", fails)
    connection.data_received(chunked(DONE) + LAST_CHUNK)
    assert client_of(exchange).ended == "abort"
    assert client_of(exchange).out.count(b"\n\r\n" + LAST_CHUNK) == 1
    assert client_of(exchange).out.endswith(b"[DONE]\n\n\r\n" + LAST_CHUNK)


def test_a_bug_in_reading_an_end_strands_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("a")
    exchange = world.start(stream=False)
    connection = world.answers(exchange, "a")

    def fails(body: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(exchange.meter), "body", lambda self, body: fails(body))
    connection.data_received(whole(200, answer_body()))
    assert (read(exchange).status, read(exchange).error["code"]) == (502, "backend_protocol")
    world.check()


# Backends that mean another place, or close


def test_a_backend_that_points_elsewhere_has_failed() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    world.answers(exchange, "a").data_received(whole(307, b"", b"location: http://10.1.2.3:8000/"))
    found = read(exchange)
    assert (found.status, found.error["code"]) == (502, "backend_error")
    assert b"10.1.2.3" not in client_of(exchange).out
    world.check()


@pytest.mark.parametrize("late", [False, True])
def test_a_kept_connection_that_closes_late_may_have_been_worked_for(late: bool) -> None:
    world = World("a")
    first = world.start(stream=False)
    world.answers(first, "a").data_received(whole(200, answer_body()))
    exchange = world.start(stream=False)
    connection = exchange.connection
    assert connection is not None
    world.loop.now += STALE_S * (1.5 if late else 0.5)
    close(connection)
    if late:
        assert (read(exchange).status, world.backend("a").failed) == (502, 1)
    else:
        assert (exchange.state, world.backend("a").failed) == (State.CONNECTING, 0)
    world.check()


def test_what_is_sent_to_a_slow_backend_waits_in_its_transport() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.pause_writing()
    connection.resume_writing()
    assert connection.eof_received() is False
    connection.data_received(STREAM_HEAD + chunked(event("x", completion=1), DONE) + LAST_CHUNK)
    assert exchange.row.outcome == "ok"
    assert not transport_of(connection).closed
