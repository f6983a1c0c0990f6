"""Laws of the valve under everything that can happen to it, in any order.

1. Every submitted request gets exactly one terminal answer, unless its client leaves first.
2. Nothing is sent, nor proposed as a fallback, where the data class, the model or the rule forbid it, on first
   choice, spill, retry or after a wait.
3. What is counted onto backends is what was sent and has not ended; at the end all counts are zero.
4. Whoever drives it by `next_wake` alone gets every held request answered.
5. Nothing is sent to a standby that sleeps, and whoever waits for standbys alone is told of.
"""

from __future__ import annotations

from math import inf
from random import Random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from policies.base import Hold, Outcome, Policy, Reject, Send
from policies.constraints import feasible
from policies.match import Match, Selector
from policies.routing import Routing
from policies.rules import Queue, RuleSet, Spill, Tier
from policies.state import Backend, Fleet
from policies.valve import Valve
from tests.patience import examples
from tests.policies import builders
from tests.policies.builders import Answers, Broken, LeastInFlight, WeightedByRoom, backend, request

CLASSES = ["public", "internal", "restricted"]
LOCAL = Selector(sites=frozenset({"local"}))
REFUSALS = {"model_not_found", "data_class", "context_length", "no_backend", "overloaded"}
CODES = REFUSALS | {"queue_full", "queue_timeout"}


class Moody(WeightedByRoom):
    """Holds, refuses and fails at times."""

    def choose(self, *seen: Any) -> Any:
        mood = self.rng.random()
        if mood < 0.2:
            return Hold(seen[2] + 1.0, "moody")
        if mood < 0.3:
            return Reject("overloaded", "moody")
        if mood < 0.4:
            raise RuntimeError("moody")
        return super().choose(*seen)


def policies(seed: int) -> list[Policy]:
    rng = Random(seed)
    return [LeastInFlight(), WeightedByRoom(rng), Moody(rng), Broken(), Answers(Send("local"))]


def policy_file(seed: int) -> RuleSet:
    """One of many: the seed picks policies, tiers and limits."""
    rng = Random(seed)
    tiers = rng.choice(
        [
            (Tier(),),
            (Tier(LOCAL, Spill(0.8, 0.5)), Tier()),
            (Tier(LOCAL, Spill(1.5, 0.5)), Tier(Selector(sites=frozenset({"east"}))), Tier()),
            (Tier(Selector(sites=frozenset({"east"}))), Tier(LOCAL)),
        ]
    )
    queue = Queue(rng.choice([2.0, 8.0]), rng.choice([1, 4]), cold_start_s=rng.choice([0.0, 1.0, 20.0]))
    return RuleSet(
        [
            builders.rule(
                "restricted",
                rng.choice(policies(seed)),
                match=Match(data_classes=frozenset({"restricted"})),
                require=LOCAL,
                queue=Queue(rng.choice([0.0, 3.0]), rng.choice([0, 3])),
            ),
            builders.rule("rest", rng.choice(policies(seed)), tiers=tiers, queue=queue),
        ]
    )


def some_backend(name: str, seed: int) -> Backend:
    rng = Random(f"{name} {seed}")
    local = name.startswith("local")
    return backend(
        name,
        site="local" if local else name.rstrip("0123456789"),
        slots=rng.choice([1, 1, 2]),
        models=rng.choice([frozenset("m"), frozenset("mn")]),
        data_classes=None if local else frozenset(rng.sample(CLASSES[:2], rng.randint(0, 2))),
        context_tokens=rng.choice([{}, {"m": 50}]),
    )


class ValveMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.number = 0
        self.held: set[str] = set()
        self.gone: set[str] = set()
        """Answered, or cancelled."""
        self.running: dict[str, tuple[Routing, list[str]]] = {}
        """Sent and not ended: the routing, and where earlier attempts went."""
        self.ever: list[Backend] = []

    @initialize(seed=st.integers(0, 999))
    def start(self, seed: int) -> None:
        self.ever = [some_backend(name, seed) for name in ("local", "local2", "east", "west")]
        self.fleet = Fleet(self.ever)
        self.valve = Valve(policy_file(seed), self.fleet)

    # -- what is checked of every answer

    def take(self, routing: Routing, tried: list[str]) -> None:
        facts = routing.request
        decision = routing.decision
        if isinstance(decision, Send):
            allowed = feasible(facts, self.fleet, self.valve.rules.rule_for(facts).allows).backends
            named = [decision.backend, *decision.fallbacks]
            assert {view.name for view in allowed}.issuperset(named)
            for name in named:
                classes = self.fleet[name].data_classes
                assert classes is None or facts.data_class in classes
                assert name not in tried
            assert routing.lease is not None
            assert routing.lease.backend is self.fleet[decision.backend]
            assert not self.fleet[decision.backend].asleep
            assert facts.id not in self.running
            self.running[facts.id] = (routing, [*tried, decision.backend])
        else:
            assert isinstance(decision, Reject)
            assert routing.lease is None
            assert decision.code in CODES or decision.reason == "moody"

    def terminal(self, routing: Routing) -> None:
        name = routing.request.id
        assert name not in self.gone
        self.gone.add(name)
        self.held.discard(name)
        self.take(routing, [])

    # -- what can happen

    @rule(
        tenant=st.sampled_from("ab"),
        data_class=st.sampled_from(CLASSES),
        model=st.sampled_from("mmno"),
        priority=st.integers(0, 1),
        max_tokens=st.sampled_from([0, 60]),
        patience=st.sampled_from([inf, inf, 1.0]),
    )
    def submit(self, patience: float, **facts: Any) -> None:
        self.number += 1
        asked = request(f"r{self.number}", arrived=self.now, deadline=self.now + patience, **facts)
        routing = self.valve.submit(asked, self.now)
        if isinstance(routing.decision, Hold):
            assert routing.lease is None
            self.held.add(asked.id)
        else:
            self.terminal(routing)

    @rule()
    def poll(self) -> None:
        for routing in self.valve.poll(self.now):
            assert routing.request.id in self.held
            self.terminal(routing)

    @rule(seconds=st.floats(0.0, 4.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), again=st.booleans())
    def end(self, data: st.DataObject, outcome: Outcome, again: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        routing, tried = self.running.pop(name)
        assert routing.lease is not None
        assert self.fleet.release(routing.lease, outcome, self.now) is not None
        if outcome is Outcome.FAILED and again:
            self.take(self.valve.retry(routing.request, routing, tried, self.now), tried)

    @precondition(lambda self: self.number)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = f"r{data.draw(st.integers(1, self.number))}"
        assert self.valve.cancel(name) == (name in self.held)
        if name in self.held:
            self.held.remove(name)
            self.gone.add(name)

    @rule(seed=st.integers(0, 999))
    def swap(self, seed: int) -> None:
        self.valve.swap(policy_file(seed), self.now)

    @rule(data=st.data(), up=st.booleans())
    def probe(self, data: st.DataObject, up: bool) -> None:
        if self.fleet.backends:
            name = data.draw(st.sampled_from(sorted(self.fleet.backends)))
            self.fleet[name].probed(up, self.now)
            self.fleet.refresh(self.now)

    @rule(data=st.data(), asleep=st.booleans(), draining=st.booleans())
    def put(self, data: st.DataObject, asleep: bool, draining: bool) -> None:
        """A standby goes to sleep, wakes, drains or is out of reach."""
        if self.fleet.backends:
            name = data.draw(st.sampled_from(sorted(self.fleet.backends)))
            self.fleet.put(name, self.now, asleep=asleep, draining=draining)

    @rule(data=st.data(), seconds=st.floats(0.0, 5.0))
    def back_off(self, data: st.DataObject, seconds: float) -> None:
        if self.fleet.backends:
            self.fleet.back_off(data.draw(st.sampled_from(sorted(self.fleet.backends))), seconds, self.now)

    @rule(names=st.sets(st.sampled_from(["local", "local2", "east", "west"])), seed=st.integers(0, 999))
    def replace(self, names: set[str], seed: int) -> None:
        """Some backends stay, some go, some are new or changed."""
        kept = Random(seed).random() < 0.5
        backends = [
            self.fleet[name] if kept and name in self.fleet.backends else some_backend(name, seed)
            for name in sorted(names)
        ]
        self.ever.extend(backends)
        self.fleet.replace(backends)

    # -- what always holds

    @invariant()
    def books_balance(self) -> None:
        if not self.ever:
            return
        assert self.held.isdisjoint(self.gone)
        assert len(self.held) + len(self.gone) == self.number
        assert self.valve.queued <= len(self.held)  # the rest was refused and waits to be polled for
        assert self.valve.queued == sum(self.valve.queued_by_tenant().values())
        assert self.valve.next_wake() < inf or not self.held
        by_model = self.valve.waiting_by_model()
        assert self.valve.queued == sum(count for count, _ in by_model.values())
        awaited = self.valve.waiting_for_standbys()
        assert sum(count for _, count, _ in awaited) <= self.valve.queued
        assert all(self.fleet[name].asleep for names, _, _ in awaited for name in names)
        counted: dict[int, int] = {}
        for routing, _ in self.running.values():
            assert routing.lease is not None
            counted[id(routing.lease.backend)] = counted.get(id(routing.lease.backend), 0) + 1
        for one in self.ever:
            assert one.in_flight == counted.get(id(one), 0)

    def teardown(self) -> None:
        if not self.ever:
            return
        for _ in range(1000):
            if not self.held:
                break
            self.now = max(self.now, self.valve.next_wake())
            self.poll()
        assert not self.held
        assert len(self.gone) == self.number
        for routing, _ in self.running.values():
            assert routing.lease is not None
            self.fleet.release(routing.lease, Outcome.OK, self.now)
        assert all((one.in_flight, one.in_flight_tokens) == (0, 0) for one in self.ever)


TestValve = ValveMachine.TestCase
TestValve.settings = settings(max_examples=examples(150), stateful_step_count=40, deadline=None)
