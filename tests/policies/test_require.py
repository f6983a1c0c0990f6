"""`require`, `avoid` and round trips, from the policy file to every path that a request can take."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.base import Outcome, RequestFacts, Send
from policies.explain import explain_policy
from policies.filechecks import KnownNames
from policies.files import read_policy
from policies.routing import Routing
from policies.rules import RuleSet
from policies.state import Backend, Fleet
from policies.valve import Valve
from tests.patience import examples
from tests.policies.builders import backend, decided, fleet, ids, request


def rules(text: str) -> RuleSet:
    return read_policy(f"rules: [{{name: all, {text}}}]", "p.yaml").rules


def down(fleet: Fleet, *names: str, up: bool = False) -> None:
    for name in names:
        fleet[name].probed_up = up
    fleet.refresh(1.0)


# --- require -----------------------------------------------------------------------------------------------


def test_what_is_required_is_not_given_up_when_everything_else_fails() -> None:
    homes = fleet(
        backend("a", labels={"trust": "contracted"}, price_input=1.0, price_output=1.0),
        backend("b", labels={"trust": "contracted"}),
        backend("c", price_input=1.0, price_output=1.0),
    )
    valve = Valve(rules("require: {labels: {trust: contracted}, price: {max: 2}}"), homes)
    routing = valve.submit(request(), 1.0)
    assert (decided(routing), routing.removed) == (
        "a",
        dict.fromkeys("bc", "not among the backends of rule 'all'"),
    )
    down(homes, "a")
    assert decided(valve.submit(request("2"), 1.0)) == "no_backend"
    homes.replace([homes["b"], homes["c"]])
    assert decided(valve.submit(request("3"), 2.0)) == "model_not_found"


@pytest.mark.parametrize(
    ("text", "served"),
    [
        ("require: {labels: {trust: contracted}}", True),
        ("require: {labels: {trsut: contracted}}", False),
        ("sites: away", False),
        ("sites: [local, away]", True),
        ("prefer: [{labels: {card: h20}}, {operator: x}]", False),
        ("prefer: [{labels: {card: h20}}, {site: '*'}]", True),
        ("avoid: [{labels: {trust: contracted}}]", True),
        ("require: {rtt: {max: 50ms}}", True),
        ("split: [{name: one, share: 5%, operator: x}, {name: two, share: 95%, site: away}]", False),
        ("split: [{name: one, share: 5%, operator: x}, {name: two, share: 95%}]", True),
    ],
)
def test_a_rule_that_nobody_meets_is_read_back_as_it_refuses(text: str, served: bool) -> None:
    homes = fleet(backend("a", site="local", labels={"trust": "contracted"}), backend("b"))
    homes["a"].observe_rtt(0.001, 0.0)
    known = KnownNames(list(homes), frozenset({"away"}), frozenset({"x"}))
    policy = read_policy(f"rules: [{{name: all, {text}}}]", "p.yaml", known)
    refused = decided(Valve(policy.rules, homes).submit(request(), 1.0)) == "model_not_found"
    assert (not refused, policy.unserved) == (served, set() if served else {"all"})
    words = " ".join(explain_policy(policy).split())
    assert ("may serve them: each is refused with 404." in words) == refused
    assert ("When none has room" in words) == served
    assert any("is refused with 404" in found.message for found in policy.warnings) == refused


def test_sites_and_require_hold_both() -> None:
    homes = fleet(backend("a", site="x", labels={"t": "y"}), backend("b", site="x"), backend("c"))
    assert decided(rules("sites: x, require: {labels: {t: y}}").route(request(), homes, 0.0)) == "a"


def requirements() -> list[tuple[str, Any]]:
    return [
        ("require: {labels: {trust: yes-sir}}", lambda one: one.labels.get("trust") == "yes-sir"),
        ("require: {operator: x}", lambda one: one.operator == "x"),
        ("require: {price: {max: 3}}", lambda one: one.price_input is not None and one.price_input <= 1.0),
        (
            "require: {carbon: {max: 300}}",
            lambda one: one.carbon_gco2_kwh is not None and one.carbon_gco2_kwh <= 300,
        ),
        ("require: {rtt: {max: 50ms}}", lambda one: 0.0 < one.rtt_s <= 0.05),
        (
            "require: {rtt: {max: 50ms}, operator: x}",
            lambda one: 0.0 < one.rtt_s <= 0.05 and one.operator == "x",
        ),
    ]


MORE = [
    "queue: {wait: 2s, depth: 3}",
    "prefer: [{site: local, spill: {enter: 150%, leave: 90%}}, {rtt: {max: 20ms}}, {site: '*'}]",
    "avoid: [{labels: {card: old}}, {rtt: {min: 30ms}}]",
    "split: [{name: a, share: 30%, site: local}, {name: b, share: 70%}], pick: power-of-two",
]


@st.composite
def machines(draw: st.DrawFn, name: str) -> Backend:
    price = draw(st.none() | st.sampled_from([1.0, 2.0]))
    return backend(
        name,
        site=draw(st.sampled_from(["local", "east"])),
        slots=draw(st.integers(1, 3)),
        labels=draw(st.dictionaries(st.sampled_from(["trust", "card"]), st.sampled_from(["yes-sir", "old"]))),
        operator=draw(st.sampled_from(["x", "y"])),
        price_input=price,
        price_output=price,
        carbon_gco2_kwh=draw(st.none() | st.sampled_from([200.0, 400.0])),
        rtt_s=draw(st.sampled_from([0.0, 0.01, 0.04, 0.2])),
    )


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "fail", "hedge", "end", "poll", "rtt", "flip"]),
        st.integers(0, 9),
    ),
    min_size=5,
    max_size=40,
)


@pytest.mark.parametrize("number", range(len(requirements())))
@given(data=st.data(), more=st.sets(st.sampled_from(MORE)), steps=STEPS)
@settings(max_examples=examples(25), deadline=None)
def test_no_path_leads_past_what_is_required(
    number: int, data: st.DataObject, more: set[str], steps: list[tuple[str, int]]
) -> None:
    """Choice, spill, retry, hedge and end of wait, while backends go up and down, and nearer and farther."""
    text, satisfied = requirements()[number]
    homes = fleet(*(data.draw(machines(f"b{number}")) for number in range(5)))
    valve = Valve(rules(", ".join([text, *sorted(more)])), homes)
    running: list[tuple[Routing, set[str]]] = []

    def answered(routing: Routing | None, tried: set[str]) -> None:
        if routing is None or not isinstance(routing.decision, Send):
            return
        assert satisfied(homes[routing.decision.backend]), routing
        assert all(satisfied(homes[name]) for name in routing.decision.fallbacks)
        running.append((routing, tried))

    now = 0.0
    for count, (step, which) in enumerate(steps):
        now += 0.4
        if step == "submit":
            tenant = "ab"[which % 2]
            answered(valve.submit(request(str(count), tenant=tenant, session=f"s{which}"), now), set())
        elif step in ("fail", "end") and running:
            routing, tried = running.pop(which % len(running))
            assert routing.lease is not None
            homes.release(routing.lease, Outcome.FAILED if step == "fail" else Outcome.OK, now)
            if step == "fail":
                tried = tried | {routing.lease.backend.name}
                answered(valve.retry(routing.request, routing, tried, now), tried)
        elif step == "hedge" and running:
            routing, tried = running[which % len(running)]
            assert routing.lease is not None
            tried = tried | {routing.lease.backend.name}
            answered(valve.hedge(routing.request, frozenset(tried), now), tried)
        elif step == "rtt":
            homes[f"b{which % 5}"].rtt_s = [0.01, 0.04, 0.06][which % 3]
        elif step == "flip":
            one = homes[f"b{which % 5}"]
            one.probed_up = not one.probed_up
            homes.refresh(now)
        for routing in valve.poll(now):
            answered(routing, set())


# --- avoid -------------------------------------------------------------------------------------------------


def send_all(valve: Valve, count: int, now: float = 1.0) -> list[str]:
    return [decided(valve.submit(request(f"{now}-{number}"), now)) for number in range(count)]


def test_what_is_avoided_gets_what_nobody_else_has_room_for_before_anybody_waits() -> None:
    homes = fleet(backend("dirty", slots=1), backend("a", slots=1), backend("b", slots=1))
    valve = Valve(rules("avoid: [{backend: dirty}]"), homes)
    assert send_all(valve, 4) == ["a", "b", "dirty", "hold"]


def test_what_is_avoided_comes_after_all_tiers_and_prefer_still_says_who_is_used() -> None:
    homes = fleet(
        backend("a", site="local", slots=1, labels={"card": "old"}),
        backend("b", site="local", slots=1),
        backend("c", site="x", slots=1),
        backend("d", site="y", slots=1, labels={"card": "old"}),
    )
    text = "prefer: [{site: local}, {site: x}], avoid: [{labels: {card: old}}]"
    valve = Valve(rules(text), homes)
    first = valve.submit(request("first"), 1.0)
    assert isinstance(first.decision, Send)
    assert (first.decision.backend, first.decision.fallbacks, first.tier) == ("b", ("c", "a"), 0)
    assert send_all(valve, 3) == ["c", "a", "hold"]


def test_what_is_avoided_serves_alone_when_all_others_are_down() -> None:
    homes = fleet(backend("a"), backend("dirty"))
    valve = Valve(rules("avoid: [{backend: dirty}]"), homes)
    down(homes, "a")
    routing = valve.submit(request(), 1.0)
    assert (decided(routing), routing.tier) == ("dirty", 1)


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 14))
@settings(max_examples=40)
def test_nobody_goes_to_an_avoided_backend_while_another_has_a_free_slot(
    avoided: list[bool], count: int
) -> None:
    homes = fleet(
        *(
            backend(f"b{number}", labels={"a": "y"} if bad else {}, slots=2)
            for number, bad in enumerate(avoided)
        )
    )
    valve = Valve(rules("avoid: [{labels: {a: y}}]"), homes)
    for number in range(count):
        free = any(one.has_free_slot(1.0) for one in homes if not one.labels)
        name = decided(valve.submit(request(str(number)), 1.0))
        if name != "hold":
            assert not (free and homes[name].labels)
        else:
            assert not any(one.has_free_slot(1.0) for one in homes)


# --- round trips -------------------------------------------------------------------------------------------


def test_a_backend_moves_between_tiers_with_its_round_trip() -> None:
    homes = fleet(backend("a", rtt_s=0.01, slots=100), backend("b", rtt_s=0.09, slots=100))
    valve = Valve(rules("prefer: [{rtt: {max: 50ms}}, {site: '*'}]"), homes)
    assert send_all(valve, 2, 1.0) == ["a", "a"]
    homes["a"].rtt_s, homes["b"].rtt_s = 0.2, 0.03
    assert send_all(valve, 2, 2.0) == ["b", "b"]
    homes["b"].rtt_s = 0.06
    routing = valve.submit(request("far"), 3.0)
    assert (decided(routing), routing.tier) in [("a", 1), ("b", 1)]


def test_a_round_trip_that_is_not_measured_is_inside_of_no_bounds() -> None:
    homes = fleet(backend("a"), backend("b"))
    valve = Valve(rules("require: {rtt: {max: 50ms}}"), homes)
    routing = valve.submit(request("1"), 1.0)
    assert decided(routing) == "no_backend"
    assert routing.removed == dict.fromkeys("ab", "rule 'all' does not take its round trip")
    homes["b"].observe_rtt(0.01, 2.0)
    assert decided(valve.submit(request("2"), 2.0)) == "b"


def test_who_waits_for_a_near_backend_is_asked_again_when_it_is_near() -> None:
    homes = fleet(backend("a", rtt_s=0.01, slots=1), backend("b", rtt_s=0.09, slots=1))
    valve = Valve(rules("require: {rtt: {max: 50ms}}"), homes)
    assert send_all(valve, 2) == ["a", "hold"]
    assert valve.poll(2.0) == []
    homes["b"].rtt_s = 0.02
    assert [decided(routing) for routing in valve.poll(3.0)] == ["b"]


def test_a_spill_flag_outlasts_that_backends_come_near_and_go() -> None:
    homes = fleet(backend("a", rtt_s=0.01, slots=10), backend("b", rtt_s=0.04, slots=10), backend("c"))
    text = "prefer: [{rtt: {max: 50ms}, spill: {enter: 80%, leave: 30%}}, {site: '*'}]"
    valve = Valve(rules(text), homes)
    homes["a"].in_flight = homes["b"].in_flight = 8
    valve.submit(request("1"), 1.0)
    (flag,) = valve.rules.spills
    assert (flag.open, flag.backends) == (True, {"a", "b"})
    homes["a"].rtt_s, homes["b"].in_flight = 0.1, 5
    valve.submit(request("2"), 2.0)
    assert valve.rules.spills == (flag,)
    assert (flag.open, flag.backends, round(flag.saturation, 3)) == (True, {"b"}, 0.5)
    homes["b"].in_flight = 2
    valve.submit(request("3"), 3.0)
    assert not flag.open
    homes["a"].rtt_s = 0.01
    valve.submit(request("4"), 4.0)
    assert flag.backends == {"a", "b"}
    homes["a"].rtt_s = homes["b"].rtt_s = 0.1
    valve.submit(request("5"), 5.0)
    assert (flag.open, flag.backends) == (False, frozenset())
    valve.poll(6.0)
    assert flag.open  # nobody is left in it


def test_what_is_remembered_of_distances_is_bounded() -> None:
    homes = fleet(*(backend(f"b{number}", rtt_s=0.01) for number in range(12)))
    rule_set = rules("prefer: [{rtt: {max: 50ms}}, {site: '*'}]")
    for number in range(1100):
        for place, one in enumerate(homes):
            one.rtt_s = 0.01 if number >> place & 1 else 0.1
        rule_set.route(request(), homes, 1.0)
        assert len(rule_set._sets._found) <= 1000
    assert len(rule_set._sets._found) < 200


def test_without_round_trips_in_its_rule_nothing_depends_on_them() -> None:
    homes = fleet(backend("a", rtt_s=0.01))
    rule_set = rules("pick: random")
    before = rule_set.candidates(request(), homes)
    homes["a"].rtt_s = 0.5
    assert rule_set.candidates(request(), homes) is before


def test_held_requests_are_answered_in_their_order_while_distances_change() -> None:
    homes = fleet(backend("a", rtt_s=0.01, slots=1), backend("b", rtt_s=0.09, slots=2))
    valve = Valve(rules("require: {rtt: {max: 50ms}}"), homes)
    running: RequestFacts = request("running")
    valve.submit(running, 1.0)
    assert send_all(valve, 3, 1.0) == ["hold"] * 3
    homes["b"].rtt_s = 0.02
    assert ids(valve.poll(2.0)) == ["1.0-0", "1.0-1"]
    homes["a"].rtt_s = homes["b"].rtt_s = 0.2
    assert valve.poll(3.0) == []
    assert [decided(routing) for routing in valve.poll(12.0)] == ["no_backend"]
