"""Requests that nothing but a standby may serve: held for it, and never forgotten."""

from __future__ import annotations

from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import Hold, Outcome, Reject, Send
from policies.health import Health
from policies.prefixes import Prefixes
from policies.routing import AVAILABILITY, STANDBY, TIERS
from policies.rules import Match, RuleSet, Selector, Tier
from policies.split import Part, Split
from policies.state import Backend, Fleet
from policies.valve import Valve
from tests.policies.builders import backend, decided, fleet, ids, one_tier, release, request, rule

COLD_S = 60.0


def cold(*others: Backend, **queue: float) -> tuple[Valve, Fleet]:
    """A valve over the standby `z`, which sleeps, and others."""
    homes = fleet(*others, backend("z", slots=1, asleep=True))
    homes.refresh(0.0)
    return Valve(one_tier(**{"wait_s": 5.0, "cold_start_s": COLD_S, **queue}), homes), homes


# --- holding ---------------------------------------------------------------------------------------------------


def test_what_only_a_standby_may_serve_is_held_until_it_is_ready() -> None:
    valve, homes = cold()
    held = valve.submit(request("x"), 0.0)
    assert held.decision == Hold(COLD_S, "no backend runs that may serve it; waiting for standby z")
    assert held.decided_by == STANDBY
    assert valve.poll(30.0) == []
    homes.put("z", 40.0, asleep=False)
    (answer,) = valve.poll(40.0)
    assert (decided(answer), answer.held_s) == ("z", 40.0)
    assert answer.decision.reason.startswith("waited for a standby: ")


@pytest.mark.parametrize("standby", [True, False])
def test_one_that_has_died_is_waited_for_before_anybody_has_put_it_to_sleep(standby: bool) -> None:
    homes = fleet(backend("z", slots=1, standby=standby))
    homes.refresh(0.0)
    valve = Valve(one_tier(wait_s=5.0, cold_start_s=COLD_S), homes)
    z = homes["z"]
    z.connects = False
    z.probed(False, 1.0)
    homes.refresh(1.0)
    routing = valve.submit(request("x", arrived=1.0), 1.0)
    if not standby:
        assert isinstance(routing.decision, Reject)
        return
    assert routing.decided_by == STANDBY
    assert valve.waiting_for_standbys() == [({"z"}, 1, 0.0)]
    homes.put("z", 9.0, asleep=True)
    assert valve.poll(9.0) == []
    homes.put("z", 40.0, asleep=False)
    z.probed(True, 40.0)
    homes.refresh(40.0)
    (answer,) = valve.poll(40.0)
    assert decided(answer) == "z"


def test_nobody_waits_for_one_that_has_died_and_has_no_money_left() -> None:
    homes = fleet(backend("z", slots=1, standby=True, over_budget=True))
    homes["z"].connects = False
    homes["z"].probed(False, 1.0)
    homes.refresh(1.0)
    assert isinstance(Valve(one_tier(), homes).submit(request("x"), 1.0).decision, Reject)


def test_it_is_held_no_longer_than_its_rule_allows() -> None:
    valve, _ = cold()
    valve.submit(request("x"), 0.0)
    assert valve.next_wake() == COLD_S
    (answer,) = valve.poll(COLD_S)
    reason = "standby z was to be started for it, and was not ready in time"
    assert answer.decision == Reject("queue_timeout", reason, 5.0)
    assert answer.held_s == COLD_S


def test_nor_longer_than_its_deadline() -> None:
    valve, _ = cold()
    valve.submit(request("x", deadline=20.0), 0.0)
    assert valve.next_wake() == 20.0
    (answer,) = valve.poll(20.0)
    assert answer.decision == Reject("queue_timeout", "its deadline passed while it was held", 5.0)


def test_without_a_cold_start_it_is_refused_at_once() -> None:
    valve, _ = cold(cold_start_s=0.0)
    refused = valve.submit(request("x"), 0.0)
    assert (decided(refused), refused.decided_by) == ("no_backend", AVAILABILITY)


def test_while_another_backend_runs_nobody_waits_for_the_standby() -> None:
    valve, _ = cold(backend("a", slots=1))
    assert decided(valve.submit(request("x"), 0.0)) == "a"
    waits = valve.submit(request("y"), 0.0)
    assert (waits.decided_by, waits.decision.until) == (TIERS, 5.0)
    assert valve.waiting_for_standbys() == []
    assert valve.waiting_by_model() == {"m": (1, 0)}


def test_the_held_go_wherever_capacity_appears_first() -> None:
    a = backend("a")
    a.probed_up = False
    valve, _ = cold(a)
    assert valve.submit(request("x"), 0.0).decided_by == STANDBY
    a.probed(True, 3.0)
    (answer,) = valve.poll(3.0)
    assert decided(answer) == "a"


