"""Laws that every row of the table of endpoints keeps: it is routed, limited and metered, refuses in its dialect,
and ends so that nothing looks complete that is not."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from policies.fileschema import ENDPOINTS
from proxy.access.keys import Key
from proxy.dialects import translated
from proxy.endpoints import (
    ANTHROPIC,
    BY_NAME,
    BY_PATH,
    METERINGS,
    NO_USAGE,
    TABLE,
    WEBSOCKET,
    Route,
    find,
    stored_id,
)
from proxy.exchange import Exchange
from proxy.http1 import RequestHead
from proxy.meters import MOST_WITHHELD, new_meter
from proxy.responses import StoredResponse
from proxy.sse import Event
from tests.proxy.endpoint_samples import SAMPLES, message_events, named, response, response_events, sent
from tests.proxy.fakes import LAST_CHUNK, STREAM_HEAD, World, chunked, client_of, read, whole

table = pytest.mark.parametrize("route", TABLE, ids=lambda route: route.name)
every = pytest.mark.parametrize(
    "route", [route for route in TABLE if route.body != WEBSOCKET], ids=lambda route: route.name
)
"""All that are one request and one answer; `test_realtime.py` holds the WebSocket to the same laws."""
streams = pytest.mark.parametrize(
    "route", [route for route in TABLE if SAMPLES[route.name].events], ids=lambda route: route.name
)
TENANT = "acme"


def world(*names: str, **limits: Any) -> World:
    return World(*(names or ("a",)), key=Key("k", TENANT, **{"concurrency": 8, **limits}))


def target(route: Route) -> bytes:
    return route.path.replace("{id}", "resp_1").encode()


def start(world: World, route: Route, *, stream: bool = False, model: str = "m", **fields: Any) -> Exchange:
    """A request for an endpoint; a stored response is there, and its tokens are not counted yet."""
    if route.stored and model == "m":
        world.runtime.responses.add("resp_1", StoredResponse("a", TENANT, "m", metered=False))
    document = {"model": model, **SAMPLES[route.name].body, **fields}
    if stream:
        document["stream"] = True
    raw, forward = sent(route, document)
    return world.start(
        endpoint=route.name, raw=raw, method=route.method.encode(), target=target(route), forward=forward
    )


def used(exchange: Exchange) -> tuple[int, int, int]:
    row = exchange.row
    return row.prompt_tokens, row.cached_tokens, row.completion_tokens


def error_of(route: Route, body: bytes) -> dict[str, Any]:
    """The error object of an answer, which has to have the shape of the endpoint's dialect."""
    document = orjson.loads(body)
    error: dict[str, Any] = document["error"]
    if route.dialect == ANTHROPIC:
        assert set(document) == {"type", "error"}
        assert document["type"] == "error"
        assert set(error) == {"type", "message"}
    else:
        assert set(document) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
    return error


# The table


def test_a_name_and_a_path_stand_once() -> None:
    paths = [(route.method, path) for route in TABLE for path in (route.path, *route.aliases)]
    assert len(set(paths)) == len(paths)
    assert tuple(route.name for route in TABLE) == ENDPOINTS == tuple(SAMPLES)
    assert {route.method for route in BY_PATH.values()} == {"POST"}  # `Runtime.admit` takes it for granted


@table
def test_it_is_metered_or_says_why_not(route: Route) -> None:
    assert route.metering in METERINGS
    assert (route.metering == NO_USAGE) == bool(route.unmetered)
    assert (SAMPLES[route.name].tokens == (0, 0, 0)) == bool(route.unmetered)
    assert route.generates <= route.streams
    assert not route.generates or SAMPLES[route.name].events


