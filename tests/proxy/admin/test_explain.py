"""What `GET /explain/{id}` says of a request, and how `tidegate explain` puts it."""

from __future__ import annotations

from typing import Any

import pytest

from policies.files import read_policy
from proxy.access.keys import Key
from proxy.admin.explain import explanation
from proxy.exchange import Exchange
from proxy.explain import render
from tests.proxy.fakes import STREAM_HEAD, World, answer_body, chunked, close, event, whole


class Keys:
    """Keys by id."""

    empty = False
    version = ""

    def __init__(self, *keys: Key) -> None:
        self.keys = {key.id: key for key in keys}

    def find(self, key_id: str) -> Key | None:
        return self.keys.get(key_id)


def explained(world: World, exchange: Exchange) -> dict[str, Any]:
    record = world.runtime.observer.find(exchange.id)
    assert record is not None
    return explanation(world.runtime, record)


def words(world: World, exchange: Exchange) -> list[str]:
    return [line.strip() for line in render(explained(world, exchange)).splitlines()]


def probes_say_down(world: World, name: str, since_s: float | None) -> None:
    world.runtime.probes = lambda: {name: {"since_s": since_s, "reason": "GET /health: no answer within 1 s"}}
    world.backend(name).probed_up = False
    world.runtime.fleet.refresh(world.loop.now)


def trip(world: World, name: str) -> None:
    """Open the circuit breaker of a backend: requests to it fail, each is served by another one."""
    for _ in range(5):
        exchange = world.start(stream=False)
        world.refuses(name)
        if exchange.connection is None:
            other = next(task for task in world.dialled())
            world.connects(other)
        assert exchange.connection is not None
        exchange.connection.data_received(whole(200, answer_body()))
        for endpoint in world.endpoints.values():
            for connection in endpoint.connections:
                close(connection)


def test_an_answer_that_was_no_stream_had_no_first_token() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    world.answers(exchange, "a").data_received(whole(200, answer_body()))
    lines = words(world, exchange)
    assert "not a stream: the answer came whole, so nobody saw its first token" in lines
    assert "unknown" not in "\n".join(lines)
    assert explained(world, exchange)["why"] == ""