def test_a_backend_that_asked_for_a_pause_is_no_reason_to_refuse_what_a_standby_may_serve() -> None:
    valve, homes = cold(backend("a"))
    homes.back_off("a", 8.0, 0.0)
    assert valve.submit(request("x"), 0.0).decided_by == STANDBY
    assert valve.next_wake() == 8.0
    (answer,) = valve.poll(8.0)
    assert decided(answer) == "a"


def test_the_queue_is_as_deep_for_a_standby_as_for_anybody() -> None:
    valve, _ = cold(depth=2)
    assert [decided(valve.submit(request(f"r{n}"), 0.0)) for n in range(3)] == ["hold", "hold", "queue_full"]


def test_what_nobody_serves_yet_has_no_hopeless_wait() -> None:
    """Among others, one that was served is a rate to go by; here a standby served one and sleeps again."""
    valve, homes = cold(depth=500)
    homes.put("z", 0.0, asleep=False)
    running = [valve.submit(request("x"), 0.0)]
    valve.submit(request("y"), 0.0)
    release(homes, running[0], 1.0)
    running = valve.poll(1.0)
    homes.put("z", 2.0, asleep=True)
    answers = [valve.submit(request(f"r{n}", arrived=2.0 + n), 2.0 + n) for n in range(40)]
    assert {routing.decided_by for routing in answers} == {STANDBY}


def test_those_who_waited_for_a_standby_keep_their_time_when_it_is_full() -> None:
    valve, homes = cold(overflow=1.0)
    for number in range(3):
        valve.submit(request(f"r{number}"), 0.0)
    homes.put("z", 30.0, asleep=False)
    (first,) = valve.poll(30.0)
    assert valve.poll(35.0) == []  # beyond the rule's wait, within its cold start
    release(homes, first, 36.0)
    assert ids(valve.poll(36.0)) == ["r1"]
    (late,) = valve.poll(COLD_S)
    assert (late.request.id, decided(late)) == ("r2", "queue_timeout")


def test_who_waited_for_room_waits_on_for_a_standby_when_all_others_die() -> None:
    valve, homes = cold(backend("a", slots=1))
    valve.submit(request("running"), 0.0)
    assert valve.submit(request("x"), 0.0).decided_by == TIERS
    homes["a"].probed(False, 1.0)
    homes.refresh(1.0)
    assert valve.poll(1.0) == []
    assert valve.waiting_for_standbys() == [({"z"}, 1, 0.0)]
    assert valve.poll(5.0) == []  # its wait for room is over
    assert valve.next_wake() == COLD_S
    homes.put("z", 20.0, asleep=False)
    (answer,) = valve.poll(20.0)
    assert decided(answer) == "z"


@pytest.mark.parametrize("wait_over", [False, True])
def test_without_a_standby_left_it_is_refused_when_its_wait_is_over(wait_over: bool) -> None:
    valve, homes = cold()
    valve.submit(request("x"), 0.0)
    now = 6.0 if wait_over else 2.0
    homes.put("z", now, asleep=False, draining=True)
    answers = valve.poll(now)
    assert [decided(answer) for answer in answers] == (["no_backend"] if wait_over else [])


def test_when_the_standby_is_removed_it_is_refused_at_once() -> None:
    valve, homes = cold()
    valve.submit(request("x"), 0.0)
    homes.replace([backend("other", models=frozenset({"n"}))])
    (answer,) = valve.poll(1.0)
    assert decided(answer) == "model_not_found"


def test_a_new_policy_file_keeps_those_who_wait_for_a_standby() -> None:
    valve, _ = cold()
    valve.submit(request("x"), 0.0)
    valve.swap(one_tier(wait_s=1.0, cold_start_s=90.0), 10.0)
    assert valve.poll(10.0) == []
    assert valve.next_wake() == 90.0


def test_a_new_policy_file_keeps_those_who_waited_for_a_standby_that_is_full() -> None:
    valve, homes = cold()
    valve.submit(request("x"), 0.0)
    valve.submit(request("y"), 0.0)
    homes.put("z", 30.0, asleep=False)
    assert ids(valve.poll(30.0)) == ["x"]
    valve.swap(one_tier(wait_s=1.0, cold_start_s=90.0), 31.0)
    assert valve.poll(31.0) == []
    assert valve.next_wake() == 90.0


def test_a_client_that_leaves_is_forgotten() -> None:
    valve, homes = cold()
    valve.submit(request("x"), 0.0)
    assert valve.cancel("x")
    assert valve.waiting_for_standbys() == []
    homes.put("z", 1.0, asleep=False)
    assert valve.poll(1.0) == []


# --- who may wait for whom -------------------------------------------------------------------------------------


