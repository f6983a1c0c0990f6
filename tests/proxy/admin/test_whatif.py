"""What `POST /explain` says would happen is what happens next, and saying it changes nothing."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from random import Random
from threading import Lock
from typing import Any

import orjson
import pytest

from policies.base import BackendView, Decision, Policy, RequestFacts, Send
from policies.files import KnownNames, read_policy
from proxy.access.keys import Key
from proxy.admin.http import state
from proxy.admin.whatif import BY_LOT, Asked, AskedError, Running, asked, what_if
from proxy.errors import RequestError
from proxy.explain import render_what_if
from proxy.openai import read_body
from proxy.responses import StoredResponse
from tests.proxy.fakes import World, read

NIGHT = """
utc_offset: "+08:00"
rules:
  - name: vip
    when: {tenant: [vip], stream: true}
    sites: [local]
    pick: least-load
  - name: night
    when: {time: 22:00-06:00}
    prefer: [{site: away}]
    pick: random
  - name: day
    prefer: [{site: local, spill: {enter: 50%, leave: 20%}}, {site: "*"}]
    pick: least-load
    queue: {wait: 10s, depth: 3}
"""


def world(*names: str, policy: str = NIGHT, **options: Any) -> World:
    made = World(*names, **options)
    found = read_policy(policy, "test", KnownNames(made.runtime.built.backends, frozenset({"away"})), 0)
    made.runtime.built.policy = found
    made.runtime.valve.swap(found.rules, made.loop.now)
    return made


def raw(**fields: Any) -> bytes:
    return orjson.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    )


def told(world: World, body: bytes | None = None, **options: Any) -> dict[str, Any]:
    asked = Asked(**{"at": "12:00", **options})
    running = Running(world.runtime)
    return what_if(running, read_body(asked.endpoint, raw() if body is None else body), asked)


def lines(shown: dict[str, Any]) -> list[str]:
    return [line.strip() for line in render_what_if(shown).splitlines()]


# What it says


def test_a_request_that_would_be_sent() -> None:
    made = world("a", "b", "c", slots=4)
    first = made.start()
    shown = told(made, raw(max_tokens=50), key=Key("", "acme", labels={"kind": "chat"}, priority=2))
    assert lines(shown) == [
        "now: sent to a",
        "tenant acme, model m, data class public, kind=chat",
        "chat, a stream, prompt of about 21 tokens, answer of about 50, at most 50; priority 2, "
        f"at {shown['request']['at']}",
        "rule 'vip' does not: its tenant is acme, not vip",
        "rule 'night' does not: it is not the time",
        "rule 'day' matches",
        "decision: send to a, by least-load under the rule 'day'",
        "because: only candidate",
        "tier 1 (site local) takes it",
        "a: 1 of 4 slots in use, saturation 0.25",
        "b is no candidate: of a later tier",
        "c is no candidate: of a later tier",
        "fallbacks: b, c",
        "forecast: none, for none has been measured",
    ]
    made.backend("a").observe_ttft(0.25, made.loop.now)
    assert lines(told(made))[-1] == "forecast: first token after 0.250 s"
    first.client_gone()


def test_a_tier_that_is_full_and_a_backend_that_may_not_serve_it() -> None:
    made = world("a", "b", "c", slots=1)
    running = made.start()
    made.backend("b").data_classes = frozenset({"internal"})
    made.runtime.fleet.version += 1
    found = lines(told(made))
    assert found[0] == "now: sent to c"
    assert "tier 1 (site local) does not take it: 100% full" in found
    assert "tier 2 (any other backend) takes it" in found
    assert "b is out: away does not accept data class public" in found
    assert "a is no candidate: no free slot: 1 of 1 in use" in found
    running.client_gone()


def test_another_time_meets_another_rule() -> None:
    made = world("a", "b")
    assert lines(told(made, at="23:00"))[0] == "now: sent to b"
    assert told(made, at="23:00")["request"]["at"].endswith("T23:00:00+08:00")
    assert lines(told(made, at="2026-01-31T05:59"))[0] == "now: sent to b"
    assert lines(told(made, at="2026-01-31T06:00"))[0] == "now: sent to a"
    assert lines(told(made, at="2026-01-30T15:00+00:00"))[0] == "now: sent to b"
    years = ("0001-01-01T00:00+14:00", "9999-12-31T23:59-14:00")
    for wrong in ("25:00", "tomorrow", "23", *years):
        with pytest.raises(AskedError, match=r"at: expected a time such as 23:00 or 2026-01-31T23:00"):
            told(made, at=wrong)


def test_one_that_would_wait_and_one_that_would_find_the_queue_full() -> None:
    made = world("a", slots=1)
    held = [made.start() for _ in range(3)]
    found = lines(told(made))
    assert found[0] == "now: held for up to 10 s; 2 wait already"
    held.append(made.start())
    answer = told(made)["answer"]
    refused = made.start()
    assert (answer["status"], answer["code"], answer["message"]) == (
        429,
        "queue_full",
        read(refused).error["message"],
    )
    for exchange in held:
        exchange.client_gone()


def test_a_backend_that_is_down_and_what_probes_say() -> None:
    made = world("a", "b")
    made.runtime.probes = lambda: {"a": {"since_s": 1.0, "reason": "TCP connect: refused"}}
    made.backend("a").probed_up = False
    made.runtime.fleet.refresh(made.loop.now)
    found = lines(told(made))
    assert "tier 1 (site local) has no backend that is available" in found
    assert "a is no candidate: down: TCP connect: refused" in found


def test_a_full_engine_and_slots_kept_for_others_are_told_apart() -> None:
    made = world("a", "b")
    made.backend("a").waiting, made.backend("a").sampled_at = 9, made.loop.now
    assert "a is no candidate: its engine is full: saturation 1.80" in lines(told(made))


# It is what happens


REFUSED: list[tuple[bytes, dict[str, Any]]] = [
    (b"{", {}),
    (b'{"model": "m", "model": "m", "messages": []}', {}),
    (raw(n=0), {}),
    (raw(messages=7), {}),
    (raw(model="other"), {}),
    (raw(model="alias"), {}),
    (raw(messages=[{"role": "user", "content": [{"image_url": {"url": "http://x"}}]}]), {}),
    (raw(), {"models": frozenset({"x"})}),
    (raw(), {"data_class": "secret"}),
    (raw(), {"rpm": 0}),
    (raw(max_tokens=500), {"tpm": 100}),
    (raw(), {"concurrency": 0}),
    (raw(), {"budget_nano": 1}),
]


@pytest.mark.parametrize(("body", "limits"), REFUSED)
def test_a_refusal_is_the_one_that_a_client_gets(body: bytes, limits: dict[str, Any]) -> None:
    key = Key("k", "acme", **limits) if limits else None
    made = world("b", "a", aliases={"alias": "nobody"}, key=key)
    made.backend("b").site = "away"
    for one in made.runtime.fleet:
        one.data_classes = frozenset({"public"})
    made.runtime.fleet.version += 1
    before = state_of(made)
    try:
        answer = told(made, body, key=key)["answer"]
        foretold = (answer["status"], answer["code"], answer["message"])
    except RequestError as error:
        foretold = (error.status, error.code, error.message)
    assert state_of(made) == before
    exchange = made.start(raw=body)
    found = read(exchange)
    assert foretold == (found.status, found.error["code"], found.error["message"])


@pytest.mark.parametrize("seed", range(5))
def test_what_is_told_happens_next(seed: int) -> None:
    """At night `random` draws: what is told is what is drawn next, however often it is told."""
    made = world("a", "b", "c", "d", policy=NIGHT.replace("22:00-06:00", "00:00-23:59"), slots=50)
    for _ in range(10 + seed):
        before = state_of(made)
        shown = [told(made, at="") for _ in range(3)]
        assert shown[0] == shown[1] == shown[2]
        assert state_of(made) == before
        exchange = made.start()
        assert exchange.routing is not None
        assert getattr(exchange.routing.decision, "backend", "") == shown[0]["decisions"][0]["backend"]
        assert exchange.routing.request.prompt_tokens == shown[0]["request"]["prompt_tokens"]
    for exchange in list(made.all):
        exchange.client_gone()


def test_a_session_and_an_alias_are_seen_as_from_a_client() -> None:
    sticky = "rules: [{name: all, pick: session-affinity}]"
    made = world("a", "b", "c", "d", policy=sticky, aliases={"gpt": "m"})
    homes = set()
    for number in range(8):
        shown = told(made, raw(model="gpt"), session=f"s{number}")
        assert shown["request"]["served_model"] == "m"
        assert shown["request"]["has_session"]
        exchange = made.start(raw=raw(model="gpt", user=f"s{number}"))
        assert exchange.routing is not None
        assert exchange.routing.decision.backend == shown["decisions"][0]["backend"]  # type: ignore[union-attr]
        homes.add(shown["decisions"][0]["backend"])
        exchange.client_gone()
    assert len(homes) > 1


PARTS = """
rules:
  - name: all
    split: [{name: canary, share: 50%, backend: b}, {name: stable, share: 50%}]