@table
def test_its_paths_lead_to_it_with_its_method_only(route: Route) -> None:
    runtime = World("a").runtime
    for path in (route.path, *route.aliases):
        raw = path.replace("{id}", "resp_1").encode()
        admitted = runtime.admit(RequestHead(route.method.encode(), raw, 1, keep_alive=True), "")
        assert (admitted.endpoint, admitted.error) == (route.name, None)
        refused = runtime.admit(RequestHead(b"PATCH", raw, 1, keep_alive=True), "").error
        assert refused is not None
        assert refused.code == "method_not_allowed"
        assert route.method in refused.allow.split(", ")


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/responses/",
        b"/v1/responses/a/b",
        b"/v1/responses/a/cancel/",
        b"/v1/responses/../models",
        b"/v1/responses/%2e%2e",
        b"/v1/responses/" + b"x" * 129,
        b"/v1/responses/a?b=\xff",
        b"/v1/messages/batches",
        b"/v1/messages/",
    ],
)
def test_nothing_beside_them_reaches_a_backend(path: bytes) -> None:
    assert find(b"GET", path) == find(b"POST", path) == ""
    assert stored_id(path) == ""


# What is nested more deeply than it is written again, and not too deeply to be read

DEEP = b'{"a":' * 500 + b"1" + b"}" * 500


def test_a_deep_error_of_a_backend_is_one_in_any_dialect() -> None:
    document = orjson.loads(translated(ANTHROPIC, 400, b'{"detail":' + DEEP + b"}"))
    assert document["error"] == {
        "type": "invalid_request_error",
        "message": "the backend's error cannot be shown",
    }


@pytest.mark.parametrize("name", ["responses", "messages"])
def test_a_deep_error_event_is_the_clients_fault_all_the_same(name: str) -> None:
    meter = new_meter(BY_NAME[name])
    data = b'{"type":"error","error":{"code":400,"message":"no","param":' + DEEP + b"}}"
    meter.event(Event(b"data: " + data + b"\n\n", data), include_usage=True, every_event=True)
    assert (meter.client_fault, meter.fault, meter.failed) == (400, data, True)


def test_deep_arguments_of_a_tool_are_no_text() -> None:
    meter = new_meter(BY_NAME["messages"])
    meter.body(b'{"content":[{"text":"four"},{"type":"tool_use","input":' + DEEP + b"}]}")
    assert meter.text_bytes == 4


# Every request


@every
def test_it_is_metered(route: Route) -> None:
    sample = SAMPLES[route.name]
    w = world()
    exchange = start(w, route)
    w.answers(exchange, "a").data_received(whole(200, orjson.dumps(sample.answer)))
    assert read(exchange).body == orjson.dumps(sample.answer)
    row = exchange.row
    assert (row.outcome, row.status, row.endpoint) == ("ok", 200, route.name)
    assert used(exchange) == sample.tokens
    assert row.usage_source == ("none" if route.unmetered else "reported")
    assert row in w.journal.closed
    w.check()


@every
def test_a_backend_that_reports_nothing_is_estimated_or_the_row_says_why_not(route: Route) -> None:
    answer = {name: value for name, value in SAMPLES[route.name].answer.items() if name != "usage"}
    if route.name == "responses":
        answer["output"] = [{"type": "message", "content": [{"type": "output_text", "text": "hello"}]}]
    exchange = start(w := world(), route)
    w.answers(exchange, "a").data_received(whole(200, orjson.dumps(answer)))
    known = not route.unmetered and not route.stored and not route.media
    assert exchange.row.usage_source == ("estimated" if known else "none")
    assert (exchange.row.prompt_tokens > 0) == known
    assert (exchange.row.completion_tokens > 0) == route.generates
    assert exchange.row.unmetered == ("no usage was reported" if route.media else "")


@every
def test_it_is_limited_by_its_key(route: Route) -> None:
    w = world(rpm=1)
    exchange = start(w, route)
    w.answers(exchange, "a").data_received(whole(200, orjson.dumps(SAMPLES[route.name].answer)))
    refused = start(w, route)
    found = read(refused)
    assert found.status == 429
    assert error_of(route, found.body)["type"] == "rate_limit_error"
    assert (refused.row.outcome, refused.row.code) == ("rejected", "rate_limit_requests")
    assert int(found.fields["retry-after"]) >= 1


@every
def test_an_unknown_model_or_response_is_404_in_its_dialect(route: Route) -> None:
    exchange = start(w := world(), route, model="nobody-has-this")
    found = read(exchange)
    assert found.status == 404
    assert error_of(route, found.body)["type"] == "not_found_error"
    assert exchange.row.outcome == "client_error"
    assert not w.dialled()