def test_each_queue_names_the_standbys_that_may_serve_it() -> None:
    homes = fleet(
        backend("p", asleep=True, data_classes=frozenset({"public"})),
        backend("s", asleep=True, data_classes=None, context_tokens={"m": 100}),
        backend("n", asleep=True, models=frozenset({"n"})),
    )
    homes.refresh(0.0)
    rules = RuleSet([rule("mine", match=Match(tenants=frozenset({"t"}))), rule("rest")])
    valve = Valve(rules, homes)
    valve.submit(request("x", prompt_tokens=50, expected_tokens=10), 0.0)
    valve.submit(request("y", prompt_tokens=2000, expected_tokens=10), 0.0)
    valve.submit(request("z", data_class="secret", prompt_tokens=5), 0.0)
    valve.submit(request("u", tenant="t", prompt_tokens=5), 0.0)
    valve.submit(request("v", model="n", prompt_tokens=7), 0.0)
    valve.submit(request("w", model="n", prompt_tokens=7), 0.0)
    assert sorted(
        (sorted(names), count, tokens) for names, count, tokens in valve.waiting_for_standbys()
    ) == [
        (["n"], 2, 14.0),
        (["p"], 1, 2010.0),
        (["p", "s"], 1, 5.0),
        (["p", "s"], 1, 60.0),
        (["s"], 1, 5.0),
    ]
    assert valve.waiting_by_model() == {"m": (4, 2080), "n": (2, 14)}


def test_nobody_waits_for_a_standby_that_may_not_serve_it() -> None:
    homes = fleet(backend("z", asleep=True, data_classes=frozenset({"public"})))
    homes.refresh(0.0)
    valve = Valve(one_tier(), homes)
    assert decided(valve.submit(request("x", data_class="secret"), 0.0)) == "data_class"
    walled = Valve(RuleSet([rule(require=Selector(sites=frozenset({"local"})))]), homes)
    assert decided(walled.submit(request("x"), 0.0)) == "model_not_found"


def test_what_only_a_sleeping_backend_kept_is_gone() -> None:
    valve, _ = cold()
    assert decided(valve.submit(request("x", backend="z"), 0.0)) == "no_backend"


def test_an_attempt_that_failed_is_not_held() -> None:
    valve, homes = cold(backend("a"))
    sent = valve.submit(request("x"), 0.0)
    release(homes, sent, 1.0, Outcome.FAILED)
    assert decided(valve.retry(request("x"), sent, ["a"], 1.0)) == "no_backend"
    assert valve.hedge(request("y"), frozenset({"a"}), 1.0) is None


def test_a_request_leaves_its_part_for_one_that_runs_before_it_waits() -> None:
    parts = (
        Part("old", 0.5, Selector(backends=frozenset({"a"}))),
        Part("new", 0.5, Selector(backends=frozenset({"z"}))),
    )
    homes = fleet(backend("a"), backend("z", asleep=True))
    homes.refresh(0.0)
    valve = Valve(RuleSet([rule(split=Split(parts))]), homes)
    facts = [request(f"r{n}", session=f"s{n}") for n in range(20)]
    assert {decided(valve.submit(one, 0.0)) for one in facts[:2]} == {"a"}
    homes["a"].probed(False, 1.0)
    homes.refresh(1.0)
    assert {valve.submit(one, 1.0).decided_by for one in facts[2:]} == {STANDBY}
    homes.put("z", 2.0, asleep=False)
    assert {decided(answer) for answer in valve.poll(2.0)} == {"z"}


def test_a_later_tier_is_waited_for_if_the_first_has_nobody() -> None:
    homes = fleet(backend("a", asleep=True), backend("z", asleep=True))
    homes.refresh(0.0)
    valve = Valve(RuleSet([rule(tiers=(Tier(Selector(sites=frozenset({"a"}))), Tier()))]), homes)
    assert "one of the standbys a, z" in valve.submit(request("x"), 0.0).decision.reason


# --- waking ----------------------------------------------------------------------------------------------------


def test_one_that_wakes_starts_clean_and_slowly() -> None:
    homes = fleet(backend("a"), backend("z", slots=10), health=Health(slow_start_s=30.0))
    homes.see_to(frozenset({"prefix"}))
    homes.refresh(0.0)
    z = homes["z"]
    lease = homes.lease(request("x", prefix=(1, 2), prefix_tokens=8), "z", 0.0)
    for _ in range(z.breaker.threshold):
        z.breaker.record(Outcome.FAILED, 0.0, 1.0)
    homes.back_off("z", 300.0, 1.0)
    homes.put("z", 2.0, asleep=True)
    assert not z.available
    homes.put("z", 50.0, asleep=False)
    assert z.available
    assert not z.breaker.is_open
    assert isinstance(z.prefixes, Prefixes)
    assert not z.prefixes.blocks
    assert z.starting
    assert z.slots < 10
    for _ in range(z.breaker.threshold):  # what ran on it before says nothing about it now
        z.breaker.record(Outcome.FAILED, lease.started, 51.0)
    assert not z.breaker.is_open