"""


def test_the_part_of_a_split_is_the_sessions_own() -> None:
    made = world("a", "b", policy=PARTS)
    parts = set()
    for number in range(8):
        shown = told(made, raw(user=f"s{number}"))
        (decision,) = shown["decisions"]
        exchange = made.start(raw=raw(user=f"s{number}"))
        assert exchange.routing is not None
        assert (decision["part"], decision["backend"]) == (
            exchange.routing.part,
            exchange.routing.decision.backend,  # type: ignore[union-attr]
        )
        assert f"under the rule 'all', part '{decision['part']}'" in render_what_if(shown)
        assert (shown["notes"], shown["parts"]) == ([], [])
        parts.add(decision["part"])
        exchange.client_gone()
    assert parts == {"canary", "stable"}


@pytest.mark.parametrize("share", [1, 5, 30])
def test_without_a_session_the_usual_part_is_told_and_the_others_too(share: int) -> None:
    text = PARTS.replace("name: canary, share: 50%", f"name: canary, share: {share}%")
    made = world(
        "a", "b", policy=text.replace("name: stable, share: 50%", f"name: stable, share: {100 - share}%")
    )
    shown = told(made)
    assert shown["notes"] == [BY_LOT]
    found = lines(shown)
    assert found[:4] == [
        "now: sent to a",
        f"note: {BY_LOT}",
        f"{100 - share}% of such requests, part 'stable': sent to a",
        f"{share}% of such requests, part 'canary': sent to b",
    ]
    assert "decision: send to a, by least-load under the rule 'all', part 'stable'" in found


def test_what_would_become_of_each_part_is_what_becomes_of_its_requests() -> None:
    text = PARTS.replace("backend: b}", "backend: b, strict: true}, {name: none, share: 0%, backend: a}")
    made = world("a", "b", policy=text, slots=1)
    made.backend("b").draining = True
    made.runtime.fleet.refresh(made.loop.now)
    shown = {part["part"]: part for part in told(made)["parts"]}
    assert (shown["canary"]["decision"], shown["canary"]["code"]) == ("reject", "no_backend")
    assert shown.keys() == {"canary", "stable"}
    assert any(line.endswith("part 'canary': refused with no_backend") for line in lines(told(made)))


@pytest.mark.parametrize("need", ["prefix", "hashes"])
def test_prompts_are_hashed_where_a_policy_needs_it(need: str) -> None:
    made = world("a", "b")
    made.runtime.fleet.needs = frozenset({need})
    long = raw(messages=[{"role": "user", "content": "x" * 9000}])
    exchange = made.start(raw=long)
    assert exchange.facts is not None
    assert len(exchange.facts.prefix) == 4
    from proxy.admin import whatif

    facts = whatif._facts(Running(made.runtime), read_body("chat", long), Asked())
    assert facts.prefix == exchange.facts.prefix
    exchange.client_gone()


def test_a_stored_response_stays_where_it_is() -> None:
    made = world("a", "b")
    body = orjson.dumps({"model": "m", "input": "hi", "previous_response_id": "resp_1"})
    with pytest.raises(RequestError, match="there is no response 'resp_1'"):
        told(made, body, endpoint="responses")
    made.runtime.responses.add("resp_1", StoredResponse("b", "default", "m", metered=False))
    assert told(made, body, endpoint="responses")["decisions"][0]["backend"] == "b"


def state_of(made: World) -> Any:
    """Everything that `/state` shows, and what it does not."""
    runtime = made.runtime
    limits = runtime.limits
    return (
        orjson.dumps(state(runtime, 0.0)),
        [repr(one) for one in runtime.fleet],
        [repr(flag) for flag in runtime.valve.rules.spills],
        [pickle.dumps(one.policy) for rule in runtime.valve.rules.rules for one in rule.choosers],
        len(limits),
        sorted(runtime.held),
        runtime.fleet.version,
        len(made.journal.opened),
        len(runtime.observer.recent),
    )


class NoCopy(Policy):
    """Holds what cannot be copied."""

    def __init__(self, rng: Random) -> None:
        self.lock = Lock()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(backends[0].name)


def test_a_policy_that_cannot_be_copied_is_not_asked() -> None:
    made = world("a", policy=f"rules: [{{name: all, pick: '{__name__}:NoCopy'}}]")
    with pytest.raises(AskedError, match=r"what the policies would do is not known: one cannot be copied"):
        told(made)


# What is asked for


def find(key_id: str) -> Key | None:
    return {"k": Key("k", "acme"), "old": Key("old", "acme", expires=5.0)}.get(key_id)


def test_a_key_or_what_it_says() -> None:
    assert asked([], find, 10.0) == Asked()
    assert asked([("key", "k"), ("at", "1:00"), ("session", "s")], find, 10.0) == Asked(
        key=Key("k", "acme"), at="1:00", session="s"
    )
    given = [
        ("tenant", "t"),
        ("data_class", "secret"),
        ("priority", "-3"),
        ("label", "a=b=c"),
        ("label", "x=y"),
    ]
    assert asked(given, find, 10.0).key == Key(
        "", "t", data_class="secret", priority=-3, labels={"a": "b=c", "x": "y"}
    )
    assert asked([("label", "a=b")], find, 10.0).key == Key("", "default", labels={"a": "b"})
    for key_id in ("none", "old"):
        with pytest.raises(RequestError, match=f"no valid API key has the id '{key_id}'"):
            asked([("key", key_id)], find, 10.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([("endpoint", "transcriptions")], "endpoint: no endpoint with a JSON body is called"),
        ([("endpoint", "nowhere")], "there are chat, completions, responses, messages,"),
        ([("key", "k"), ("tenant", "t")], "give the key or these, not both"),
        ([("key", "k"), ("label", "a=b")], "give the key or these, not both"),
        ([("label", "a")], "label: expected NAME=VALUE, got 'a'"),
        ([("label", "a=")], "labels: must be text and not empty"),
        ([("priority", "high")], "priority: expected a whole number, got 'high'"),
        ([("priority", "9" * 30)], "priority: must be a whole number from -2147483648 to 2147483647, not 99"),
        ([("data_class", "Ge Heim")], "data_class: must be a word such as public, internal or restricted"),
        ([("tenant", "")], "tenant: must be text and not empty"),
        ([("label", "a=b"), ("label", "a=c")], "label: a given twice"),
        ([("tenant", "a"), ("tenant", "b")], "tenant: given twice"),
        ([("color", "red")], "there is no parameter 'color'"),
    ],
)
def test_what_cannot_be_asked_for(given: list[tuple[str, str]], said: str) -> None:
    with pytest.raises(AskedError) as caught:
        asked(given, find, 10.0)
    assert said in str(caught.value)
