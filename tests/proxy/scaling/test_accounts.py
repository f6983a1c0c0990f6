"""What plans and the fleet say of money and of shortage."""

from __future__ import annotations

from policies.base import RequestFacts
from policies.files import read_policy
from policies.plans import Plan, PlanEvent
from policies.state import Backend, Fleet
from policies.valve import Valve
from proxy.scaling.accounts import accounts, room, running_for, shortage
from proxy.scaling.spending import Span
from proxy.scaling.templates import Shortage
from tests.policies.test_plans import a_plan

RULES = "rules: [{name: all, pick: least-load, queue: {wait: 60s}}]"


def begun(*started: str, template: str = "rush") -> Plan:
    """A plan for nj and xa, of which these have begun."""
    plan = a_plan("nj", "xa", template=template).moved(PlanEvent.APPROVE, "ada", "", 1000.0)
    for number, name in enumerate(started):
        assert plan is not None
        plan = plan.began_with(name, 1001.0 + number, "")
    assert plan is not None
    return plan


def test_a_template_pays_for_what_its_plans_have_started_and_nothing_else() -> None:
    half = begun("nj")
    failed = half.moved(PlanEvent.FAIL, "manager", "", 1100.0)
    assert failed is not None
    for plan in (half, failed):
        assert running_for([plan], "rush") == ["nj"], "xa may run, but for others"
        assert accounts([plan]) == {"rush": [Span("nj", 1001.0)]}
    gone = half.stopped_with("nj", 1200.0, "")
    assert gone is not None
    assert running_for([gone], "rush") == []
    assert accounts([gone, begun("xa")]) == {"rush": [Span("nj", 1001.0, 1200.0), Span("xa", 1001.0)]}
    assert (running_for([half], "other"), accounts([begun(), begun("nj", template="")])) == ([], {})


def test_a_shortage_is_one_of_its_model() -> None:
    fleet = Fleet(
        [
            Backend("a", "local", 4, models=frozenset({"m"})),
            Backend("b", "local", 1, models=frozenset({"other"})),
        ]
    )
    valve = Valve(read_policy(RULES, "test").rules, fleet)
    fleet.refresh(0.0)

    def asks(number: int, model: str, now: float) -> None:
        valve.submit(RequestFacts(f"r{number}", model, arrived=now), now)

    for number in range(4):
        asks(number, "other", 0.0)
    found = shortage(fleet, valve, "m", 9.0)
    assert found == Shortage(), "one runs and three wait, but none of them for m"
    assert shortage(fleet, valve, "other", 9.0).queue == 3
    assert shortage(fleet, valve, "other", 9.0).oldest_s == 9.0
    asks(9, "m", 10.0)
    assert shortage(fleet, valve, "m", 11.0).saturation == 0.25


def test_a_template_starts_no_more_than_it_says_whoever_has_failed_meanwhile() -> None:
    half = begun("nj")
    assert room([], "rush", 2) == 2
    assert room([half], "rush", 2) == 0, "its plan is open"
    assert room([half], "other", 2) == 2
    failed = half.moved(PlanEvent.FAIL, "manager", "xa: no cards", 1100.0)
    assert failed is not None
    assert (room([failed], "rush", 2), room([failed], "rush", 1)) == (1, 0), "nj runs on its account"
    gone = failed.stopped_with("nj", 1200.0, "")
    assert gone is not None
    assert room([gone], "rush", 2) == 2
