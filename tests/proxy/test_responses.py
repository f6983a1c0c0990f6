"""Stored responses: who finds them, where requests about them go, and that their tokens are counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from proxy.access.keys import Key
from proxy.exchange import Exchange, State
from proxy.responses import StoredResponse, StoredResponses
from tests.proxy.endpoint_samples import response, response_events
from tests.proxy.fakes import LAST_CHUNK, STREAM_HEAD, World, chunked, close, read, whole


def stored(backend: str = "a", tenant: str = "acme", *, metered: bool = False) -> StoredResponse:
    return StoredResponse(backend, tenant, "m", metered)


# The store


def test_only_its_tenant_finds_a_response() -> None:
    responses = StoredResponses()
    responses.add("r", stored())
    assert responses.find("r", "acme") == stored()
    assert responses.find("r", "other") is None
    assert responses.find("s", "acme") is None


def test_an_id_that_is_taken_cannot_be_taken_over() -> None:
    responses = StoredResponses()
    responses.add("r", stored())
    responses.add("r", stored("b", "other"))
    assert responses.find("r", "acme") == stored()
    assert responses.find("r", "other") is None


def test_the_oldest_is_forgotten() -> None:
    responses = StoredResponses(most=2)
    for name in "abc":
        responses.add(name, stored())
    assert [responses.find(name, "acme") is not None for name in "abc"] == [False, True, True]


def test_tokens_are_counted_once() -> None:
    responses = StoredResponses()
    responses.add("r", stored())
    counted = [responses.count(name, 7, 5, ended=True) for name in ("r", "r", "unknown")]
    assert counted == [(7, 5), (0, 0), (0, 0)]


def test_what_was_estimated_before_is_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    responses = StoredResponses(path)
    responses.add("r", stored())
    assert responses.count("r", 4, 2, ended=False) == (4, 2)
    assert responses.count("r", 4, 2, ended=False) == (0, 0)
    responses.write(responses.take_unwritten())
    responses = StoredResponses(path)  # as a restart does
    assert responses.count("r", 0, 2, ended=False, resumed=True) == (0, 2)
    assert responses.count("r", 3, 9, ended=True) == (0, 5)
    assert responses.count("r", 3, 9, ended=True) == (0, 0)


def test_a_restart_knows_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    responses = StoredResponses(path)
    for name in "abc":
        responses.add(name, stored())
    responses.write(responses.take_unwritten())
    responses.forget("a")
    responses.count("b", 7, 5, ended=True)
    responses.write(responses.take_unwritten())
    assert path.stat().st_mode & 0o777 == 0o600
    for _ in range(2):  # the second reads what the first has written anew
        again = StoredResponses(path)
        found = [again.find(name, "acme") for name in "abc"]
        assert found == [None, StoredResponse("a", "acme", "m", True, 7, 5), stored()]
    assert [again.find(name, "acme") is not None for name in "bc"] == [True, True]
    assert len(path.read_bytes().splitlines()) == 2
    assert len(StoredResponses(path, most=1)) == 1


def test_two_processes_find_each_others_until_one_has_ended(tmp_path: Path) -> None:
    def write(responses: StoredResponses) -> None:
        responses.write(responses.take_unwritten())

    path = tmp_path / "responses.jsonl"
    old = StoredResponses(path, most=3)
    old.add("a", stored())
    write(old)
    new = StoredResponses(path, most=3, shared=True)
    old.share()
    for name in "bc":
        old.add(name, stored())
    new.add("d", stored("b"))
    write(old)
    write(new)
    assert [new.find(name, "acme") for name in "bc"] == [stored(), stored()]
    assert old.find("d", "acme") == stored("b")
    assert old.count("b", 7, 5, ended=True) == (7, 5)
    write(old)
    assert new.count("b", 7, 5, ended=True) == (0, 0)
    old.count("c", 7, 5, ended=True)  # and does not come to write it
    assert new.count("c", 7, 5, ended=True) == (7, 5)
    new.forget("c")
    write(new)
    for number in range(9):
        old.add(f"e{number}", stored())
        write(old)
    new.unshare()
    assert new.find("e8", "acme") == stored()
    assert len(new) == 3


def test_a_cut_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    responses = StoredResponses(path)
    for name in "ab":
        responses.add(name, stored())
    lines = responses.take_unwritten()
    path.write_bytes(lines[:-5])
    again = StoredResponses(path)
    assert [again.find(name, "acme") is not None for name in "ab"] == [True, False]


def test_the_file_does_not_grow_with_what_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    responses = StoredResponses(path, most=10)
    for number in range(95):
        responses.add(str(number), stored())
        responses.write(responses.take_unwritten())
        assert len(path.read_bytes().splitlines()) <= 20
    again = StoredResponses(path, most=10)
    assert [name for name in map(str, range(95)) if again.find(name, "acme")] == [
        str(n) for n in range(85, 95)
    ]


def test_what_is_written_after_a_failure_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    responses = StoredResponses(path)
    path.unlink()
    path.mkdir()
    responses.add("a", stored())
    responses.write(responses.take_unwritten())
    path.rmdir()
    path.write_bytes(b'["a","b')  # as far as the disk had room
    responses.add("c", stored())
    responses.write(responses.take_unwritten())
    assert StoredResponses(path).find("c", "acme") == stored()


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    responses = StoredResponses(tmp_path / "responses.jsonl")
    (tmp_path / "responses.jsonl").unlink()
    (tmp_path / "responses.jsonl").mkdir()
    for _ in range(2):
        responses.write(b"x\n")
    assert len(caplog.records) == 1


# Requests about them


def ask(world: World, method: str, path: str) -> Exchange:
    name = {"GET": "responses-get", "DELETE": "responses-delete", "POST": "responses-cancel"}[method]
    return world.start(endpoint=name, raw=b"", method=method.encode(), target=path.encode())


def create(world: World, **fields: Any) -> Exchange:
    body = {"model": "m", "input": "hi", **fields}
    target = b"/v1/responses"
    return world.start(endpoint="responses", raw=orjson.dumps(body), target=target)


def two_tenants() -> tuple[World, Key, Key]:
    return World("a", "b"), Key("k", "acme"), Key("l", "other")


def as_tenant(world: World, key: Key) -> None:
    world.key = key


def test_it_goes_to_the_backend_that_made_it_and_is_counted_once() -> None:
    world, acme, _ = two_tenants()
    as_tenant(world, acme)
    made = create(world)
    world.refuses("a")
    world.answers(made, "b").data_received(whole(200, orjson.dumps(response())))
    assert made.row.completion_tokens == 5
    got = ask(world, "GET", "/v1/responses/resp_1?include[]=output")
    connection = got.connection
    assert connection is not None
    assert connection.endpoint.name == "b"
    written: bytes = connection.transport.written  # type: ignore[union-attr]
    assert written.rpartition(b"GET ")[2].startswith(b"/v1/responses/resp_1?include[]=output HTTP/1.1\r\n")
    connection.data_received(whole(200, orjson.dumps(response())))
    assert read(got).status == 200
    assert (got.row.completion_tokens, got.row.usage_source) == (0, "none")


def test_another_tenant_gets_404_and_no_backend_hears_of_it() -> None:
    world, acme, other = two_tenants()
    world.runtime.responses.add("resp_1", stored())
    as_tenant(world, other)
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        found = read(ask(world, method, "/v1/responses/resp_1" + path))
        assert (found.status, found.error["code"]) == (404, "response_not_found")
    found = read(create(world, previous_response_id="resp_1"))
    assert (found.status, found.error["param"]) == (404, "previous_response_id")
    assert not world.dialled()
    as_tenant(world, acme)
    ask(world, "GET", "/v1/responses/resp_1")
    assert world.dialled() == ["a"]


def test_a_key_for_an_alias_reaches_what_it_has_made() -> None:
    world = World("a", aliases={"fast": "m"})
    as_tenant(world, Key("k", "acme", models=frozenset({"fast", "other"})))
    made = create(world, model="fast")
    world.answers(made, "a").data_received(whole(200, orjson.dumps(response())))
    for method, end in (("GET", ""), ("POST", "/cancel"), ("DELETE", "")):
        asked = ask(world, method, "/v1/responses/resp_1" + end)
        assert asked.connection is not None
        asked.connection.data_received(whole(200, orjson.dumps(response())))
        assert read(asked).status == 200


def test_a_key_for_another_model_does_not_reach_it() -> None:
    world = World("a", aliases={"fast": "m", "slow": "n"})
    world.runtime.responses.add("resp_1", stored())
    as_tenant(world, Key("k", "acme", models=frozenset({"n", "slow"})))
    refused = read(ask(world, "GET", "/v1/responses/resp_1"))
    assert (refused.status, refused.error["code"]) == (403, "model_not_allowed")
    assert not world.dialled()


def test_a_background_response_is_counted_by_who_first_sees_its_end() -> None:
    world, acme, _ = two_tenants()
    as_tenant(world, acme)
    made = create(world, background=True)
    queued = orjson.dumps(response("queued", background=True))
    world.answers(made, "a").data_received(whole(200, queued))
    tokens = [made.row.completion_tokens]
    for status in ("in_progress", "completed", "completed"):
        got = ask(world, "GET", "/v1/responses/resp_1")
        assert got.connection is not None
        got.connection.data_received(whole(200, orjson.dumps(response(status, background=True))))
        tokens.append(got.row.completion_tokens)
    assert tokens == [0, 0, 5, 0]


def leave(exchange: Exchange) -> None:
    """The client hangs up."""
    exchange.client.ended = "abort"  # type: ignore[attr-defined]
    exchange.client_gone()


def test_a_background_stream_that_is_left_is_counted_as_far_as_it_was_read() -> None:
    world, acme, _ = two_tenants()
    as_tenant(world, acme)
    made = create(world, background=True, stream=True)
    events = response_events(background=True)
    world.answers(made, "a").data_received(STREAM_HEAD + chunked(*events[:4]))
    leave(made)
    assert made.facts is not None
    row = made.row
    assert (row.prompt_tokens, row.completion_tokens) == (made.facts.prompt_tokens, 3)  # "hello you"
    assert (row.usage_source, row.cost_nano > 0) == ("estimated", True)
    world.check()


def test_a_stored_stream_that_is_left_is_counted_as_far_as_it_was_read() -> None:
    world, acme, _ = two_tenants()
    as_tenant(world, acme)
    world.runtime.responses.add("resp_1", stored())
    events = response_events(background=True)
    tokens = []
    for query, some in (("", events[:3]), ("", events[:3]), ("&starting_after=2", events[3:4]), ("", events)):
        got = ask(world, "GET", "/v1/responses/resp_1?stream=true" + query)
        connection = got.connection or world.answers(got, "a")
        connection.data_received(STREAM_HEAD + chunked(*some))
        if some is events:
            connection.data_received(LAST_CHUNK)
        else:
            leave(got)
        tokens.append((got.row.prompt_tokens, got.row.completion_tokens, got.row.usage_source))
    assert tokens == [(0, 2, "estimated"), (0, 0, "none"), (0, 1, "estimated"), (7, 2, "reported")]
    world.check()


def test_a_background_stream_that_is_left_is_counted_later_and_not_twice() -> None:
    world, acme, _ = two_tenants()
    as_tenant(world, acme)
    made = create(world, background=True, stream=True)
    events = response_events(background=True)
    world.answers(made, "a").data_received(STREAM_HEAD + chunked(*events[:3]))
    leave(made)
    assert made.row.completion_tokens == 2
    got = ask(world, "GET", "/v1/responses/resp_1?stream=true")
    world.answers(got, "a").data_received(STREAM_HEAD + chunked(*events) + LAST_CHUNK)
    assert read(got).body == b"".join(events)
    assert (got.row.outcome, got.row.completion_tokens, got.row.usage_source) == ("ok", 3, "reported")
    assert (got.row.prompt_tokens, got.row.cached_tokens) == (0, 0)  # the estimate was higher


@pytest.mark.parametrize("how", ["reset", "stale", "500"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_runs_in_the_background_is_sent_once(how: str, stream: bool) -> None:
    world = World("a", "b")
    if how == "stale":
        world.answers(create(world), "a").data_received(whole(200, orjson.dumps(response())))
    made = create(world, background=True, stream=stream)
    connection = made.connection or world.answers(made, "a")
    if how == "500":
        connection.data_received(whole(500, b"{}"))
    else:
        close(connection)
    assert (read(made).status >= 500, made.row.attempts, world.dialled()) == (True, 1, [])
    world.check()


def test_what_runs_in_the_background_may_go_elsewhere_if_it_was_never_sent() -> None:
    world = World("a", "b")
    made = create(world, background=True)
    world.refuses("a")
    world.answers(made, "b").data_received(whole(200, orjson.dumps(response("queued", background=True))))
    assert (read(made).status, made.row.backend) == (200, "b")


def test_what_runs_in_the_background_has_no_second_attempt() -> None:
    world = World("a", "b", hedging={"after": "1s", "ratio": 1.0})
    made = create(world, background=True, stream=True)
    world.answers(made, "a")
    world.wait(2.0)
    assert (made.row.attempts, world.dialled()) == (1, [])
    other = create(world, stream=True)
    world.wait(2.0)
    assert (other.row.attempts, world.dialled()) == (2, ["a", "b"])


def test_a_deleted_one_is_forgotten() -> None:
    world, acme, _ = two_tenants()
    as_tenant(world, acme)
    world.runtime.responses.add("resp_1", stored())
    gone = ask(world, "DELETE", "/v1/responses/resp_1")
    world.answers(gone, "a").data_received(whole(200, b'{"deleted":true}'))
    assert read(ask(world, "GET", "/v1/responses/resp_1")).status == 404


def test_one_that_could_not_be_deleted_stays() -> None:
    world, acme, _ = two_tenants()
    as_tenant(world, acme)
    world.runtime.responses.add("resp_1", stored())
    gone = ask(world, "DELETE", "/v1/responses/resp_1")
    world.answers(gone, "a").data_received(whole(405, b'{"detail":"Method Not Allowed"}'))
    assert world.runtime.responses.find("resp_1", "acme") is not None


def test_what_goes_on_from_a_response_waits_for_its_backend_and_asking_after_it_does_not() -> None:
    world = World("a", "b", slots=1, key=Key("k", "acme", concurrency=8))
    world.runtime.responses.add("resp_1", stored())
    first = create(world)
    running = world.answers(first, "a")
    waiting = create(world, previous_response_id="resp_1")
    assert waiting.state is State.HELD  # though b is free
    cancel = ask(world, "POST", "/v1/responses/resp_1/cancel")
    assert cancel.state is State.CONNECTING
    world.answers(cancel, "a").data_received(whole(200, orjson.dumps(response())))
    assert waiting.state is State.HELD
    running.data_received(whole(200, orjson.dumps(response())))
    assert waiting.lease is not None
    assert waiting.lease.backend.name == "a"
    world.check()


def test_its_backend_down_is_503_and_gone_is_404() -> None:
    world, acme, _ = two_tenants()
    as_tenant(world, acme)
    world.runtime.responses.add("resp_1", stored())
    world.runtime.responses.add("resp_2", stored("left"))
    world.backend("a").probed_up = False
    world.runtime.fleet.refresh(world.loop.now)
    assert read(ask(world, "GET", "/v1/responses/resp_1")).status == 503
    assert read(create(world, previous_response_id="resp_1")).status == 503
    assert read(ask(world, "GET", "/v1/responses/resp_2")).status == 404
    assert not world.dialled()


def test_a_client_cannot_name_its_response_itself() -> None:
    world, acme, _ = two_tenants()
    as_tenant(world, acme)
    made = create(world, request_id="resp_of_somebody_else")
    connection = world.answers(made, "a")
    assert b"somebody" not in connection.transport.written  # type: ignore[union-attr]
