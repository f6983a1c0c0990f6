from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import Outcome, RequestFacts, Send
from policies.files import read_policy
from policies.match import Selector
from policies.routing import Routing
from policies.rules import RuleSet
from policies.split import Part, Split
from policies.state import Fleet
from policies.valve import Valve
from tests.policies.builders import backend, decided, fleet, release, request

SESSIONS = [f"tenant/{number}" for number in range(4000)]


def split(**shares: float) -> Split:
    return Split(tuple(Part(name, share, Selector()) for name, share in shares.items()))


def parts_of(split: Split) -> list[str]:
    return [split.parts[split.order(request(session=session))[0]].name for session in SESSIONS]


def rules(strict: str = "false", more: str = "") -> RuleSet:
    text = (
        "rules: [{name: all, split: ["
        f"{{name: canary, share: 20%, backend: new, strict: {strict}}}, {{name: stable, share: 80%}}]{more}}}]"
    )
    return read_policy(text, "p.yaml").rules


def homes(slots: int = 1000) -> Fleet:
    return fleet(backend("new", slots=slots), backend("old1", slots=slots), backend("old2", slots=slots))


def of_part(part: str, split: Split | None) -> RequestFacts:
    """A request that belongs to a part."""
    assert split is not None
    for session in SESSIONS:
        asked = request(session, session=session)
        if split.parts[split.order(asked)[0]].name == part:
            return asked
    raise AssertionError


def down(fleet: Fleet, *names: str) -> None:
    for name in names:
        fleet[name].probed_up = False
    fleet.refresh(1.0)


# --- shares ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 20), min_size=2, max_size=5).filter(any))
def test_each_part_gets_its_share_of_the_sessions(weights: list[int]) -> None:
    shares = {f"part{number}": weight / sum(weights) for number, weight in enumerate(weights)}
    counts = Counter(parts_of(split(**shares)))
    for name, share in shares.items():
        deviation = (len(SESSIONS) * share * (1.0 - share)) ** 0.5
        assert abs(counts[name] - len(SESSIONS) * share) <= 6.0 * deviation + 3.0, (name, share)


def test_a_growing_share_takes_sessions_and_gives_none_back() -> None:
    steps = [parts_of(split(canary=share, stable=1.0 - share)) for share in (0.0, 0.05, 0.2, 0.5, 1.0)]
    for before, after in pairwise(steps):
        assert all(later == "canary" for first, later in zip(before, after, strict=True) if first != later)
    assert (set(steps[0]), set(steps[-1])) == ({"stable"}, {"canary"})


def test_sessions_of_a_part_that_is_away_spread_by_the_shares_of_the_others() -> None:
    three = split(a=0.5, b=0.4, c=0.1)
    orders = [three.order(request(session=session)) for session in SESSIONS]
    seconds = Counter(order[1] for order in orders if order[0] == 0)
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert 0.75 < seconds[1] / (seconds[1] + seconds[2]) < 0.85


def test_where_a_session_belongs_never_changes() -> None:
    """Figures that stand in nobody's table: another process, and another year, has to find the same."""
    thirty = split(canary=0.3, stable=0.7)
    owned = "".join(str(thirty.order(request(session=f"t/{number}"))[0]) for number in range(32))
    assert owned == "11011011111011100001101011111001"
    assert thirty.order(request("t/0")) == thirty.order(request("other", session="t/0"))
    assert thirty.order(request(session="\ud800"))  # JSON can escape half a character


@pytest.mark.parametrize("with_sessions", [True, False])
def test_requests_go_to_the_backends_of_their_part_in_the_shares_of_the_file(with_sessions: bool) -> None:
    machines, valve_rules = homes(100_000), rules()
    valve = Valve(valve_rules, machines)
    parts: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for turn in range(2):
        for session in SESSIONS[:1000]:
            asked = request(f"{turn}{session}", session=session if with_sessions else "")
            routing = valve.submit(asked, 1.0)
            assert (decided(routing) == "new") == (routing.part == "canary")
            assert isinstance(routing.decision, Send)
            assert ("new" in routing.decision.fallbacks) is False
            counts[routing.part] += 1
            parts.setdefault(session, set()).add(routing.part)
    assert abs(counts["canary"] / 2000 - 0.2) < 0.04
    if with_sessions:
        assert all(len(seen) == 1 for seen in parts.values())
    else:
        assert any(len(seen) == 2 for seen in parts.values())


def test_two_routers_agree() -> None:
    one, other = Valve(rules(), homes()), Valve(rules(), homes())
    for session in SESSIONS[:200]:
        first = one.submit(request(session, session=session), 1.0)
        assert first.part == other.submit(request(session, session=session), 1.0).part


# --- a part that is full, or away ---------------------------------------------------------------------------


def test_a_part_that_is_full_is_waited_for() -> None:
    machines = homes(slots=1)
    valve = Valve(rules(), machines)
    asked = of_part("canary", valve.rules.rules[0].split)
    first = valve.submit(request("first", session=asked.session), 1.0)
    assert decided(first) == "new"
    assert decided(valve.submit(asked, 1.0)) == "hold"
    stable = of_part("stable", valve.rules.rules[0].split)
    assert decided(valve.submit(stable, 1.0)) in ("old1", "old2")  # and nobody of another part waits for it
    release(machines, first, 2.0)
    assert [decided(routing) for routing in valve.poll(2.0)] == ["new"]