@every
def test_a_key_may_use_its_models_only(route: Route) -> None:
    exchange = start(world(models=frozenset({"other"})), route)
    found = read(exchange)
    assert found.status == 403
    assert error_of(route, found.body)["type"] == "permission_error"


@every
def test_no_backend_is_an_error_in_its_dialect(route: Route) -> None:
    w = world()
    exchange = start(w, route)
    w.refuses("a")
    found = read(exchange)
    assert found.status == (500 if route.dialect == ANTHROPIC else 502)
    assert error_of(route, found.body)["message"].startswith("cannot connect to a")
    assert found.fields["retry-after"] == "1"
    assert exchange.row.status == found.status
    assert exchange.row.outcome == "backend_failed"


NOT_THERE = [
    (404, b'{"detail":"Not Found"}'),
    (405, b'{"detail":"Method Not Allowed"}'),
    (404, b"<html>404 Not Found</html>"),
    (404, b""),
    (404, b'["no"]'),
]


@every
@pytest.mark.parametrize(("status", "body"), NOT_THERE)
def test_a_backend_without_the_endpoint_is_told_in_words(route: Route, status: int, body: bytes) -> None:
    exchange = start(w := world(), route)
    reply = whole(status, body).replace(b"application/json", b"text/html")
    w.answers(exchange, "a").data_received(reply)
    found = read(exchange)
    assert (found.status, found.fields["content-type"]) == (status, "application/json")
    error = error_of(route, found.body)
    assert error["type"] == "not_found_error"
    path = exchange.request.target.partition(b"?")[0].decode()
    assert error["message"] == f"the backend of 'm' has no {path}"
    if route.dialect != ANTHROPIC:
        assert error["code"] == "endpoint_not_served"
    assert (exchange.row.outcome, exchange.row.status, exchange.row.code) == ("client_error", status, "")
    assert w.backend("a").breaker.state(w.loop.now) == "closed"


@pytest.mark.parametrize(
    "body",
    [
        b'{"error":{"message":"no such model"}}',
        b'{"error":"no such model"}',
        b'{"object":"error","message":"The model `m` does not exist.","code":404}',
        b'{"detail":"adapter m is not loaded"}',
    ],
)
def test_a_404_that_says_more_is_the_backends_own(body: bytes) -> None:
    exchange = start(w := world(), BY_NAME["embeddings"])
    w.answers(exchange, "a").data_received(whole(404, body))
    assert read(exchange).body == body


def test_a_404_after_a_heartbeat_is_told_in_the_same_words() -> None:
    event = event_after_head(404, b'{"detail":"Not Found"}')
    assert event["error"]["message"] == "the backend of 'm' has no /v1/chat/completions"


def event_after_head(status: int, body: bytes) -> Any:
    """What a client gets that has the head of its stream already."""
    exchange = start(w := world(), BY_NAME["chat"])
    connection = w.answers(exchange, "a")
    exchange.head_sent = True
    connection.data_received(whole(status, body))
    written = exchange.client.out  # type: ignore[attr-defined]
    return orjson.loads(written.partition(b"data: ")[2].partition(b"\n\n")[0])


@every
def test_a_failed_attempt_goes_to_another_backend_unless_only_one_has_it(route: Route) -> None:
    w = world("a", "b")
    exchange = start(w, route)
    w.answers(exchange, "a").data_received(whole(500, b"{}"))
    if route.stored:
        assert read(exchange).status == 500
        return
    w.answers(exchange, "b").data_received(whole(200, orjson.dumps(SAMPLES[route.name].answer)))
    assert read(exchange).status == 200
    assert used(exchange) == SAMPLES[route.name].tokens


@every
def test_a_backends_own_error_reaches_the_client_in_its_dialect(route: Route) -> None:
    w = world()
    exchange = start(w, route)
    error = {"error": {"message": "no such thing", "type": "BadRequestError", "param": None, "code": 400}}
    w.answers(exchange, "a").data_received(whole(400, orjson.dumps(error)))
    found = read(exchange)
    assert found.status == 400
    assert error_of(route, found.body)["message"] == "no such thing"


# Every stream