def test_one_that_had_no_trouble_starts_slowly_too() -> None:
    homes = fleet(backend("a"), backend("z", slots=10, asleep=True), health=Health(slow_start_s=30.0))
    homes.refresh(0.0)
    homes.put("z", 50.0, asleep=False)
    assert (homes["z"].available, homes["z"].starting) == (True, True)


def test_one_that_is_taken_back_from_draining_is_as_it_was() -> None:
    homes = fleet(backend("a"), backend("z", slots=10), health=Health(slow_start_s=30.0))
    homes.see_to(frozenset({"prefix"}))
    homes.refresh(0.0)
    homes.release(homes.lease(request("x", prefix=(1, 2), prefix_tokens=8), "z", 0.0), Outcome.OK, 1.0)
    homes.put("z", 2.0, asleep=True, draining=True)
    assert not homes["z"].available
    homes.put("z", 3.0, asleep=False)
    z = homes["z"]
    assert (z.available, z.starting, z.slots) == (True, False, 10)
    assert z.prefixes is not None
    assert z.prefixes.blocks


def test_who_sleeps_is_not_counted_among_the_sick() -> None:
    """Of two that run, one is doubtful: half, and not a tenth of all."""
    health = Health(slow_start_s=0.0, panic=0.4, most_ejected=1.0)
    sleepers = [backend(f"z{number}", asleep=True) for number in range(8)]
    homes = fleet(backend("a"), backend("b"), *sleepers, health=health)
    homes["b"].probed(False, 0.0)
    homes.refresh(0.0)
    valve = Valve(one_tier(), homes)
    assert {decided(valve.submit(request(f"r{n}"), 0.0)) for n in range(2)} == {"a"}
    assert not valve.rules.in_spite


def test_putting_it_where_it_is_changes_nothing() -> None:
    homes = fleet(backend("z", asleep=True))
    homes.refresh(0.0)
    version = homes.version
    assert not homes.put("z", 1.0, asleep=True)
    assert homes.version == version
    assert homes.put("z", 1.0, asleep=False)
    assert homes.version > version


# --- the law ---------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6))
def test_none_is_forgotten_and_none_waits_beside_a_free_slot(seed: int) -> None:
    """Submit, sleep, wake, die, come back, cancel and time, in any order. Whoever waits for standbys alone is told
    of with those that may serve it, and by `next_wake` alone everybody is answered in time."""
    rng = Random(seed)
    wait_s, cold_s = rng.choice([0.0, 2.0]), rng.choice([3.0, 9.0])
    homes = fleet(*(backend(name, slots=1, asleep=rng.random() < 0.7) for name in "abc"))
    homes.refresh(0.0)
    valve = Valve(one_tier(wait_s=wait_s, cold_start_s=cold_s, depth=50), homes)
    now, held, running = 0.0, dict[str, float](), []

    def take(routing: object) -> None:
        decision = routing.decision  # type: ignore[attr-defined]
        if isinstance(decision, Send):
            running.append(routing)
        assert held.pop(routing.request.id, now) + max(wait_s, cold_s) >= now  # type: ignore[attr-defined]

    for step in range(40):
        name = rng.choice("abc")
        match rng.randrange(7):
            case 0 | 1:
                routing = valve.submit(request(f"r{step}", arrived=now), now)
                if isinstance(routing.decision, Hold):
                    held[f"r{step}"] = now
                else:
                    take(routing)
            case 2:
                homes.put(name, now, asleep=rng.random() < 0.5)
            case 3:
                homes[name].probed(rng.random() < 0.5, now)
                homes.refresh(now)
            case 4 if running:
                release(homes, running.pop(), now)
            case 5 if held:
                gone = rng.choice(sorted(held))
                assert valve.cancel(gone)
                del held[gone]
            case _:
                now = min(now + rng.choice([0.1, 1.0, 4.0]), valve.next_wake())
        for routing in valve.poll(now):
            assert routing.request.id in held
            take(routing)
        free = [one.name for one in homes if one.available and one.has_free_slot(now)]
        assert not held or not free or valve.next_wake() <= now
        asleep = {one.name for one in homes if one.asleep}
        if held and asleep and not any(one.available for one in homes):
            assert valve.waiting_for_standbys() == [(asleep, len(held), 0.0)]
        else:
            assert valve.waiting_for_standbys() == []
    for _ in range(100):
        if not held:
            break
        assert valve.next_wake() < inf
        now = max(now, valve.next_wake())
        for routing in valve.poll(now):
            take(routing)
    assert not held