def test_a_stream_had_one() -> None:
    world = World("a")
    exchange = world.start()
    world.wait(0.25)
    world.relaying(exchange, "a").data_received(chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    assert "first token after 0.250 s; no forecast, for none had been measured" in words(world, exchange)


def test_tiers_are_told_by_number_and_in_words() -> None:
    world = World("a", "b", slots=1)
    first, second = world.start(), world.start()
    world.connects("a")
    world.relaying(second, "b")
    second.client_gone()
    lines = words(world, second)
    assert "tier 1 (site local) did not take it: 100% full" in lines
    assert "tier 2 (any other backend) took it" in lines
    assert "a was no candidate: had no free slot, or was not available then" in lines
    first.client_gone()
    lines = words(world, first)
    assert "tier 1 (site local) took it" in lines
    assert "b was no candidate: of a later tier" in lines


def test_the_part_of_a_split_is_told_with_who_is_of_another() -> None:
    world = World("a", "b")
    parts = "[{name: canary, share: 100%, backend: b}, {name: stable, share: 0%}]"
    policy = read_policy(f"rules: [{{name: all, split: {parts}, avoid: [{{backend: b}}]}}]", "test")
    world.runtime.built.policy = policy
    world.runtime.valve.swap(policy.rules, world.loop.now)
    exchange = world.start()
    world.relaying(exchange, "b")
    exchange.client_gone()
    lines = words(world, exchange)
    assert "decision 1: send to b, by least-load under the rule 'all', part 'canary'" in lines
    assert "a was out: of part 'stable', and the request is for 'canary'" in lines
    assert "tier 2 (what it avoids) took it" in lines


def test_a_tier_that_asked_to_wait_is_told_with_its_reason() -> None:
    world = World("a", "b")
    limited = "{site: local, pick: {policy: weighted-qps, max_qps: {a: 1}}}"
    policy = read_policy(f"rules: [{{name: all, prefer: [{limited}, {{site: '*'}}]}}]", "test")
    world.runtime.built.policy = policy
    world.runtime.valve.swap(policy.rules, world.loop.now)
    first, second = world.start(), world.start()
    world.connects("a")
    world.relaying(second, "b")
    second.client_gone()
    first.client_gone()
    lines = words(world, second)
    assert "tier 1 (site local) did not take it: 12% full" in lines
    assert "tier 2 (any other backend) took it" in lines
    said = "its tier had room, but asked to wait: every backend is at its max_qps"
    assert f"a was no candidate: {said}" in lines


def test_a_backend_that_was_down_already_is_named_with_the_reason() -> None:
    world = World("a", "b")
    world.wait(60)
    probes_say_down(world, "a", 30.0)
    exchange = world.start(stream=False)
    world.answers(exchange, "b").data_received(whole(200, answer_body()))
    lines = words(world, exchange)
    assert "tier 1 (site local) had no backend that was available" in lines
    assert "a was no candidate: down: GET /health: no answer within 1 s" in lines


def test_a_backend_that_went_down_later_is_not_said_to_have_been() -> None:
    world = World("a", "b", slots=1)
    first = world.start()
    exchange = world.start(stream=False)
    world.connects("a")
    world.answers(exchange, "b").data_received(whole(200, answer_body()))
    world.wait(60)
    probes_say_down(world, "a", 30.0)
    said = "had no free slot, or was not available then (now: down: GET /health: no answer within 1 s)"
    assert f"a was no candidate: {said}" in words(world, exchange)
    first.client_gone()


def test_an_open_breaker_is_named() -> None:
    world = World("a", "b")
    trip(world, "a")
    exchange = world.start(stream=False)
    world.answers(exchange, "b").data_received(whole(200, answer_body()))
    said = "circuit breaker open after 5 failures, tried again in 10 s"
    assert f"a was no candidate: {said}" in words(world, exchange)
    world.wait(3)
    assert explained(world, exchange)["decisions"][0]["others"]["a"].endswith("in 7 s")
    world.wait(8)
    said = "had no free slot, or was not available then"
    assert f"a was no candidate: {said}" in words(world, exchange)


@pytest.mark.parametrize("pause", [True, False])
def test_with_nobody_available_each_is_named(pause: bool) -> None:
    world = World("a")
    if pause:
        world.runtime.fleet.back_off("a", 7.0, world.loop.now)
        said = "it asked for a pause of 7 s more"
    else:
        world.backend("a").draining = True
        world.runtime.fleet.refresh(world.loop.now)
        said = "it takes nothing new, and ends when what runs on it has ended"
    exchange = world.start()
    lines = words(world, exchange)
    assert f"a was no candidate: was not available then (now: {said})" in lines
    assert any(line.startswith("why: every backend that may serve it ") for line in lines)
    assert "it reached no backend; held 0.000 s" in lines
    assert "forecast" not in "\n".join(lines)


def test_a_retry_names_what_had_failed() -> None:
    world = World("a", "b", "c")
    exchange = world.start(stream=False)
    world.refuses("a")
    world.refuses("b")
    world.connects("c").data_received(whole(200, answer_body()))
    decisions = explained(world, exchange)["decisions"]
    assert [decision["backend"] for decision in decisions] == ["a", "b", "c"]
    assert decisions[1]["others"] == decisions[2]["others"] == {}  # a fallback compares nobody


def test_why_a_stream_was_cut() -> None:
    world = World("a")
    exchange = world.start()
    connection = world.answers(exchange, "a")
    connection.data_received(STREAM_HEAD + chunked(event("x", completion=1)))
    close(connection, ConnectionResetError(104, "Connection reset by peer"))
    lines = words(world, exchange)
    assert lines[0] == f"request {exchange.id}: 200 cut (backend_reset), a (local)"
    assert lines[1] == (
        "why: the answer was cut after 1 token: the backend closed the connection before its answer was complete"
    )


LIMITED = {
    "rate_limit_requests": (Key("id", "acme", rpm=1), "1 requests per minute were used"),
    "rate_limit_tokens": (Key("id", "acme", tpm=3), "its 3 tokens per minute do not cover it"),
    "concurrency": (Key("id", "acme", concurrency=1), "1 requests at once were running"),
    "budget": (
        Key("id", "acme", budget_nano=1),
        "what is left of 1e-09 EUR per month does not cover it",
    ),
}


@pytest.mark.parametrize("code", LIMITED)
def test_why_a_key_was_turned_away(code: str) -> None:
    key, said = LIMITED[code]
    world = World("a", key=key)
    world.runtime.keys = Keys(key)  # type: ignore[assignment]
    first, second = world.start(), world.start()
    ended = second if second.row.code else first
    assert words(world, ended)[:2] == [
        f"request {ended.id}: 429 rejected ({code}), no backend",
        f"why: limit of key id: {said}",
    ]
    world.runtime.keys = Keys()  # type: ignore[assignment]
    assert explained(world, ended)["why"].startswith("limit of key id: ")  # it is gone now


def test_why_a_request_was_too_long() -> None:
    world = World("a")
    world.backend("a").context_tokens = {"m": 100}
    world.runtime.fleet.version += 1
    exchange = world.start(max_tokens=2000)
    said = explained(world, exchange)["why"]
    assert said.startswith("a prompt of about ")
    assert "and up to 2000 for the answer: it is longer than the context of every backend" in said


def test_a_client_that_left() -> None:
    world = World("a")
    exchange = world.start()
    world.relaying(exchange, "a")
    exchange.client_gone()
    assert explained(world, exchange)["why"] == "the client left before the answer was complete"


def test_a_backends_own_refusal() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    world.answers(exchange, "a").data_received(whole(500, b"{}"))
    assert explained(world, exchange)["why"] == "the backend itself answered 500"


def test_a_rule_that_is_gone_is_no_fault() -> None:
    world = World("a")
    exchange = world.start(stream=False)
    world.answers(exchange, "a").data_received(whole(200, answer_body()))
    record = world.runtime.observer.find(exchange.id)
    assert record is not None
    record.routings[0].rule = "removed by a reload"
    assert "tier 1 took it" in words(world, exchange)
