"""What is used when few are well: panic, and the share of backends that breakers may take out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import Outcome
from policies.health import Health
from policies.panic import in_spite
from policies.rules import Selector, Tier
from policies.state import Backend, Fleet
from policies.valve import Valve
from tests.policies.builders import backend, decided, fleet, local_first, one_tier, release, request, rule

OK, FAILED = Outcome.OK, Outcome.FAILED


def fail(homes: Fleet, name: str, now: float, times: int = 5, *, silent: bool = False) -> None:
    """So many attempts that fail."""
    for number in range(times):
        lease = homes.lease(request(f"{name}{number}"), name, now)
        lease.silent = silent
        homes.release(lease, FAILED, now)


def sick(name: str, **facts: object) -> Backend:
    """One that its probes hold for sick, and that accepts connections."""
    return backend(name, probed_up=False, **facts)


class TestPanic:
    def test_all_that_look_sick_are_used_when_nothing_else_is_left(self) -> None:
        homes = fleet(sick("a"), sick("b"), health=Health())
        homes.refresh(1.0)
        valve = Valve(one_tier(), homes)
        assert [decided(valve.submit(request(name), 1.0)) for name in "xyz"] == ["a", "b", "a"]
        assert valve.rules.in_spite == {"a", "b"}

    def test_it_ends_by_itself_when_one_is_well_again(self) -> None:
        homes = fleet(sick("a"), sick("b"), health=Health())
        homes.refresh(1.0)
        valve = Valve(one_tier(), homes)
        assert decided(valve.submit(request("x"), 1.0)) == "a"
        homes["b"].probed(True, 2.0)
        homes.refresh(2.0)
        assert [decided(valve.submit(request(name), 2.0)) for name in "yzw"] == ["b", "b", "hold"]
        assert valve.rules.in_spite == set()

    def test_zero_is_none(self) -> None:
        homes = fleet(sick("a"), health=Health(panic=0.0))
        homes.refresh(1.0)
        assert decided(Valve(one_tier(), homes).submit(request(), 1.0)) == "no_backend"

    def test_a_share_of_half_uses_all_as_soon_as_less_than_half_is_left(self) -> None:
        for well, used in ((1, 4), (2, 2)):
            homes = fleet(*(backend(f"{n}", probed_up=n < well) for n in range(4)), health=Health(panic=0.5))
            homes.refresh(1.0)
            valve = Valve(one_tier(), homes)
            assert {decided(valve.submit(request(f"{n}"), 1.0)) for n in range(4)} == {
                f"{n}" for n in range(used)
            }

    def test_what_has_no_budget_left_is_not_missed(self) -> None:
        homes = fleet(*(backend(f"{n}", probed_up=n != 1) for n in range(4)), health=Health(panic=0.5))
        for name in "23":
            homes[name].over_budget = True
        homes.refresh(1.0)
        valve = Valve(one_tier(), homes)
        assert [decided(valve.submit(request(name), 1.0)) for name in "xyz"] == ["0", "0", "hold"]

    def test_one_that_refuses_connections_is_never_used(self) -> None:
        homes = fleet(sick("a", connects=False), health=Health(panic=1.0))
        homes.refresh(1.0)
        assert decided(Valve(one_tier(), homes).submit(request(), 1.0)) == "no_backend"

    def test_nor_is_one_that_was_silent_when_it_was_last_tried(self) -> None:
        homes = fleet(backend("a", slots=9), health=Health(panic=1.0))
        valve = Valve(one_tier(), homes)
        fail(homes, "a", 1.0, silent=True)
        assert decided(valve.submit(request("x"), 1.0)) == "no_backend"
        homes["a"].probed(False, 2.0)
        homes["a"].probed(True, 3.0)
        homes.refresh(3.0)
        assert decided(valve.submit(request("y"), 3.0)) == "a"

    def test_nor_one_that_both_its_probes_and_its_breaker_hold_for_sick(self) -> None:
        homes = fleet(sick("a"), health=Health(panic=1.0))
        homes.refresh(1.0)
        valve = Valve(one_tier(), homes)
        for number in range(5):
            routing = valve.submit(request(f"{number}"), 1.0)
            assert decided(routing) == "a"
            release(homes, routing, 1.0, FAILED)
        assert decided(valve.submit(request("x"), 1.0)) == "no_backend"

    @pytest.mark.parametrize(
        "facts", [{"models": frozenset(), "models_unknown": "?"}, {"draining": True}, {"backoff_until": 9.0}]
    )
    def test_nor_one_of_unknown_models_on_its_way_out_or_resting(self, facts: dict[str, object]) -> None:
        homes = fleet(sick("a", **facts), health=Health(panic=1.0))
        homes.refresh(1.0)
        assert decided(Valve(one_tier(), homes).submit(request(), 1.0)) != "a"

    def test_it_stays_inside_the_data_class_and_the_rule(self) -> None:
        away = sick("a", data_classes=frozenset({"public"}))
        homes = fleet(away, sick("b"), health=Health(panic=1.0))
        homes.refresh(1.0)
        valve = Valve(one_tier(), homes)
        classified = [valve.submit(request(f"{n}", data_class="restricted"), 1.0) for n in range(4)]
        assert [decided(routing) for routing in classified] == ["b", "b", "hold", "hold"]
        walled = rule(require=Selector(sites=frozenset({"elsewhere"})), tiers=(Tier(),))
        valve = Valve(type(valve.rules)([walled]), homes)
        assert decided(valve.submit(request("w"), 1.0)) == "model_not_found"

    def test_a_request_whose_own_backends_are_down_panics_though_others_are_well(self) -> None:
        away = backend("away", data_classes=frozenset({"public"}))
        homes = fleet(away, sick("home"), health=Health())
        homes.refresh(1.0)
        valve = Valve(one_tier(), homes)
        assert decided(valve.submit(request("x", data_class="restricted"), 1.0)) == "home"
        assert [decided(valve.submit(request(name), 1.0)) for name in "ab"] == ["away", "away"]

    def test_the_spill_flag_does_not_flap_between_requests_and_polls(self) -> None:
        homes = fleet(sick("local", slots=8), sick("far", slots=8), health=Health())
        homes.refresh(1.0)
        valve = Valve(local_first(), homes)
        for number in range(4):
            assert decided(valve.submit(request(f"{number}"), 1.0)) == "local"
            valve.poll(1.0)
            assert not valve.rules.spills[0].open

    def test_a_good_answer_of_one_that_is_used_in_spite_closes_its_breaker(self) -> None:
        homes = fleet(backend("a", slots=9), health=Health())
        valve = Valve(one_tier(), homes)
        fail(homes, "a", 1.0)
        assert homes["a"].breaker.state(2.0) == "open"
        failing = valve.submit(request("x"), 2.0)
        release(homes, failing, 2.5, FAILED)
        assert homes["a"].breaker.opened_until == 11.0, "a failure moves nothing"
        good = valve.submit(request("y"), 3.0)
        assert good.lease is not None
        homes.first_token(good.lease, 3.2)
        assert homes["a"].breaker.state(3.2) == "closed"
        assert homes["a"].available

    def test_an_answer_that_was_on_its_way_when_the_breaker_opened_does_not(self) -> None:
        homes = fleet(backend("a", slots=9), health=Health())
        before = homes.lease(request("x"), "a", 0.5)
        same_moment = homes.lease(request("y"), "a", 1.0)
        fail(homes, "a", 1.0)
        homes.first_token(before, 2.0)
        homes.first_token(same_moment, 2.0)
        homes.release(before, OK, 3.0)
        assert homes["a"].breaker.state(3.0) == "open"


class TestShareOfEjected:
    def test_breakers_take_out_half_and_the_rest_goes_on(self) -> None:
        homes = fleet(*(backend(name, slots=9) for name in "abcd"), health=Health())
        for now, name in enumerate("abcd"):
            fail(homes, name, float(now))
        valve = Valve(one_tier(), homes)
        assert {decided(valve.submit(request(f"{n}"), 4.0)) for n in range(8)} == {"a", "b"}

    def test_those_that_were_sent_away_for_longest_stay_out(self) -> None:
        homes = fleet(*(backend(name) for name in "abc"), health=Health())
        for name, times in (("a", 2), ("b", 1), ("c", 3)):
            homes[name].breaker.backoff_s = 10.0 * times
            homes[name].breaker.is_open = True
            homes[name].breaker.opened_until = 99.0
        homes.refresh(1.0)
        assert [one.name for one in in_spite(list(homes), homes.health)] == ["b", "a"]

    def test_one_may_go_whatever_the_share(self) -> None:
        homes = fleet(backend("a"), backend("b"), health=Health(most_ejected=0.0))
        fail(homes, "a", 1.0)
        valve = Valve(one_tier(), homes)
        assert [decided(valve.submit(request(name), 1.0)) for name in "xyz"] == ["b", "b", "hold"]

    @given(
        st.lists(st.sampled_from(["well", "probes", "breaker", "both", "dead"]), max_size=12),
        st.floats(0, 1),
        st.floats(0, 1),
    )
    def test_only_doubtful_ones_and_never_fewer_than_both_rules_ask_for(
        self, states: list[str], panic: float, most_ejected: float
    ) -> None:
        health = Health(0.0, panic, most_ejected)
        homes = fleet(*(backend(f"{number}") for number in range(len(states))), health=health)
        for one, state in zip(homes, states, strict=True):
            one.probed_up = state not in ("probes", "both", "dead")
            one.connects = state != "dead"
            one.breaker.is_open = state in ("breaker", "both")
            one.breaker.opened_until = 9.0
        homes.refresh(1.0)
        used = in_spite(list(homes), health)
        assert all(one.doubtful for one in used)
        assert {one.name for one in homes if one.doubtful} == {
            f"{number}" for number, state in enumerate(states) if state in ("probes", "breaker")
        }
        ejected = states.count("breaker") - sum(one.probed_up for one in used)
        assert ejected <= max(1, int(most_ejected * len(states) + 1e-9))
        if states.count("well") + len(used) < panic * len(states):
            assert len(used) == states.count("probes") + states.count("breaker")