@streams
def test_a_stream_is_metered_and_reaches_its_client_whole(route: Route) -> None:
    sample = SAMPLES[route.name]
    w = world()
    exchange = start(w, route, stream=True)
    connection = w.answers(exchange, "a")
    connection.data_received(STREAM_HEAD)
    for number, piece in enumerate(sample.events):
        assert exchange.committed == (number > sample.begin)
        connection.data_received(chunked(piece))
        w.check()
    connection.data_received(LAST_CHUNK)
    found = read(exchange)
    assert found.complete
    if route.withholds:
        assert found.body == b"".join(sample.events)
    assert (exchange.row.outcome, exchange.row.usage_source) == ("ok", "reported")
    prompt, _, completion = used(exchange)
    assert (prompt, completion) == (sample.tokens[0], sample.tokens[2])
    w.check()


@streams
def test_a_stream_in_one_piece_is_the_same(route: Route) -> None:
    sample = SAMPLES[route.name]
    exchange = start(w := world(), route, stream=True)
    w.answers(exchange, "a").data_received(STREAM_HEAD + chunked(b"".join(sample.events)) + LAST_CHUNK)
    assert read(exchange).complete
    assert exchange.row.outcome == "ok"
    assert used(exchange)[2] == sample.tokens[2]
    w.check()


@streams
@pytest.mark.parametrize("how", ["reset", "end", "stall", "shutdown"])
def test_a_stream_that_breaks_off_ends_in_an_error_event(route: Route, how: str) -> None:
    sample = SAMPLES[route.name]
    w = world()
    exchange = start(w, route, stream=True)
    connection = w.answers(exchange, "a")
    first = sample.events[: sample.begin + 1]
    connection.data_received(STREAM_HEAD + chunked(*first))
    match how:
        case "reset":
            connection.connection_lost(ConnectionResetError())
        case "end":
            connection.data_received(LAST_CHUNK)
        case "stall":
            w.wait(w.runtime.timeouts.between_tokens + 1)
            w.wait(w.runtime.timeouts.between_tokens + 1)
        case "shutdown":
            exchange.stop()
    last = read(exchange).body.split(b"\n\n")[-2]
    assert exchange.row.outcome == ("shutdown" if how == "shutdown" else "cut")
    data = orjson.loads(last.partition(b"data: ")[2])
    if route.dialect == ANTHROPIC:
        assert last.startswith(b"event: error\n")
        assert error_of(route, orjson.dumps(data))
    elif route.name == "responses":
        assert last.startswith(b"event: error\n")
        assert (data["type"], data["sequence_number"]) == ("error", 3)
        assert data["code"] == data["error"]["code"]
    else:
        assert error_of(route, orjson.dumps(data))
    assert (*used(exchange), exchange.row.usage_source) == sample.partial
    w.check()


@streams
def test_signs_of_life_put_off_no_deadline(route: Route) -> None:
    sample = SAMPLES[route.name]
    for sign in (b"data: \n\n", *sample.events[: sample.begin]):
        w = world()
        deadlines = w.runtime.timeouts
        exchange = start(w, route, stream=True)
        connection = w.answers(exchange, "a")
        connection.data_received(STREAM_HEAD)
        for _ in range(5):
            assert not connection.closed
            connection.data_received(chunked(sign))
            w.wait(deadlines.first_token / 4)
        assert connection.closed
        assert (read(exchange).status, exchange.row.outcome) == (504, "backend_failed")
        exchange = start(w, route, stream=True)
        connection = w.answers(exchange, "a")
        connection.data_received(STREAM_HEAD + chunked(*sample.events[: sample.begin + 1]))
        for _ in range(6):
            assert not connection.closed
            connection.data_received(chunked(sign))
            w.wait(deadlines.between_tokens / 4)
        assert connection.closed
        assert (exchange.row.outcome, exchange.row.code) == ("cut", "backend_timeout")


@streams
def test_an_error_event_at_the_beginning_goes_to_another_backend(route: Route) -> None:
    sample = SAMPLES[route.name]
    w = world("a", "b")
    exchange = start(w, route, stream=True)
    error = b'data: {"error":{"message":"dead","code":500}}\n\n'
    w.answers(exchange, "a").data_received(STREAM_HEAD + chunked(*sample.events[: sample.begin], error))
    assert not client_of(exchange).out
    w.answers(exchange, "b").data_received(STREAM_HEAD + chunked(*sample.events) + LAST_CHUNK)
    assert exchange.row.outcome == "ok"
    assert read(exchange).body.count(sample.events[0]) <= 1
    w.check()


