"""A dry run decides as the valve would, and leaves no trace."""

from __future__ import annotations

import pickle
from copy import copy
from heapq import heappop, heappush
from random import Random
from typing import Any

import pytest

import policies
from policies.base import Outcome, RequestFacts
from policies.eventlog import EventLog, PolicySource, RecordedFleet, RecordedValve, Retries
from policies.files import read_policy
from policies.health import Health
from policies.routing import Routing
from policies.state import Lease
from policies.valve import Valve
from policies.whatif import DryRun
from tests.policies import builders
from tests.policies.builders import Broken, backend, full, local_first, one_tier, request

FILE = """
rules:
  - name: vip
    when: {{tenant: [vip]}}
    prefer: [{{site: local, spill: {{enter: 60%, leave: 40%}}}}, {{site: "*"}}]
    pick: {policy}
    queue: {{wait: 3s, depth: 4}}
  - name: near
    when: {{tenant: [y]}}
    require: {{rtt: {{max: 50ms}}}}
    prefer: [{{site: local, spill: {{enter: 60%, leave: 40%}}}}, {{site: "*"}}]
    avoid: [{{rtt: {{min: 30ms}}}}]
    pick: {policy}
    queue: {{wait: 2s, depth: 3}}
  - name: parts
    when: {{tenant: [z]}}
    split: [{{name: trial, share: 30%, site: [far]}}, {{name: others, share: 70%}}]
    pick: {policy}
    queue: {{wait: 2s, depth: 3}}
  - name: others
    prefer: [{{site: local, spill: {{enter: 75%, leave: 50%}}}}, {{site: "*"}}]
    pick: {policy}
    queue: {{wait: 2s, depth: 6}}
"""


class Drive:
    """Requests of several tenants over three backends, with failures and pauses; everything is recorded."""

    def __init__(self, policy: str, seed: int, *, tries: bool) -> None:
        self.tries = tries
        self.log: list[dict[str, Any]] = []
        self.foretold: list[tuple[Any, Any]] = []
        """What a dry run said, and what was decided."""
        self.chance = Random(seed)
        rules = read_policy(FILE.format(policy=policy), "test", seed=seed).rules
        log = EventLog(self.log.append, PolicySource("test", "", seed), salted=lambda session: session[::-1])
        backends = [
            backend("a", site="local", slots=4),
            backend("b", site="far", slots=3, location=(30.0, 110.0), price_input=1.0, price_output=2.0),
            backend("c", site="farther", slots=2, location=(50.0, 10.0)),
        ]
        self.fleet = RecordedFleet(backends, log, Health(slow_start_s=1.0))
        self.valve = RecordedValve(rules, self.fleet, log)
        log.begin(self.fleet, Retries(0.2, 10.0, 3))
        self._ends: list[tuple[float, int, Lease]] = []
        self._sent = 0
        self.now = 0.0

    def run(self, count: int) -> None:
        chance = self.chance
        for number in range(count):
            self._until(self.now + chance.expovariate(6.0))
            tenant = chance.choice(["vip", "x", "x", "x", "y", "z"])
            if chance.random() < 0.2:
                self.fleet[chance.choice("abc")].observe_rtt(chance.uniform(0.0, 0.1), self.now)
            hashes = tuple(range(number % 5 * 100, number % 5 * 100 + chance.randrange(6)))
            facts = request(
                f"r{number}",
                tenant=tenant,
                session=f"{tenant}\0{number % 7}",
                arrived=self.now,
                deadline=self.now + 30.0,
                prompt_tokens=512 * len(hashes) + 100,
                expected_tokens=200,
                prefix=hashes,
            )
            if self.tries:
                for _ in range(2):
                    foretold = DryRun(self.valve).decide(copy(facts), self.now)
                self.foretold.append((said(foretold), said(self._submit(facts))))
            else:
                self._submit(facts)

    def end(self) -> None:
        """Let all that is on its way come to its end."""
        self._until(self.now + 60.0)

    def _submit(self, facts: RequestFacts) -> Routing:
        routing = self.valve.submit(facts, self.now)
        self._take(routing)
        return routing

    def _take(self, routing: Routing) -> None:
        if routing.lease is not None:
            self._sent += 1
            heappush(self._ends, (self.now + self.chance.uniform(0.5, 3.0), self._sent, routing.lease))

    def _until(self, end: float) -> None:
        while True:
            at = min(self._ends[0][0] if self._ends else end, max(self.valve.next_wake(), self.now + 0.01))
            if at >= end:
                break
            self.now = at
            while self._ends and self._ends[0][0] <= at:
                lease = heappop(self._ends)[2]
                self.fleet.first_token(lease, at)
                failed = self.chance.random() < 0.25
                self.fleet.release(lease, Outcome.FAILED if failed else Outcome.OK, at, (100, 0, 50))
                if failed and self.chance.random() < 0.3:
                    self.fleet.back_off(lease.backend.name, 0.5, at)
            for routing in self.valve.poll(at):
                self._take(routing)
        self.now = end


def said(routing: Routing) -> tuple[Any, ...]:
    return (
        routing.decision,
        routing.decided_by,
        routing.rule,
        routing.tier,
        routing.passed,
        routing.spilling,
        routing.part,
    )


def learnt(valve: Valve) -> bytes:
    """All that is remembered by the policies, and for them."""
    choosers = [chooser.policy for rule in valve.rules.rules for chooser in rule.choosers]
    by_backend = [(one.prefixes, one.speed) for one in valve.fleet]
    flags = [(repr(flag), sorted(flag.backends)) for flag in valve.rules.spills]
    return pickle.dumps([choosers, by_backend, valve.fleet.lengths, flags])