def test_the_end_of_a_wait_leads_to_no_other_part() -> None:
    machines = homes(slots=2)
    valve = Valve(rules(more=", queue: {wait: 5s, overflow: 150%}"), machines)
    session = of_part("canary", valve.rules.rules[0].split).session
    answers = [decided(valve.submit(request(str(n), session=session), 1.0)) for n in range(4)]
    assert answers == ["new", "new", "hold", "hold"]
    assert [decided(routing) for routing in valve.poll(6.5)] == ["new", "queue_timeout"]


@pytest.mark.parametrize(("strict", "expected"), [("false", "old1"), ("true", "no_backend")])
def test_a_part_that_is_down_gives_way_unless_it_is_strict(strict: str, expected: str) -> None:
    machines = homes()
    valve = Valve(rules(strict), machines)
    asked = of_part("canary", valve.rules.rules[0].split)
    down(machines, "new")
    routing = valve.submit(asked, 1.0)
    assert decided(routing) == expected
    assert routing.part == ("stable" if strict == "false" else "canary")
    machines["new"].probed_up = True
    machines.refresh(2.0)
    back = valve.submit(request("later", session=asked.session), 2.0)
    assert (decided(back), back.part) == ("new", "canary")


def test_with_all_parts_down_it_is_refused_as_down() -> None:
    machines = homes()
    valve = Valve(rules(), machines)
    down(machines, "new", "old1", "old2")
    for session in SESSIONS[:20]:
        assert decided(valve.submit(request(session, session=session), 1.0)) == "no_backend"


@pytest.mark.parametrize("strict", ["false", "true"])
def test_a_part_that_could_never_serve_it_is_passed_over(strict: str) -> None:
    machines = homes()
    machines["new"].models = frozenset({"another"})
    valve = Valve(rules(strict), machines)
    for session in SESSIONS[:50]:
        assert decided(valve.submit(request(session, session=session), 1.0)) in ("old1", "old2")
    unknown = valve.submit(request("unknown", model="x"), 1.0)
    assert decided(unknown) == "model_not_found"
    assert unknown.removed is not None
    assert all(reason == "does not serve x" for reason in unknown.removed.values())


def fail(valve: Valve, routing: Routing, tried: set[str]) -> Routing:
    assert isinstance(routing.decision, Send)
    tried.add(routing.decision.backend)
    release(valve.fleet, routing, 2.0, Outcome.FAILED)
    return valve.retry(routing.request, routing, tried, 2.0)


def test_a_retry_stays_in_its_part_as_long_as_somebody_is_left_there() -> None:
    valve = Valve(rules(), homes())
    asked = of_part("stable", valve.rules.rules[0].split)
    tried: set[str] = set()
    first = valve.submit(asked, 1.0)
    second = fail(valve, first, tried)
    assert {decided(first), decided(second)} == {"old1", "old2"}
    third = fail(valve, second, tried)
    assert (decided(third), third.part) == ("new", "canary")
    assert decided(fail(valve, third, tried)) == "no_backend"


def test_a_retry_leaves_no_strict_part() -> None:
    valve = Valve(rules("true"), homes())
    first = valve.submit(of_part("canary", valve.rules.rules[0].split), 1.0)
    assert decided(fail(valve, first, set())) == "no_backend"


def test_a_hedge_leaves_no_part() -> None:
    valve = Valve(rules(), homes())
    canary = valve.submit(of_part("canary", valve.rules.rules[0].split), 1.0)
    assert decided(canary) == "new"
    assert valve.hedge(canary.request, frozenset({"new"}), 2.0) is None
    stable = valve.submit(of_part("stable", valve.rules.rules[0].split), 1.0)
    hedge = valve.hedge(stable.request, frozenset({decided(stable)}), 2.0)
    assert {decided(stable), decided(hedge)} == {"old1", "old2"}


def test_slots_that_are_kept_for_others_lead_to_no_other_part() -> None:
    machines = homes(slots=8)
    valve = Valve(rules(), machines)
    session = of_part("canary", valve.rules.rules[0].split).session
    for number in range(3):
        valve.submit(request(f"light{number}", tenant="light", session=session), 0.0)
    machines["new"].shares.uses["light"].mean = 3.0
    answers = [
        valve.submit(request(str(number), tenant="flood", session=session), 0.0) for number in range(8)
    ]
    assert {decided(routing) for routing in answers} == {"new", "hold"}


def test_who_is_about_what_one_backend_has_goes_there_whatever_its_part() -> None:
    valve = Valve(rules(), homes())
    asked = of_part("stable", valve.rules.rules[0].split)
    asked.backend = "new"
    assert decided(valve.submit(asked, 1.0)) == "new"


def test_tiers_are_those_of_the_part() -> None:
    more = ", prefer: [{backend: [old2, new]}, {site: '*'}]"
    machines = homes(slots=1)
    valve = Valve(rules(more=more), machines)
    stable = of_part("stable", valve.rules.rules[0].split).session
    answers = [decided(valve.submit(request(str(n), session=stable), 1.0)) for n in range(3)]
    assert answers == ["old2", "old1", "hold"]


def test_backends_in_no_part_are_not_used() -> None:
    text = (
        "rules: [{name: all, split: [{name: a, share: 50%, backend: a}, {name: b, share: 50%, backend: b}]}]"
    )
    valve = Valve(read_policy(text, "p.yaml").rules, fleet(backend("a"), backend("b"), backend("c")))
    down(valve.fleet, "a", "b")
    routing = valve.submit(request(), 1.0)
    assert decided(routing) == "no_backend"
    assert routing.removed is not None
    assert routing.removed["c"] == "not among the backends of rule 'all'"