@streams
def test_a_client_that_leaves_stops_it_and_pays_for_what_came(route: Route) -> None:
    sample = SAMPLES[route.name]
    w = world()
    exchange = start(w, route, stream=True)
    connection = w.answers(exchange, "a")
    connection.data_received(STREAM_HEAD + chunked(*sample.events[: sample.begin + 1]))
    client_of(exchange).ended = "abort"
    exchange.client_gone()
    assert connection.closed
    assert exchange.row.outcome == "client_gone"
    assert (*used(exchange), exchange.row.usage_source) == sample.partial


@streams
def test_an_error_event_after_the_beginning_is_the_last(route: Route) -> None:
    sample = SAMPLES[route.name]
    exchange = start(w := world(), route, stream=True)
    error = b'data: {"error":{"message":"the engine died","code":500}}\n\n'
    pieces = [*sample.events[: sample.begin + 1], error, *sample.events[sample.begin + 1 :]]
    w.answers(exchange, "a").data_received(STREAM_HEAD + chunked(*pieces) + LAST_CHUNK)
    last = read(exchange).body.split(b"\n\n")[-2].partition(b"data: ")[2]
    assert orjson.loads(last)["error"]["message"] == "the engine died"
    if route.dialect == ANTHROPIC:
        error_of(route, last)
    assert exchange.row.outcome == "cut"


# Messages and responses


def test_each_field_of_a_messages_usage_has_its_last_value() -> None:
    *head, _, stop = message_events()
    exchange = start(w := world(), BY_PATH[b"/v1/messages"], stream=True)
    deltas = [
        named("message_delta", usage={"output_tokens": 3}),
        named("message_delta", usage={"input_tokens": 1, "cache_read_input_tokens": 6, "output_tokens": 4}),
    ]
    w.answers(exchange, "a").data_received(STREAM_HEAD + chunked(*head, *deltas, stop) + LAST_CHUNK)
    assert used(exchange) == (7, 6, 4)


def test_a_response_that_fails_is_passed_on_and_counts_against_its_backend() -> None:
    exchange = start(w := world(), BY_PATH[b"/v1/responses"], stream=True)
    events = response_events("failed")
    w.answers(exchange, "a").data_received(STREAM_HEAD + chunked(*events) + LAST_CHUNK)
    assert read(exchange).body == b"".join(events)
    assert exchange.row.outcome == "cut"
    assert used(exchange) == (7, 2, 5)


@pytest.mark.parametrize("last", ["completed", "incomplete"])
def test_a_response_is_complete_with_its_last_event(last: str) -> None:
    exchange = start(w := world(), BY_PATH[b"/v1/responses"], stream=True)
    more = named("response.output_text.delta", delta="too late")
    w.answers(exchange, "a").data_received(STREAM_HEAD + chunked(*response_events(last), more) + LAST_CHUNK)
    assert read(exchange).body == b"".join(response_events(last))
    assert exchange.row.outcome == "ok"


def test_what_is_withheld_is_bounded() -> None:
    exchange = start(w := world(), BY_PATH[b"/v1/responses"], stream=True)
    connection = w.answers(exchange, "a")
    connection.data_received(STREAM_HEAD)
    created = named("response.created", response=response("in_progress", instructions="x" * 50_000))
    count = 0
    while not exchange.committed:
        connection.data_received(chunked(created))
        count += 1
        assert count * len(created) < MOST_WITHHELD + 2 * len(created)
    assert read(exchange).body == created * count


def test_a_background_response_tells_its_id_at_once() -> None:
    exchange = start(w := world(), BY_PATH[b"/v1/responses"], stream=True, background=True)
    events = response_events(background=True)
    w.answers(exchange, "a").data_received(STREAM_HEAD + chunked(events[0]))
    assert exchange.committed
    assert w.runtime.responses.find("resp_1", TENANT) is not None