def pick(name: str) -> str:
    needed = {"geo": ", home: [31.2, 121.4]"}
    return f"{{policy: {name}{needed.get(name, '')}}}"


@pytest.mark.parametrize("name", policies.POLICIES)
def test_it_decides_as_the_valve_does_next_and_changes_nothing(name: str) -> None:
    """The same drive with and without dry runs has the same record of events and decisions, to the last bit."""
    with_trials, without = Drive(pick(name), 3, tries=True), Drive(pick(name), 3, tries=False)
    for drive in (with_trials, without):
        drive.run(150)
        drive.end()
    assert with_trials.log == without.log
    for foretold, decided in with_trials.foretold:
        assert foretold == decided
    assert name in {decided[1] for _, decided in with_trials.foretold}
    assert {"trial", "others"} <= {decided[-1] for _, decided in with_trials.foretold}


@pytest.mark.parametrize("name", policies.POLICIES)
def test_what_policies_have_learnt_stays_as_it_is(name: str) -> None:
    drive = Drive(pick(name), 4, tries=False)
    drive.run(60)
    before = learnt(drive.valve)
    for number, tenant in enumerate(["vip", "x", "y", "z"] * 5):
        facts = request(f"t{number}", tenant=tenant, session=f"s{number}", prefix=(number, 100, 101))
        facts.prompt_tokens, facts.expected_tokens = 2000, 200
        DryRun(drive.valve).decide(facts, drive.now + 0.01 * number)
    assert learnt(drive.valve) == before


def test_what_is_learnt_of_a_request_that_is_sent_is_seen() -> None:
    """Whoever learns from a dry run is found out, whatever it is that is learnt."""
    for name in ("round-robin", "cache-aware", "gorgo", "forecast"):
        drive = Drive(pick(name), 4, tries=False)
        drive.run(60)
        before = learnt(drive.valve)
        drive.run(1)
        assert learnt(drive.valve) != before, name


def test_the_drive_has_holds_refusals_spills_and_failures() -> None:
    drive = Drive(pick("least-load"), 3, tries=False)
    drive.run(250)
    drive.end()
    assert {record.get("reject") for record in drive.log} >= {"queue_full", "queue_timeout"}
    assert {record.get("decided_by") for record in drive.log} >= {"tiers", "queue", "shares", "wait over"}
    assert {record.get("spilling") for record in drive.log} >= {True, False}
    assert all(one.ok and one.failed for one in drive.fleet)
    assert any(one.backoff_until > 0.0 for one in drive.fleet)


def test_the_drive_sees_a_trace() -> None:
    """Whoever takes the valve itself for a dry run is found out."""
    drive = Drive(pick("random"), 3, tries=False)
    drive.run(250)
    touched = Drive(pick("random"), 3, tries=False)
    for tenant in ("vip", "x", "y", "z"):  # draws
        touched.valve.rules.route(request("x", tenant=tenant), touched.fleet, 0.0, frozenset({"a"}))
    touched.run(250)
    assert drive.log != touched.log


def state_of(valve: Valve) -> list[Any]:
    return [
        valve.queued,
        valve.queued_by_tenant(),
        valve.next_wake(),
        learnt(valve),
        [repr(one) for one in valve.fleet],
        [{name: repr(use.mean) for name, use in one.shares.uses.items()} for one in valve.fleet],
        valve.rules.in_spite,
        valve.fleet.version,
        [(rule.guarded.failures, rule.guarded.last_failure) for rule in valve.rules.rules],
    ]


def test_a_flag_of_a_spill_does_not_move() -> None:
    homes = builders.fleet(backend("a", site="local", slots=2), backend("b", site="far", slots=2))
    valve = Valve(local_first(enter=0.5, leave=0.3), homes)
    valve.submit(request("first"), 0.0)
    before = state_of(valve)
    trial = DryRun(valve)
    routing = trial.decide(request("what if"), 1.0)
    assert routing.spilling
    assert routing.lease is None
    assert trial.rules.spills[0].open
    assert not valve.rules.spills[0].open
    assert state_of(valve) == before


def test_nobody_is_put_into_the_queue_and_the_queue_is_told() -> None:
    valve, _, _ = full(depth=2)
    valve.submit(request("waits"), 1.0)
    before = state_of(valve)
    trial = DryRun(valve)
    routing = trial.decide(request("what if", arrived=2.0), 2.0)
    assert builders.decided(routing) == "hold"
    assert trial.waiting == 1
    assert state_of(valve) == before
    valve.submit(request("waits too"), 2.0)
    assert builders.decided(DryRun(valve).decide(request("what if"), 2.0)) == "queue_full"
    assert valve.queued == 2


def test_a_policy_that_fails_in_a_dry_run_is_not_counted() -> None:
    valve = Valve(one_tier(Broken()), builders.fleet(backend("a")))
    before = state_of(valve)
    assert DryRun(valve).decide(request("what if"), 0.0).decided_by == "policy failed"
    assert state_of(valve) == before


def test_an_idle_tenants_share_decays_alike() -> None:
    """Asking who else uses a backend brings their means up to now, and forgets who has gone: not in a dry run."""
    homes = builders.fleet(backend("a", slots=2))
    valve = Valve(one_tier(), homes)
    for number, tenant in enumerate(("x", "x", "y")):
        routing = valve.submit(request(f"{number}", tenant=tenant), float(number))
        if tenant == "y" and routing.lease is not None:
            builders.release(homes, routing, 3.0)
    before = state_of(valve)
    DryRun(valve).decide(request("what if", tenant="y"), 100.0)
    assert state_of(valve) == before
